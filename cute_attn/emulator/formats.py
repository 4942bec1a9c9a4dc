"""Number formats that numpy lacks, and correctly rounded conversions between formats.

bf16 and the floats of 8 bits and less travel as their bit patterns (uint16, uint8). All encoders take float32 or
float64 and round once: an intermediate is made by rounding to odd, which never causes double rounding for narrower
formats.
Scalars are accepted wherever arrays are. NaN payloads are not modelled: every NaN becomes the format's canonical one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def bf16_to_f32(bits: Any) -> Any:
    """uint16 bit patterns -> float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to_odd_f32(x: Any) -> Any:
    """float64 -> float32 with the last bit set if inexact: rounding that once more, to at most 22 bits, is exact."""
    x = np.asarray(x, np.float64)
    nearest = x.astype(np.float32)
    back = nearest.astype(np.float64)
    inexact = (back != x) & np.isfinite(x)
    # Step to the neighbour nearer zero where rounding went away from it, then force the last bit.
    bits = np.asarray(nearest).view(np.uint32)
    toward_zero = np.where(np.abs(back) > np.abs(x), bits - np.uint32(1), bits)
    return np.where(inexact, toward_zero | np.uint32(1), bits).astype(np.uint32).view(np.float32)


def _as_f32(x: Any) -> Any:
    return round_to_odd_f32(x) if x.dtype == np.float64 else x


def f32_to_bf16(x: Any, rounding: str = "rn") -> Any:
    """float32 or float64 -> bf16 bit patterns (uint16). rounding: "rn" (ties to even) or "rz"."""
    bits = np.asarray(_as_f32(x)).view(np.uint32)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if rounding == "rn":
        bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    high = (bits >> np.uint32(16)).astype(np.uint16)
    return np.where(nan, np.uint16(0x7FFF), high) if nan.any() else high


def pack_bf16x2(high: Any, low: Any) -> Any:
    """Two float32 -> one uint32 of two bf16, round to nearest even; the form that attention kernels use most."""

    def rounded(bits: Any) -> Any:
        result = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
        nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        return np.where(nan, np.uint32(0x7FFF0000), result) if nan.any() else result

    h, lo = rounded(np.asarray(high).view(np.uint32)), rounded(np.asarray(low).view(np.uint32))
    return (h & np.uint32(0xFFFF0000)) | (lo >> np.uint32(16))


def f32_to_f16(x: Any, rounding: str = "rn") -> Any:
    """float32 or float64 -> float16. rounding: "rn" or "rz"."""
    nearest = np.asarray(x).astype(np.float16)
    if rounding == "rz":
        bits = nearest.view(np.uint16)
        beyond = (np.abs(nearest.astype(np.float64)) > np.abs(x)) & ~np.isnan(x)
        nearest = np.where(beyond, bits - np.uint16(1), bits).astype(np.uint16).view(np.float16)
    bits = nearest.view(np.uint16)
    return np.where(np.isnan(nearest), np.uint16(0x7FFF), bits).astype(np.uint16).view(np.float16)


@dataclass(frozen=True)
class NarrowFloat:
    """A float of at most 8 bits with the sign on top: field widths, exponent bias, the largest finite number's code.

    infinity: its code, or None. nan: the canonical one's code; a format without NaN encodes it as the largest number.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest: int
    infinity: int | None
    nan: int

    @property
    def sign(self) -> int:
        return 1 << (self.exponent_bits + self.mantissa_bits)

    def values(self) -> Array:
        """float32 value of the 256 codes; bits above the sign do not count."""
        code = np.arange(256)
        magnitude = code & self.sign - 1
        exponent = magnitude >> self.mantissa_bits
        mantissa = (magnitude & (1 << self.mantissa_bits) - 1) / (1 << self.mantissa_bits)
        subnormal = mantissa * 2.0 ** (1 - self.bias)
        value = np.where(exponent == 0, subnormal, (1 + mantissa) * 2.0 ** (exponent - float(self.bias)))
        value = np.where(magnitude > self.largest, np.nan, value)
        if self.infinity is not None:
            value = np.where(magnitude == self.infinity, np.inf, value)
        return np.where(code & self.sign, -value, value).astype(np.float32)

    def nearest(self, x: Array) -> Array:
        """float64 -> uint8 codes, ties to even; what is beyond the range becomes the largest number."""
        largest = float(self.values()[self.largest])
        magnitude = np.where(np.isnan(x), 0.0, np.minimum(np.abs(x), largest))
        _, exponent = np.frexp(np.maximum(magnitude, 2.0**-100))  # zero has no exponent of its own
        # A value in [2^(e-1), 2^e) has steps of 2^(e-1-mantissa_bits); below the smallest normal the step is constant.
        step_exponent = np.maximum(exponent - 1, 1 - self.bias) - self.mantissa_bits
        steps = np.rint(np.ldexp(magnitude, -step_exponent)).astype(np.int64)
        # `steps` counts from zero within the binade: a carry into the next binade adds up to the right code by itself.
        code = ((step_exponent + self.mantissa_bits + self.bias - 1) << self.mantissa_bits) + steps
        code = np.where(np.signbit(x), code | self.sign, code)
        return np.where(np.isnan(x), self.nan, code).astype(np.uint8)


NARROW_FLOATS = {
    "e4m3": NarrowFloat(4, 3, 7, largest=0x7E, infinity=None, nan=0x7F),
    "e5m2": NarrowFloat(5, 2, 15, largest=0x7B, infinity=0x7C, nan=0x7F),
    "e3m2": NarrowFloat(3, 2, 3, largest=0x1F, infinity=None, nan=0x1F),
    "e2m3": NarrowFloat(2, 3, 1, largest=0x1F, infinity=None, nan=0x1F),
    "e2m1": NarrowFloat(2, 1, 1, largest=0x07, infinity=None, nan=0x07),
}
NARROW_VALUES = {name: narrow.values() for name, narrow in NARROW_FLOATS.items()}
"""float32 value of every code. Scales have no sign: "ue4m3" ignores the top bit, "ue8m0" is 2^(code - 127)."""
NARROW_VALUES["ue4m3"] = np.tile(NARROW_VALUES["e4m3"][:128], 2)
NARROW_VALUES["ue8m0"] = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)


def narrow_to_f32(codes: Any, kind: str) -> Any:
    """uint8 codes -> float32, exact."""
    return NARROW_VALUES[kind][codes]


def f32_to_narrow(x: Any, kind: str, rounding: str = "rn", *, finite: bool = True) -> Any:
    """float32 or float64 -> uint8 codes of a narrow float, or of "ue8m0" with rounding "rz" or "rp".

    Narrow floats are rounded to nearest even, and what is beyond the range becomes the largest number (satfinite).
    """
    bits = np.asarray(_as_f32(x)).view(np.uint32)
    # The upper half of the bits, rounded to odd, has more than the two extra bits that decide any rounding below.
    odd = (bits >> np.uint32(16)).astype(np.uint16) | ((bits & np.uint32(0xFFFF)) != 0)
    return _encoding(kind, rounding, finite).take(odd)


@cache
def _encoding(kind: str, rounding: str, finite: bool) -> Array:
    """The code of every bf16 bit pattern."""
    with np.errstate(invalid="ignore"):  # some of the patterns are signalling NaN
        x = bf16_to_f32(np.arange(2**16, dtype=np.uint16)).astype(np.float64)
        return _to_ue8m0(x, rounding, finite) if kind == "ue8m0" else NARROW_FLOATS[kind].nearest(x)


def _to_ue8m0(x: Array, rounding: str, finite: bool) -> Array:
    """The power of two below or above |x|: the sign is ignored, zero becomes 2^-127, NaN stays NaN (0xFF)."""
    mantissa, exponent = np.frexp(np.abs(x))  # |x| = mantissa * 2^exponent, mantissa in [0.5, 1)
    code = exponent + 126 + ((rounding == "rp") & (mantissa > 0.5))
    code = np.where(x == 0, 0, np.clip(code, 0, 254 if finite else 255))
    code = np.where(np.isinf(x), 254 if finite else 255, code)
    return np.where(np.isnan(x), 255, code).astype(np.uint8)


def round_f32(x: Any, rounding: str) -> Any:
    """float64 -> float32 in mode "rn", "rz", "rm" (down) or "rp" (up)."""
    x = np.asarray(x, np.float64)
    nearest = x.astype(np.float32)
    if rounding == "rn":
        return nearest
    back = nearest.astype(np.float64)
    if rounding == "rz":
        wrong = np.abs(back) > np.abs(x)
        toward = np.float32(0)
    else:
        wrong = back > x if rounding == "rm" else back < x
        toward = np.float32(-np.inf if rounding == "rm" else np.inf)
    return np.where(wrong, np.nextafter(nearest, toward), nearest).astype(np.float32)


def f32_to_tf32(x: Any, rounding: str = "rna") -> Any:
    """float32 -> tf32 bit patterns in uint32 (low 13 bits zero). rounding: "rna" (ties away), "rn" or "rz"."""
    bits = np.asarray(x).view(np.uint32)
    nan = np.isnan(x)
    if rounding == "rna":
        bits = bits + np.uint32(0x1000)
    elif rounding == "rn":
        bits = bits + (np.uint32(0x0FFF) + ((bits >> np.uint32(13)) & np.uint32(1)))
    bits = bits & np.uint32(0xFFFFE000)
    return np.where(nan, np.uint32(0x7FFFE000), bits).astype(np.uint32)


def float_to_int(x: Any, dtype: Any, mode: str) -> Any:
    """Floating -> integer dtype: rounds ("rni" "rzi" "rmi" "rpi"), saturates, NaN gives 0."""
    x = np.asarray(x, np.float64)
    rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x)
    info = np.iinfo(dtype)
    rounded = np.where(np.isnan(rounded), 0.0, rounded)
    # 2^63 and 2^64 are floats, the limits below them are not: compare, then convert only what fits.
    too_large, too_small = rounded >= float(info.max), rounded <= float(info.min)
    inside = np.where(too_large | too_small, 0.0, rounded).astype(dtype)
    return np.where(too_large, info.max, np.where(too_small, info.min, inside)).astype(dtype)
