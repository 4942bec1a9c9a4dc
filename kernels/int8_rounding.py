"""Symmetric INT8 and INT4 in float32: scales, their inverses, rounding, packing; and float16's power-of-two scales.

Every step is one correctly rounded float32 operation that no compiler contracts with a neighbour, so that the simulator
reproduces the bits.

A scale below 2^-126 counts as zero (its inverse would not be finite), and a row or channel of scale zero quantises to
zeros. A non-finite scale says that the row or channel holds an inf or a NaN: its integers mean nothing, and whoever
reads the scale has to say so in the result.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cutlass_dsl import select_

from .tile_image import SCORE_MAGIC

__all__ = [
    "LEVELS",
    "absolute_max",
    "inverse_scale",
    "power_of_two_scale",
    "scale_22_bits",
    "symmetric_scale",
    "to_int4x8",
    "to_int8x4",
]

LEVELS = {"int8": 127, "int4": 7}
"""The largest integer of a symmetric format, by its name; the smallest is its negative."""

_SMALLEST_SCALE = 2.0**-126


def absolute_max(bound: Float32, value: Float32) -> Float32:
    """max(bound, |value|), NaN if either is."""
    return cute.arch.fmax(bound, abs(value), nan=True)


def symmetric_scale(amax: Float32, levels: int = LEVELS["int8"]) -> Float32:
    """amax · fl(1/levels), 0 where that is below 2^-126, non-finite where amax is."""
    scale = amax * Float32(1.0 / levels)
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


def to_int8x4(values: list[Float32], inverses: list[Float32], levels: int = LEVELS["int8"]) -> Int32:
    """Four values times four inverse scales, rounded half to even, clamped to ±levels, packed from the low byte up.

    NaN gives −levels. The rounding is an addition of 1.5·2^23, which leaves the integer in the low byte of the sum.
    """
    whole = []
    for value, inverse in zip(values, inverses, strict=True):
        clamped = cute.arch.fmin(cute.arch.fmax(value * inverse, Float32(-levels)), Float32(levels))
        whole.append((clamped + Float32(SCORE_MAGIC)).bitcast(Int32))
    low = cute.arch.prmt(whole[0], whole[1], 0x0040)
    high = cute.arch.prmt(whole[2], whole[3], 0x0040)
    return Int32(cute.arch.prmt(low, high, 0x5410))


def to_int4x8(values: list[Float32], inverses: list[Float32]) -> Int32:
    """`to_int8x4` of eight values, clamped to ±7, in two's complement halves of bytes from the lowest up."""
    even, odd = (to_int8x4(values[i::2], inverses[i::2], LEVELS["int4"]) for i in range(2))
    return (even & 0x0F0F0F0F) | ((odd << 4) & ~0x0F0F0F0F)
