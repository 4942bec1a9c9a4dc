"""Number formats that numpy lacks, and correctly rounded conversions between formats.

bf16, e4m3 and e5m2 values travel as their bit patterns (uint16, uint8). All encoders take float32 or float64 and round
once: an intermediate float32 is made by rounding to odd, which never causes double rounding for narrower formats.
Scalars are accepted wherever arrays are. NaN payloads are not modelled: every NaN becomes the format's canonical one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

CANONICAL_NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "e4m3": 0x7F, "e5m2": 0x7F}


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


def _fp8_table(exponent_bits: int, mantissa_bits: int, bias: int, *, ieee: bool) -> np.ndarray[Any, Any]:
    """float32 value of all 256 codes. ieee: the top exponent holds infinity and NaN (e5m2), else only 0x7F is NaN."""
    code = np.arange(256)
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = (code & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    value = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - float(bias)))
    top = (1 << exponent_bits) - 1
    if ieee:
        value = np.where(exponent == top, np.where(mantissa == 0, np.inf, np.nan), value)
    else:
        value = np.where((code & 0x7F) == 0x7F, np.nan, value)
    return np.where(code < 128, value, -value).astype(np.float32)


FP8_VALUES = {"e4m3": _fp8_table(4, 3, 7, ieee=False), "e5m2": _fp8_table(5, 2, 15, ieee=True)}
_MANTISSA_BITS = {"e4m3": 3, "e5m2": 2}
_BIAS = {"e4m3": 7, "e5m2": 15}
_LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


def fp8_to_f32(bits: Any, kind: str) -> Any:
    """uint8 codes -> float32, exact. kind: "e4m3" (no infinity) or "e5m2"."""
    return FP8_VALUES[kind][bits]


def f32_to_fp8(x: Any, kind: str) -> Any:
    """float32 or float64 -> uint8 codes, round to nearest even, values beyond the range become the largest (satfinite).

    Infinity saturates too; NaN stays NaN.
    """
    exact = np.asarray(x).astype(np.float64)
    mantissa_bits, bias, largest = _MANTISSA_BITS[kind], _BIAS[kind], _LARGEST[kind]
    magnitude = np.minimum(np.abs(exact), largest)
    nan = np.isnan(exact)
    magnitude = np.where(nan, 0.0, magnitude)
    _, exponent = np.frexp(np.maximum(magnitude, 2.0**-100))  # zero has no exponent of its own
    # A value in [2^(e-1), 2^e) has steps of 2^(e-1-mantissa_bits); below the smallest normal the step is constant.
    step_exponent = np.maximum(exponent - 1, 1 - bias) - mantissa_bits
    steps = np.rint(np.ldexp(magnitude, -step_exponent)).astype(np.int64)
    # `steps` counts from zero within the binade: a carry into the next binade adds up to the right code by itself.
    code = ((step_exponent + mantissa_bits + bias - 1) << mantissa_bits) + steps
    code = np.where(nan, CANONICAL_NAN[kind], code)
    sign = np.where(np.signbit(exact) & ~nan, 128, 0)
    return (code | sign).astype(np.uint8)


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
