"""The forms of mma.sync: element types, k, accumulators, and the scales of the block-scaled kinds.

Shapes and types are those of the PTX ISA, "Multiply-and-Accumulate Instruction: mma", for m16n8; m8n8 forms, f64 and
single bits are not implemented.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import UnknownInstruction

_F8F6F4 = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1")
_LARGEST = {"s8": 128, "u8": 255, "s4": 8, "u4": 15}


@dataclass(frozen=True)
class _Form:
    """Element types that may be mixed, bits that each takes in a register, k, accumulators, and (scale, how many)."""

    elements: tuple[str, ...]
    bits: int
    ks: tuple[int, ...]
    accumulators: tuple[str, ...]
    scales: tuple[tuple[str | None, int], ...] = ((None, 0),)


_FORMS = {
    None: (
        _Form(("f16",), 16, (8, 16), ("f32", "f16")),
        _Form(("bf16",), 16, (8, 16), ("f32",)),
        _Form(("tf32",), 32, (4, 8), ("f32",)),
        _Form(("e4m3", "e5m2"), 8, (16, 32), ("f32", "f16")),
        _Form(("s8", "u8"), 8, (16, 32), ("s32",)),
        _Form(("s4", "u4"), 4, (32, 64), ("s32",)),
    ),
    "f8f6f4": (_Form(_F8F6F4, 8, (32,), ("f32", "f16")),),
    "mxf8f6f4": (_Form(_F8F6F4, 8, (32,), ("f32",), (("ue8m0", 1),)),),
    "mxf4": (_Form(("e2m1",), 4, (64,), ("f32",), (("ue8m0", 2),)),),
    "mxf4nvf4": (_Form(("e2m1",), 4, (64,), ("f32",), (("ue8m0", 2), ("ue8m0", 4), ("ue4m3", 4))),),
}
_DEFAULT_SCALES = {"mxf8f6f4": 1, "mxf4": 2}


def longest_chain(accumulator: str, k: int, a: str, b: str) -> int:
    """How many instructions' products may be summed in float32 before the accumulator is added, by their types.

    f16 accumulators are rounded after each; sums of integers stay exact in float32 below 2^24.
    """
    if accumulator == "f16":
        return 1
    if accumulator == "s32":
        return (2**24 - 1) // (k * _LARGEST[a] * _LARGEST[b])
    return 1 << 10


@dataclass(frozen=True)
class MmaKind:
    """Element types of A, B, the accumulator ("f32", "f16", "s32"), k, and .satfinite.

    bits: of an element in a register; 4- and 6-bit floats have 8 unless all elements have 4. scale, scales: element
    type of the block scales, and how many each row of A and column of B has; None and 0 without.
    """

    a: str
    b: str
    accumulator: str
    k: int
    bits: int
    saturate: bool = False
    scale: str | None = None
    scales: int = 0

    @property
    def registers(self) -> int:
        """Registers of B's elements; A has twice as many."""
        return self.k * self.bits // 128

    @property
    def carrier(self) -> str:
        """The dtype in which accumulator registers are read and written."""
        return {"f32": "float32", "s32": "int32", "f16": "uint32"}[self.accumulator]

    @property
    def longest_chain(self) -> int:
        """How many mma may be summed before the accumulator is added, without changing what the result means."""
        return 1 if self.saturate else longest_chain(self.accumulator, self.k, self.a, self.b)


def parse(opcode: str) -> MmaKind:
    """The kind of an mma.sync.aligned; raises UnknownInstruction for what is not implemented."""
    qualifiers = opcode.split(".")[3:]

    def take(pattern: str) -> str | None:
        """Removes the qualifier that matches and returns what the group in the pattern holds."""
        for qualifier in qualifiers:
            if (match := re.fullmatch(pattern, qualifier)) is not None:
                qualifiers.remove(qualifier)
                return match[1]
        return None

    k = int(take(r"m16n8k(\d+)") or 0)
    kind = take(r"kind::(\w+)")
    scaled = take("(block_scale)") is not None
    scales = int(take(r"scale_vec::(\d)X") or (_DEFAULT_SCALES.get(str(kind), 0) if scaled else 0))
    saturate = take("(satfinite)") is not None
    if qualifiers[:2] != ["row", "col"] or len(qualifiers) != (7 if scaled else 6):
        raise UnknownInstruction(opcode)
    d, a, b, c = qualifiers[2:6]
    scale = qualifiers[6] if scaled else None
    for form in _FORMS.get(kind, ()):
        types = {a, b} <= set(form.elements) and d == c and d in form.accumulators
        if types and k in form.ks and (scale, scales) in form.scales and (d == "s32" or not saturate):
            return MmaKind(a, b, d, k, form.bits, saturate, scale, scales)
    raise UnknownInstruction(opcode)
