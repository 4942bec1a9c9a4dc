"""Packed matrix elements -> float32, exact: s4 to u8, and floats of 4 to 19 bits.

Where elements share a register the lower bits come first. In registers of 8-bit elements a 6-bit float takes the lower
six bits, and e2m1 the four in the middle (PTX ISA, "mma", on .kind::f8f6f4).
"""

from __future__ import annotations

import numpy as np

from ..formats import NARROW_VALUES
from ..memory import Array

_CODES = np.arange(256)


def _pairs(values: Array) -> Array:
    """float32 values of the 16 codes -> the two values of every byte, as one complex64."""
    return np.stack([values[_CODES & 15], values[_CODES >> 4]], axis=1).astype(np.float32).view(np.complex64)[:, 0]


_PAIRS = {
    "s4": _pairs(np.concatenate([np.arange(8), np.arange(-8, 0)])),
    "u4": _pairs(np.arange(16)),
    "e2m1": _pairs(NARROW_VALUES["e2m1"][:16]),
}
_BYTES = {name: NARROW_VALUES[name] for name in ("e4m3", "e5m2", "e3m2", "e2m3")}
_BYTES["e2m1"] = NARROW_VALUES["e2m1"][_CODES >> 2]


def decode(raw: Array, element: str, bits: int, *, in_order: bool) -> Array:
    """complex128 [..., m] of packed elements, `bits` each -> float32 [..., elements].

    Without `in_order`, 16-bit elements are left in an order that is quicker to make and the same for A and B.
    """
    if bits == 4:
        return _PAIRS[element].take(raw.view(np.uint8)).view(np.float32)
    if element in ("s8", "u8"):
        return raw.view(np.int8 if element == "s8" else np.uint8).astype(np.float32)
    if bits == 8:
        return _BYTES[element].take(raw.view(np.uint8))
    words = raw.view(np.uint32)
    if element == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)
    values = _f16_pairs(words) if element == "f16" else _upper_and_lower(words).view(np.float32)
    if in_order:
        return np.ascontiguousarray(values.reshape(*words.shape[:-1], 2, -1).swapaxes(-1, -2)).reshape(values.shape)
    return values


def _upper_and_lower(words: Array) -> Array:
    """uint32 words -> twice as many: the lower halves moved to the top, then the upper halves."""
    half = words.shape[-1]
    bits = np.empty((*words.shape[:-1], 2 * half), np.uint32)
    np.left_shift(words, np.uint32(16), out=bits[..., :half])
    np.bitwise_and(words, np.uint32(0xFFFF0000), out=bits[..., half:])
    return bits


_F16_SCALE = np.float32(2.0**112)


def _f16_pairs(words: Array) -> Array:
    """f16 pairs -> float32: exponent and mantissa moved into place, the exponent's bias put right by a product.

    Three times as fast as numpy's conversion; infinity and NaN, which come out as 2^16 and above, are redone.
    """
    bits = _upper_and_lower(words)
    signs = bits & np.uint32(0x80000000)
    np.bitwise_and(bits, np.uint32(0x7FFFFFFF), out=bits)
    np.right_shift(bits, np.uint32(3), out=bits)
    special = bits >= np.uint32(0x0F800000)
    values = bits.view(np.float32)
    np.multiply(values, _F16_SCALE, out=values)
    if special.any():
        bits[special] = (bits[special] & np.uint32(0x007FFFFF)) | np.uint32(0x7F800000)
    np.bitwise_or(bits, signs, out=bits)
    return values
