"""Static cost of the peers' forward kernels at head dim 128, read off their machine code once, as `report` reads ours.

They were compiled, never run: FlashAttention-2 is the CuTe DSL's own example, FlashAttention-4 the pip package,
SageAttention that of commit d1a57a5, INT-FlashAttention its Triton kernel with 64×64 tiles, FMHA the CuTe DSL's FP8
example for Hopper.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cute_attn.pipe_costs import PIPES

__all__ = ["HEAD_DIM", "MIX", "PEERS", "PeerCost"]

HEAD_DIM = 128

MIX = ("tensor", "MUFU", "FP", "convert", "int, mov", "memory", "rest")
"""Classes of instructions that `PeerCost.mix` counts."""


@dataclass(frozen=True)
class PeerCost:
    """The steady main loop of one peer's kernel.

    threads, registers: of a CTA, and of each of its threads at the launch
    spills:    loads and stores of local memory in the loop
    slots:     warp instructions issued per 32 scores; `mix` says of which classes, as `MIX` orders them
    floors:    cycles per 32 scores of each pipe, at the rates of `cute_attn.pipe_costs`
    published: GPU to the TOPS that its authors published (B4 H32, 32K tokens, no mask, quantisation left out)
    """

    kernel: str
    arch: str
    threads: int
    registers: int
    spills: int
    slots: float
    mix: tuple[float, ...]
    floors: dict[str, float]
    published: dict[str, int] = field(default_factory=dict)


def _peer(
    kernel: str,
    arch: str,
    launch: tuple[int, int],
    spills: int,
    slots: float,
    mix: tuple[float, ...],
    floors: tuple[float, ...],
    published: dict[str, int] | None = None,
) -> PeerCost:
    cycles = dict(zip(PIPES, floors, strict=True))
    return PeerCost(kernel, arch, *launch, spills, slots, mix, cycles, published or {})


_A100, _RTX_4090, _H100 = "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3"
_RTX_5090 = "NVIDIA GeForce RTX 5090"

PEERS = (
    _peer(
        "FlashAttention-2 bf16",
        "sm_80",
        (128, 255),
        32,
        16.14,
        (4.00, 1.06, 5.31, 0.50, 2.91, 2.12, 0.23),
        (32, 8.5, 6.9, 9.6, 20.9),
        {_A100: 204},
    ),
    _peer(
        "SageAttention INT8+FP16, FP32 accumulate",
        "sm_80",
        (128, 255),
        1,
        13.72,
        (3.12, 1.06, 4.41, 1.50, 2.16, 1.22, 0.25),
        (25, 16.5, 6.4, 7.5, 14.9),
    ),
    _peer(
        "SageAttention INT8+FP16, FP16 accumulate",
        "sm_80",
        (128, 252),
        0,
        12.62,
        (3.12, 1.06, 3.41, 1.56, 2.06, 1.16, 0.25),
        (25, 16.5, 5.8, 4.9, 14.7),
    ),
    _peer(
        "INT-FlashAttention full INT8",
        "sm_80",
        (128, 255),
        0,
        33.97,
        (2.00, 1.25, 13.38, 4.50, 4.97, 5.38, 2.50),
        (16, 42, 13.3, 23, 35),
    ),
    _peer(
        "SageAttention2 INT8+FP8, FP32+FP32",
        "sm_89",
        (128, 255),
        0,
        12.41,
        (2.00, 1.06, 5.34, 1.50, 1.36, 0.89, 0.25),
        (48, 8.5, 6.7, 4.3, 10.9),
        {_RTX_4090: 431},
    ),
    _peer(
        "SageAttention2++ INT8+FP8, FP16+FP32",
        "sm_89",
        (128, 255),
        2,
        14.78,
        (2.00, 1.06, 7.34, 1.50, 1.70, 0.92, 0.25),
        (32, 8.5, 6.9, 8.2, 10.9),
        {_RTX_4090: 493},
    ),
    _peer(
        "SpargeAttn on it, PV threshold",
        "sm_89",
        (128, 255),
        0,
        17.66,
        (2.00, 1.06, 9.70, 1.50, 2.08, 0.92, 0.39),
        (32, 8.5, 8.3, 10.5, 11.2),
    ),
    _peer(
        "SageAttention2 INT8+FP8",
        "sm_90a",
        (128, 167),
        0,
        8.88,
        (0.12, 1.03, 4.19, 1.50, 1.69, 0.05, 0.30),
        (8, 8.2, 5.8, 3.2, 0.2),
        {_H100: 882},
    ),
    _peer(
        "SpargeAttn on it, PV threshold",
        "sm_90a",
        (128, 167),
        0,
        10.58,
        (0.12, 1.03, 5.42, 1.50, 1.94, 0.09, 0.47),
        (8, 8.2, 6.4, 4.5, 0.7),
    ),
    _peer(
        "FlashAttention-4 bf16",
        "sm_90a",
        (384, 168),
        0,
        7.11,
        (0.25, 1.03, 4.22, 0.50, 0.78, 0.0, 0.33),
        (16, 8.2, 3.6, 3.1, 0.2),
    ),
    _peer(
        "CuTe DSL FMHA example FP8",
        "sm_90a",
        (384, 168),
        0,
        11.52,
        (0.12, 1.03, 7.25, 0.50, 1.72, 0.0, 0.89),
        (8, 8.2, 10.8, 3.4, 1.2),
    ),
    _peer(
        "SageAttention3 NVFP4, block mean",
        "sm_120a",
        (384, 168),
        0,
        13.28,
        (1.00, 1.28, 5.62, 0.56, 3.58, 0.88, 0.36),
        (16, 10.2, 9, 4.6, 11.8),
        {_RTX_5090: 1027},
    ),
    _peer(
        "FlashAttention-4 bf16",
        "sm_120a",
        (128, 255),
        17,
        14.84,
        (4.00, 1.06, 5.44, 0.50, 1.75, 1.89, 0.20),
        (128, 8.5, 6.3, 4.6, 20.9),
    ),
)
