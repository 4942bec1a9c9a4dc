"""Integer arithmetic, carry chains and dot products of small integers.

Registers are unsigned; a signed operation views them as signed, and wraps as the hardware does. Division by zero
gives all ones for div and the dividend for rem (the ISA leaves both open). Helpers take and return numpy arrays or
scalars of the register's dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..codegen import BlockBuilder
from ..errors import UnknownInstruction
from ..module import Instruction
from ..registry import emits, helper, required_type
from ..types import PtxType
from ..wave import Group

INTEGERS = "s8 u8 s16 u16 s32 u32 s64 u64"


BITS = "b8 b16 b32 b64"


def _wide(kind: PtxType) -> str:
    return f"{'int' if kind.kind == 's' else 'uint'}{2 * kind.bits}"


@emits("add", "sub", types=INTEGERS, modifiers="sat")
def add_sub(b: BlockBuilder, i: Instruction) -> None:
    kind = required_type(i)
    sign = "+" if i.parts[0] == "add" else "-"
    if "sat" in i.parts:
        if kind.name != "s32":
            raise UnknownInstruction(i.opcode)
        x, y = (b.read(o, "int32") for o in i.operands[1:3])
        b.write(i.operands[0], f"saturate_to({x}.astype(int64) {sign} {y}, int32)", "int32")
        return
    x, y = (b.read(o, kind.carrier) for o in i.operands[1:3])
    b.write(i.operands[0], f"{x} {sign} {y}", kind.carrier)


@emits("mul.lo", "mad.lo", types=INTEGERS, modifiers="")
def multiply_low(b: BlockBuilder, i: Instruction) -> None:
    kind = required_type(i)
    x, y = (b.read(o, kind.carrier) for o in i.operands[1:3])
    plus = f" + {b.read(i.operands[3], kind.carrier)}" if i.parts[0] == "mad" else ""
    b.write(i.operands[0], f"{x} * {y}{plus}", kind.carrier)


@emits("mul.wide", "mad.wide", types=INTEGERS, modifiers="")
def multiply_wide(b: BlockBuilder, i: Instruction) -> None:
    kind = required_type(i)
    x, y = (b.read(o, kind.numpy) for o in i.operands[1:3])
    wide = _wide(kind)
    plus = f" + {b.read(i.operands[3], wide)}" if i.parts[0] == "mad" else ""
    b.write(i.operands[0], f"{x}.astype({wide}) * {y}.astype({wide}){plus}", wide)


@emits("mul.hi", "mad.hi", types=INTEGERS, modifiers="")
def multiply_high(b: BlockBuilder, i: Instruction) -> None:
    kind = required_type(i)
    x, y = (b.read(o, kind.numpy) for o in i.operands[1:3])
    if kind.bits == 64:
        high = f"multiply_high_64({x}, {y})"
    else:
        wide = _wide(kind)
        high = f"(({x}.astype({wide}) * {y}.astype({wide})) >> {b.constant(kind.bits, wide)}).astype({kind.numpy})"
    plus = f" + {b.read(i.operands[3], kind.numpy)}" if i.parts[0] == "mad" else ""
    b.write(i.operands[0], high + plus, kind.numpy)


@emits("mul24", "mad24", types="s32 u32", modifiers="lo hi")
def multiply_24(b: BlockBuilder, i: Instruction) -> None:
    kind = required_type(i)
    eight = b.constant(8, kind.numpy)
    wide = _wide(kind)
    x, y = (f"(({b.read(o, kind.numpy)} << {eight}) >> {eight}).astype({wide})" for o in i.operands[1:3])
    shift = f" >> {b.constant(16, wide)}" if "hi" in i.parts else ""
    plus = f" + {b.read(i.operands[3], kind.numpy)}" if i.parts[0] == "mad24" else ""
    b.write(i.operands[0], f"(({x} * {y}){shift}).astype({kind.numpy}){plus}", kind.numpy)


@emits("div", "rem", types=INTEGERS, modifiers="")
def divide(b: BlockBuilder, i: Instruction) -> None:
    kind = required_type(i)
    x, y = (b.read(o, kind.numpy) for o in i.operands[1:3])
    b.write(i.operands[0], f"{'quotient' if i.parts[0] == 'div' else 'remainder'}({x}, {y})", kind.numpy)


@emits("min", "max", types=INTEGERS, modifiers="relu")
def min_max(b: BlockBuilder, i: Instruction) -> None:
    kind = required_type(i)
    x, y = (b.read(o, kind.numpy) for o in i.operands[1:3])
    result = f"{i.parts[0]}imum({x}, {y})"
    if "relu" in i.parts:
        result = f"maximum({result}, {b.constant(0, kind.numpy)})"
    b.write(i.operands[0], result, kind.numpy)


@emits("abs", "neg", types="s16 s32 s64", modifiers="")
def abs_neg(b: BlockBuilder, i: Instruction) -> None:
    kind = required_type(i)
    x = b.read(i.operands[1], kind.numpy)
    b.write(i.operands[0], f"abs({x})" if i.parts[0] == "abs" else f"-{x}", kind.numpy)


@emits("sad", types=INTEGERS, modifiers="")
def sum_of_absolute_difference(b: BlockBuilder, i: Instruction) -> None:
    kind = required_type(i)
    x, y, c = (b.read(o, kind.numpy) for o in i.operands[1:4])
    b.write(i.operands[0], f"{c} + (maximum({x}, {y}) - minimum({x}, {y}))", kind.numpy)


@emits("dp4a", "dp2a", types="s32.s32 s32.u32 u32.s32 u32.u32", modifiers="lo hi")
def dot_product(b: BlockBuilder, i: Instruction) -> None:
    """dp4a.atype.btype and dp2a.lo/hi.atype.btype: four (two) products of bytes (16-bit by byte) plus c."""
    high = "hi" in i.parts
    signs = [part.startswith("s") for part in i.parts[-2:]]
    x, y, c = (b.read(o, "uint32") for o in i.operands[1:4])
    b.write(i.operands[0], f"{i.parts[0]}({x}, {y}, {c}, {signs[0]}, {signs[1]}, {high})", "uint32")


@emits("add", types="u16x2 s16x2", modifiers="")
@emits("min", "max", types="u16x2 s16x2", modifiers="relu")
def packed_halves(b: BlockBuilder, i: Instruction) -> None:
    kind = required_type(i)
    if "relu" in i.parts and kind.name != "s16x2":
        raise UnknownInstruction(i.opcode)
    x, y = (b.read(o, "uint32") for o in i.operands[1:3])
    half = "int16" if kind.name == "s16x2" else "uint16"
    b.write(i.operands[0], f"packed_16(G, {i.parts[0]!r}, {half}, {'relu' in i.parts}, {x}, {y})", "uint32")


@emits("mad.lo.cc", "mad.hi.cc", "madc.lo", "madc.hi", types="u32 s32 u64 s64", modifiers="cc")
def multiply_add_carry(b: BlockBuilder, i: Instruction) -> None:
    """A half of the product plus c, with carry-out (.cc) and, for madc, carry-in."""
    kind = required_type(i)
    x, y = (b.read(o, kind.numpy) for o in i.operands[1:3])
    if "lo" in i.parts:
        half = f"{x} * {y}"
    elif kind.bits == 64:
        half = f"multiply_high_64({x}, {y})"
    else:
        wide = _wide(kind)
        half = f"(({x}.astype({wide}) * {y}.astype({wide})) >> {b.constant(32, wide)}).astype({kind.numpy})"
    _add_with_carry(b, i, b.assign(f"({half}).view({kind.carrier})"), i.operands[3], uses=i.parts[0] == "madc")


@emits("add.cc", "addc", "sub.cc", "subc", types=INTEGERS, modifiers="cc")
def carry_chain(b: BlockBuilder, i: Instruction) -> None:
    """The carry flag is a hidden one-bit register of the kernel."""
    dtype = required_type(i).carrier
    uses = i.parts[0] in ("addc", "subc")
    _add_with_carry(b, i, b.read(i.operands[1], dtype), i.operands[2], uses=uses)


def _add_with_carry(b: BlockBuilder, i: Instruction, x: str, operand: str, *, uses: bool) -> None:
    """x plus or minus the operand, and the carry flag if the instruction uses it; sets the flag if it says .cc."""
    dtype = required_type(i).carrier
    y = b.read(operand, dtype)
    carry = b.read(b.carry_register(), "bool") if uses else b.constant(False, "bool")
    name = "subtract_borrow" if i.parts[0].startswith("sub") else "add_carry"
    pair = b.assign(f"{name}({x}, {y}, {carry})")
    b.write(i.operands[0], f"{pair}[0]", dtype)
    if "cc" in i.parts:
        b.write(b.carry_register(), f"{pair}[1]", "bool")


@helper
def saturate_to(x: Any, dtype: Any) -> Any:
    info = np.iinfo(dtype)
    return np.clip(x, info.min, info.max).astype(dtype)


@helper
def multiply_high_64(x: Any, y: Any) -> Any:
    """High 64 bits of the 128-bit product, from 32-bit halves; signed by the usual correction."""
    mask, half = np.uint64(0xFFFF_FFFF), np.uint64(32)
    a, c = x.view(np.uint64), y.view(np.uint64)
    a0, a1, c0, c1 = a & mask, a >> half, c & mask, c >> half
    middle = a1 * c0 + ((a0 * c0) >> half)
    cross = a0 * c1 + (middle & mask)
    high = a1 * c1 + (middle >> half) + (cross >> half)
    if x.dtype.kind == "i":
        zero = np.uint64(0)
        high = high - np.where(x < 0, c, zero) - np.where(y < 0, a, zero)
        return high.view(np.int64)
    return high


@helper
def quotient(x: Any, y: Any) -> Any:
    if x.dtype.kind == "u":
        return np.where(y == 0, ~np.zeros_like(y), x // np.maximum(y, y.dtype.type(1)))
    unsigned = f"u{x.dtype.name}"
    ux, uy = abs(x).view(unsigned), abs(y).view(unsigned)
    q = (ux // np.maximum(uy, uy.dtype.type(1))).view(x.dtype)
    q = np.where((x < 0) != (y < 0), -q, q)
    return np.where(y == 0, ~np.zeros_like(x), q)


@helper
def remainder(x: Any, y: Any) -> Any:
    return np.where(y == 0, x, x - quotient(x, y) * y)


def _field(x: Any, position: int, bits: int, signed: bool) -> Any:
    up = np.uint32(32 - bits - position)
    raised = x << up
    down = 32 - bits
    return (raised.view(np.int32) >> np.int32(down)) if signed else (raised >> np.uint32(down)).view(np.int32)


@helper
def dp4a(x: Any, y: Any, c: Any, x_signed: bool, y_signed: bool, high: bool) -> Any:
    total = c.view(np.int32)
    for n in range(4):
        total = total + _field(x, 8 * n, 8, x_signed) * _field(y, 8 * n, 8, y_signed)
    return total.view(np.uint32)


@helper
def dp2a(x: Any, y: Any, c: Any, x_signed: bool, y_signed: bool, high: bool) -> Any:
    total = c.view(np.int32)
    for n in range(2):
        total = total + _field(x, 16 * n, 16, x_signed) * _field(y, 8 * n + 16 * high, 8, y_signed)
    return total.view(np.uint32)


@helper
def packed_16(group: Group, name: str, half: Any, relu: bool, x: Any, y: Any) -> Any:
    """add, min or max of both 16-bit halves of a register."""
    ufunc = {"add": np.add, "min": np.minimum, "max": np.maximum}[name]
    result = ufunc(group.spread(x).view(half), group.spread(y).view(half))
    return (np.maximum(result, half(0)) if relu else result).view(np.uint32)


@helper
def add_carry(x: Any, y: Any, carry: Any) -> tuple[Any, Any]:
    partial = x + y
    total = partial + carry.astype(x.dtype)
    return total, (partial < x) | (total < partial)


@helper
def subtract_borrow(x: Any, y: Any, borrow: Any) -> tuple[Any, Any]:
    partial = x - y
    total = partial - borrow.astype(x.dtype)
    return total, (x < y) | (partial < total)
