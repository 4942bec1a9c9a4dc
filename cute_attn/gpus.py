"""What GPUs can do at most: the table behind every "fraction of peak" and behind the static roofline.

Peaks follow from the tensor cores' rates (`pipe_costs.TENSOR_RATES`), the number of multiprocessors and the boost clock
that NVIDIA quotes them at. They reproduce the dense figures of its data sheets; `tests/test_gpus.py` compares.
"""

from __future__ import annotations

from dataclasses import dataclass

from cute_attn.pipe_costs import TENSOR_RATES

__all__ = ["GPUS", "SUB_PARTITIONS", "Gpu", "gpu_named", "peak_tops"]

SUB_PARTITIONS = 4
"""Of a multiprocessor, each with a warp scheduler and a tensor core of its own, since Volta."""


@dataclass(frozen=True)
class Gpu:
    """One product.

    name:      as PyTorch and nvidia-smi name the device, or the start of it
    arch:      the target that its code is compiled for
    multiprocessors, boost_mhz: NVIDIA's figures; a GPU under full load may run slower, or above what it is quoted at
    memory_gb_s: bandwidth of DRAM, 10⁹ bytes per second
    l2_bytes_per_clock: that L2 delivers to all multiprocessors together; None where NVIDIA has published no figure
    full_rate: whether MMAs of 16-bit and FP8 operands accumulate in float32 as fast as in float16: professional cards
               do, GeForce cards take twice as long
    source:    NVIDIA document of these numbers
    """

    name: str
    arch: str
    multiprocessors: int
    boost_mhz: int
    memory_gb_s: float
    l2_bytes_per_clock: int | None
    full_rate: bool
    source: str


_A100 = "A100 Tensor Core GPU Architecture whitepaper, table 4; L2 read bandwidth: 5120 bytes per clock, page 33"
_H100 = "H100 Tensor Core GPU Architecture whitepaper, table 3"
_H200 = "H200 data sheet; multiprocessors and clock are those of H100 SXM5, whose peaks it repeats"
_ADA = "Ada GPU Architecture whitepaper, appendix A"
_GA102 = "GA102 GPU Architecture whitepaper, appendix A"

GPUS = (
    Gpu("NVIDIA A100-SXM4-80GB", "sm_80", 108, 1410, 2039, 5120, True, _A100),
    Gpu("NVIDIA A100-SXM4-40GB", "sm_80", 108, 1410, 1555, 5120, True, _A100),
    Gpu("NVIDIA GeForce RTX 3090", "sm_86", 82, 1695, 936, None, False, _GA102),
    Gpu("NVIDIA A10", "sm_86", 72, 1695, 600, None, True, "A10 data sheet"),
    Gpu("NVIDIA GeForce RTX 4090", "sm_89", 128, 2520, 1008, None, False, _ADA),
    Gpu("NVIDIA L40S", "sm_89", 142, 2490, 864, None, True, "L40S data sheet; clock: from its peaks"),
    Gpu("NVIDIA H100 80GB HBM3", "sm_90a", 132, 1830, 3350, None, True, _H100),
    Gpu("NVIDIA H100 PCIe", "sm_90a", 114, 1620, 2000, None, True, _H100),
    Gpu("NVIDIA H200", "sm_90a", 132, 1830, 4800, None, True, _H200),
    Gpu("NVIDIA GeForce RTX 5090", "sm_120a", 170, 2407, 1792, None, False, "RTX Blackwell whitepaper, appendix A"),
)

_NO_MATCH = ("NVL", "Ti", "Laptop", "SUPER", " D")
"""What follows a name of the table in that of another product: "NVIDIA H200 NVL" is no "NVIDIA H200"."""

_KINDS = {"float16": "f16", "bfloat16": "f16", "int8": "i8", "int4": "i4", "e4m3": "f8"}


def gpu_named(device_name: str) -> Gpu | None:
    """The table's row of a device, None for one that it does not have."""
    for gpu in GPUS:
        rest = device_name.removeprefix(gpu.name)
        if rest != device_name and not any(mark in rest for mark in _NO_MATCH):
            return gpu
    return None


def peak_tops(gpu: Gpu, qk_format: str, pv_format: str, accumulate: str) -> float | None:
    """10¹² operations per second of attention in these formats, if the tensor cores never paused.

    Half the operations are Q·Kᵀ, which accumulates in 32 bits, half P·V; each takes its own rate. ``accumulate`` is
    that of P·V, as `Recipe` names it: "float16+float32" runs its MMAs in float16. None for a format that the GPU has no
    instruction for.
    """
    rates = TENSOR_RATES[gpu.arch.rstrip("a")]

    def rate(element: str, in_float32: bool) -> int | None:
        kind = _KINDS.get(element, "")
        slow = f"{kind}_f32"
        return rates[slow] if in_float32 and not gpu.full_rate and slow in rates else rates.get(kind)

    qk, pv = rate(qk_format, True), rate(pv_format, not accumulate.startswith("float16"))
    if qk is None or pv is None:
        return None
    per_clock = 2 * 2 / (1 / qk + 1 / pv)  # harmonic mean, two operations per multiply-add
    return per_clock * SUB_PARTITIONS * gpu.multiprocessors * gpu.boost_mhz * 1e6 / 1e12
