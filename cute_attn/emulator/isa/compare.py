"""setp, set, selp, slct.

Comparisons of floats: eq ne lt le gt ge are false if an operand is NaN, the u-forms (equ neu ltu leu gtu geu) true;
num and nan ask whether both are numbers. Integer forms lo ls hi hs are the unsigned lt le gt ge.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..codegen import BlockBuilder
from ..errors import UnknownInstruction
from ..formats import bf16_to_f32
from ..module import Instruction
from ..registry import emits, helper, instruction_type, required_type
from ..types import PtxType, ptx_type
from ..wave import Group

_SYMBOLS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="
}  # fmt: skip
_OPPOSITE = {"equ": "!=", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
_COMPARISONS = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz"
_COMBINE = {"and": "&", "or": "|", "xor": "^"}


def _compare(name: str, x: str, y: str, floating: bool) -> str:
    if name == "num":
        return f"(({x} == {x}) & ({y} == {y}))"
    if name == "nan":
        return f"(({x} != {x}) | ({y} != {y}))"
    if floating and name == "ne":
        # Unlike numpy's, it is false if an operand is NaN.
        return f"(({x} < {y}) | ({x} > {y}))"
    if floating and name == "neu":
        return f"({x} != {y})"
    if name in _OPPOSITE:
        unordered = f" | ({x} != {x}) | ({y} != {y})"
        return f"(({x} == {y}){unordered})" if name == "equ" else f"~({x} {_OPPOSITE[name]} {y})"
    if name not in _SYMBOLS:
        raise UnknownInstruction(name)
    return f"({x} {_SYMBOLS[name]} {y})"


def _sources(b: BlockBuilder, i: Instruction, kind: PtxType, operands: tuple[str, ...]) -> list[str]:
    if kind.name == "bf16":
        values = [f"widen_bf16({b.read(o, 'uint16')})" for o in operands]
    elif kind.name == "f16":
        values = [f"{b.read(o, 'float16')}.astype(float32)" for o in operands]
    else:
        values = [b.read(o, kind.numpy) for o in operands]
        if "ftz" in i.parts:
            values = [f"flush({v})" for v in values]
    return [b.assign(v) for v in values]


def _combine(b: BlockBuilder, i: Instruction, result: str, operand_index: int) -> str:
    boolean = next((p for p in i.parts if p in _COMBINE), None)
    if boolean is None or len(i.operands) <= operand_index:
        return result
    return f"{result} {_COMBINE[boolean]} {b.predicate(i.operands[operand_index])}"


@emits("setp", modifiers=_COMPARISONS)
def setp(b: BlockBuilder, i: Instruction) -> None:
    kind = required_type(i)
    if kind.name in ("f16x2", "bf16x2"):
        _setp_packed(b, i, kind)
        return
    x, y = _sources(b, i, kind, i.operands[1:3])
    result = b.assign(_compare(i.parts[1], x, y, kind.kind in ("f", "bf16")))
    first, _, second = (part.strip() for part in i.operands[0].partition("|"))
    # Both before either is written: the combined predicate may be one of the two.
    values = [b.assign(_combine(b, i, value, 3)) for value in (result, f"~{result}")]
    b.write(first, values[0], "bool")
    if second:
        b.write(second, values[1], "bool")


def _setp_packed(b: BlockBuilder, i: Instruction, kind: PtxType) -> None:
    """p compares the low halves, q the high ones."""
    x, y = (b.assign(f"half_lanes(G, {b.read(o, 'uint32')}, {kind.name!r})") for o in i.operands[1:3])
    result = b.assign(_compare(i.parts[1], x, y, True))
    dests = [part.strip() for part in i.operands[0].split("|")]
    values = [b.assign(_combine(b, i, f"{result}[{n}::2]", 3)) for n in range(len(dests))]
    for dest, value in zip(dests, values, strict=True):
        b.write(dest, value, "bool")


@emits("set", modifiers=_COMPARISONS)
def set_value(b: BlockBuilder, i: Instruction) -> None:
    """set.cmp.dtype.stype: 1.0 for f32, all ones for an integer, else zero."""
    kinds = [k for p in i.parts[1:] if (k := ptx_type(p)) is not None and k.name != "pred"]
    if len(kinds) == 2 and kinds[1].name in _HALF_TRUE and len(i.operands) == 3:
        _set_packed(b, i, *kinds)
        return
    if len(kinds) != 2 or kinds[0].kind == "bf16" or any(k.name.endswith("x2") for k in kinds):
        raise UnknownInstruction(i.opcode)
    dest, source = kinds
    x, y = _sources(b, i, source, i.operands[1:3])
    result = _combine(b, i, _compare(i.parts[1], x, y, source.kind in ("f", "bf16")), 3)
    true = b.constant(1.0, dest.numpy) if dest.kind == "f" else b.constant(-1, dest.carrier)
    dtype = dest.numpy if dest.kind == "f" else dest.carrier
    b.write(i.operands[0], f"where({result}, {true}, {b.constant(0, dtype)})", dtype)


_HALF_TRUE = {"f16x2": 0x3C00, "bf16x2": 0x3F80}


def _set_packed(b: BlockBuilder, i: Instruction, dest: PtxType, source: PtxType) -> None:
    """Both halves for themselves: 1.0 where the result has the operands' type, 0xFFFF where it is an integer."""
    if dest.name not in (source.name, "u32", "s32"):
        raise UnknownInstruction(i.opcode)
    x, y = (b.assign(f"half_lanes(G, {b.read(o, 'uint32')}, {source.name!r})") for o in i.operands[1:3])
    true = b.constant(_HALF_TRUE[source.name] if dest.name == source.name else 0xFFFF, "uint16")
    halves = f"where({_compare(i.parts[1], x, y, True)}, {true}, {b.constant(0, 'uint16')})"
    b.write(i.operands[0], f"({halves}).view(uint32)", "uint32")


@emits("selp", types="b16 b32 b64 u16 u32 u64 s16 s32 s64 f32 f64", modifiers="")
def selp(b: BlockBuilder, i: Instruction) -> None:
    kind = instruction_type(i.opcode)
    assert kind is not None
    x, y = (b.read(o, kind.numpy) for o in i.operands[1:3])
    b.write(i.operands[0], f"where({b.predicate(i.operands[3])}, {x}, {y})", kind.numpy)


@emits("slct", modifiers="ftz")
def slct(b: BlockBuilder, i: Instruction) -> None:
    """slct.dtype.s32/f32: a where c >= 0, else b; a NaN selects b."""
    kinds = [k for p in i.parts[1:] if (k := ptx_type(p)) is not None]
    if len(kinds) != 2:
        raise UnknownInstruction(i.opcode)
    dest, test = kinds
    x, y = (b.read(o, dest.numpy) for o in i.operands[1:3])
    (c,) = _sources(b, i, test, i.operands[3:4])
    b.write(i.operands[0], f"where({c} >= {b.constant(0, test.numpy)}, {x}, {y})", dest.numpy)


@helper
def widen_bf16(x: Any) -> Any:
    return bf16_to_f32(x)


@helper
def half_lanes(group: Group, x: Any, kind: str) -> Any:
    bits = group.spread(x).view(np.uint16)
    return bf16_to_f32(bits) if kind == "bf16x2" else bits.view(np.float16).astype(np.float32)
