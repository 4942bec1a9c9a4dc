"""Where registers and shared memory go, and how many CTAs a multiprocessor holds."""

from __future__ import annotations

from dataclasses import dataclass

from cute_attn.arch import ARCHS
from cute_attn.kernels.attention_sm80 import AttentionConfig, AttentionSm80

from .fragments import fragments
from .main_loop import kernel_report
from .operands import register_tensors
from .tiles import mmas_of

__all__ = ["LARGEST", "REGISTERS_PER_SM", "WARPS", "Registers", "Shared", "registers", "shared"]

SYSTEM_BYTES = 1024
"""Shared memory that every CTA costs on top of its own; a multiprocessor has as much more than a CTA may ask for
(CUDA C++ Programming Guide, shared memory of compute capabilities 8.x)."""

REGISTERS_PER_SM = 65536
"""Same guide, technical specifications."""

LARGEST = 255
"""Registers that a thread can name."""

WARPS = REGISTERS_PER_SM // (32 * (LARGEST + 1))
"""That a multiprocessor holds at so many registers each."""

_STATE = "softmax state"


@dataclass(frozen=True)
class Registers:
    """Registers of a lane.

    parts:     by tensor
    softmax:   alive between S and P: O, sums, state and all of S
    used:      what ptxas gave the kernel; spills: local loads and stores in its steady loop
    """

    parts: dict[str, int]
    softmax: int
    used: int
    spills: int


def registers(config: AttentionConfig, arch: str = "sm_80") -> Registers:
    tensors = register_tensors(config)
    parts = {name: tensors[name].registers for name in ("O", "sums", "S", "P")}
    parts[_STATE] = sum(tensor.registers for name, tensor in tensors.items() if name not in parts)
    qk, pv = mmas_of(config)
    parts["Q fragments"] = fragments(qk)["A"].registers * config.m_tiles
    parts["K fragments"] = 2 * fragments(qk)["B"].registers
    parts["V fragments"] = 2 * fragments(pv)["B"].registers
    kernel = kernel_report(config, arch)
    softmax = sum(parts[name] for name in ("O", "sums", "S", _STATE))
    spills = kernel.steady.spills if kernel.steady else 0
    return Registers(parts, softmax, kernel.resources.registers, spills)


@dataclass(frozen=True)
class Shared:
    """Shared memory of a CTA in bytes, and what fits into a multiprocessor.

    rows: of Q, of a warp; ctas: by shared memory and by registers, the smaller of the two
    """

    queries: int
    stage: int
    stages: int
    total: int
    by_shared: int
    warps: int
    rows: int

    @property
    def ctas(self) -> int:
        return min(self.by_shared, WARPS // self.warps)


def shared(config: AttentionConfig, arch: str) -> Shared:
    kernel = AttentionSm80(config)
    return Shared(
        queries=kernel.q_bytes,
        stage=kernel.stage_bytes,
        stages=config.stages,
        total=kernel.shared_bytes,
        by_shared=(ARCHS[arch].shared_bytes + SYSTEM_BYTES) // (kernel.shared_bytes + SYSTEM_BYTES),
        warps=config.warps,
        rows=16 * config.m_tiles,
    )
