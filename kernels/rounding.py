"""Symmetric INT8, INT4 and E4M3 from float32: scales, their inverses, rounding, packing; and float16 as it is scaled.

Every step is one correctly rounded float32 operation that no compiler contracts with a neighbour, so that the simulator
reproduces the bits.

A scale below 2^-126 counts as zero (its inverse would not be finite), and a row or channel of scale zero quantises to
zeros. A non-finite scale says that the row or channel holds an inf or a NaN: what it was quantised to means nothing,
and whoever reads the scale has to say so in the result.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cutlass_dsl import select_

from .ptx import pack_bytes_e4m3, pack_f16x2
from .tile_image import SCORE_MAGIC

__all__ = [
    "LARGEST",
    "WORD_VALUES",
    "absolute_max",
    "inverse_scale",
    "power_of_two_scale",
    "quantised_word",
    "scale_22_bits",
    "symmetric_scale",
]

LARGEST = {"int8": 127, "int4": 7, "e4m3": 448}
"""What the largest magnitude becomes in a symmetric format, by its name."""

WORD_VALUES = {"int8": 4, "int4": 8, "e4m3": 4, "float16": 2}
"""Elements of a format in a register."""

_SMALLEST_SCALE = 2.0**-126


def absolute_max(bound: Float32, value: Float32) -> Float32:
    """max(bound, |value|), NaN if either is."""
    return cute.arch.fmax(bound, abs(value), nan=True)


def symmetric_scale(amax: Float32, largest: float = LARGEST["int8"]) -> Float32:
    """amax · fl(1/largest), 0 where that is below 2^-126, non-finite where amax is."""
    scale = amax * Float32(1.0 / largest)
    return Float32(select_(scale < Float32(_SMALLEST_SCALE), Float32(0.0), scale))


def power_of_two_scale(amax: Float32) -> Float32:
    """The largest power of two not above ``amax``, 0 where that is below 2^-126, non-finite where amax is."""
    power = (amax.bitcast(Int32) & 0x7F800000).bitcast(Float32)  # 0 if subnormal
    return Float32(select_(amax < Float32.inf, power, amax))


def scale_22_bits(scale: Float32) -> Float32:
    """The scale rounded up to 22 significant bits, so that SCORE_MAGIC · scale is exact in float32."""
    rounded = ((scale.bitcast(Int32) + 3) & ~3).bitcast(Float32)
    # Adding 3 to the bits of a NaN may wrap around to a number.
    return Float32(select_(scale < Float32.inf, rounded, scale))


def inverse_scale(scale: Float32) -> Float32:
    """1/scale correctly rounded; 0 where the scale is zero or not finite."""
    usable = (scale > Float32(0.0)) & (scale < Float32.inf)
    return Float32(select_(usable, Float32(1.0) / scale, Float32(0.0)))


def quantised_word(values: list[Float32], inverse: Float32, form: str) -> Int32:
    """`WORD_VALUES` values times the inverse of their scale, half to even, in format ``form`` from the low bits up.

    Magnitudes above the format's largest, by rounding, become it. NaN stays NaN in E4M3 and float16.
    """
    if form == "float16":
        return pack_f16x2(*(value * inverse for value in values))
    if form == "e4m3":
        return pack_bytes_e4m3([value * inverse for value in values])
    if form == "int4":
        even, odd = (_int8x4(values[i::2], inverse, LARGEST["int4"]) for i in range(2))
        return (even & 0x0F0F0F0F) | ((odd << 4) & ~0x0F0F0F0F)
    return _int8x4(values, inverse, LARGEST["int8"])


def _int8x4(values: list[Float32], inverse: Float32, largest: int) -> Int32:
    """Four integers clamped to ±largest; NaN gives −largest.

    The rounding is an addition of 1.5·2^23, which leaves the integer in the low byte of the sum.
    """
    whole = []
    for value in values:
        clamped = cute.arch.fmin(cute.arch.fmax(value * inverse, Float32(-largest)), Float32(largest))
        whole.append((clamped + Float32(SCORE_MAGIC)).bitcast(Int32))
    low = cute.arch.prmt(whole[0], whole[1], 0x0040)
    high = cute.arch.prmt(whole[2], whole[3], 0x0040)
    return Int32(cute.arch.prmt(low, high, 0x5410))
