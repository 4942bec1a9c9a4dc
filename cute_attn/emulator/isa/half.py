"""f16, f16x2, bf16 and bf16x2 arithmetic.

Computed in float32, or float64 for fma, and rounded once to the format. Sums and products of two 11-bit (8-bit) numbers
rounded to 24 and then 11 (8) bits are correctly rounded; so is fma through float64 except on ties that need more than
53 bits to see. ex2, tanh: the float32 function, rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..codegen import BlockBuilder
from ..formats import bf16_to_f32, f32_to_bf16
from ..module import Instruction
from ..registry import emits, helper, required_type
from ..wave import Group

_HALF = "f16 f16x2 bf16 bf16x2"
_MODIFIERS = "rn ftz sat relu NaN approx"


@emits("add", "sub", "mul", "fma", "min", "max", "abs", "neg", "ex2", "tanh", types=_HALF, modifiers=_MODIFIERS)
def arithmetic(b: BlockBuilder, i: Instruction) -> None:
    kind = required_type(i)
    element = "bf16" if kind.name.startswith("bf16") else "f16"
    values = ", ".join(b.read(o, kind.carrier) for o in i.operands[1:])
    flags = tuple(p for p in i.parts if p in ("ftz", "sat", "relu", "NaN"))
    b.write(i.operands[0], f"half_operation(G, {i.parts[0]!r}, {element!r}, {flags}, {values})", kind.carrier)


_BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.fmin,
    "max": np.fmax,
    "min.NaN": np.minimum,
    "max.NaN": np.maximum,
}


@helper
def half_operation(group: Group, name: str, element: str, flags: tuple[str, ...], *registers: Any) -> Any:
    """Applies an operation to every half in registers of 16 or 32 bits; returns registers of the same width."""
    carrier = registers[0].dtype
    bits = [group.spread(r).view(np.uint16) for r in registers]
    if name in ("abs", "neg"):
        mask = np.uint16(0x7FFF if name == "abs" else 0x8000)
        return (bits[0] & mask if name == "abs" else bits[0] ^ mask).view(carrier)
    decode = bf16_to_f32 if element == "bf16" else _f16_to_f32
    values = [decode(v) for v in bits]
    if name == "fma":
        result = values[0].astype(np.float64) * values[1] + values[2]
    elif name == "ex2":
        result = np.exp2(values[0])
    elif name == "tanh":
        result = np.tanh(values[0])
    else:
        result = _BINARY[f"{name}.NaN" if "NaN" in flags else name](*values)
    if "relu" in flags:
        # NaN results stay NaN: relu clamps only negative numbers.
        result = np.maximum(result, result.dtype.type(0))
    if "sat" in flags:
        result = np.fmin(np.fmax(result, result.dtype.type(0)), result.dtype.type(1))
    encoded = f32_to_bf16(result) if element == "bf16" else result.astype(np.float16).view(np.uint16)
    if "ftz" in flags:
        smallest = np.uint16(0x0080 if element == "bf16" else 0x0400)
        encoded = np.where((encoded & np.uint16(0x7FFF)) < smallest, encoded & np.uint16(0x8000), encoded)
    return np.ascontiguousarray(encoded).view(carrier)


def _f16_to_f32(bits: Any) -> Any:
    return bits.view(np.float16).astype(np.float32)
