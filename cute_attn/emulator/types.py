"""PTX scalar types and the numpy dtypes that carry them.

A register holds bits; `carrier` is the unsigned dtype of those bits, `numpy` the dtype in which arithmetic of that
type is done. bf16 has no numpy dtype: it is carried as uint16 and computed in float32 (see `formats`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

# Types whose arithmetic dtype is not spelled by their kind and width.
_PACKED = {
    "pred": ("pred", 1, "bool"),
    "f16x2": ("f16x2", 32, "uint32"),
    "bf16": ("bf16", 16, "uint16"),
    "bf16x2": ("bf16x2", 32, "uint32"),
    "f32x2": ("f32x2", 64, "uint64"),
    "tf32": ("tf32", 32, "uint32"),
    "e4m3": ("e4m3", 8, "uint8"),
    "e5m2": ("e5m2", 8, "uint8"),
    "e4m3x2": ("e4m3x2", 16, "uint16"),
    "e5m2x2": ("e5m2x2", 16, "uint16"),
    "e2m1x2": ("e2m1x2", 8, "uint8"),
    "e2m3x2": ("e2m3x2", 16, "uint16"),
    "e3m2x2": ("e3m2x2", 16, "uint16"),
    "ue8m0x2": ("ue8m0x2", 16, "uint16"),
    "u16x2": ("u16x2", 32, "uint32"),
    "s16x2": ("s16x2", 32, "uint32"),
}


@dataclass(frozen=True)
class PtxType:
    """name as in PTX ("u32"), kind ("b" "u" "s" "f" or the packed type's own name), width in bits, numpy dtype name."""

    name: str
    kind: str
    bits: int
    numpy: str

    @property
    def carrier(self) -> str:
        return carrier_dtype(self.bits)

    @property
    def bytes(self) -> int:
        return max(self.bits, 8) // 8


@cache
def ptx_type(name: str) -> PtxType | None:
    """The type called `name` (without the dot), or None."""
    if name in _PACKED:
        kind, bits, dtype = _PACKED[name]
        return PtxType(name, kind, bits, dtype)
    if name == "b128":
        return PtxType(name, "b", 128, carrier_dtype(128))
    match = re.fullmatch(r"([busf])(8|16|32|64)", name)
    if match is None or name == "f8":
        return None
    kind, bits = match[1], int(match[2])
    return PtxType(name, kind, bits, {"b": "uint", "u": "uint", "s": "int", "f": "float"}[kind] + str(bits))


def carrier_dtype(bits: int) -> str:
    """Name of the unsigned numpy dtype (bool for one bit) that holds a register of that width.

    128 bits have none: complex128, whose bits are only ever copied.
    """
    if bits == 128:
        return "complex128"
    return "bool" if bits == 1 else f"uint{max(bits, 8)}"


def item_bits(dtype: str) -> int:
    """Width in bits of a numpy dtype name as used here; 1 for bool."""
    return 1 if dtype == "bool" else np.dtype(dtype).itemsize * 8
