"""Logic, shifts, bit fields, bit counting and byte permutation.

Shift amounts are unsigned and clamped at the width. Helpers take and return numpy arrays or scalars of the register's
dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..codegen import BlockBuilder
from ..errors import UnknownInstruction
from ..module import Instruction
from ..registry import emits, helper, required_type
from ..wave import Group
from .integer import BITS, INTEGERS


@emits("and", "or", "xor", types=f"{BITS} pred", modifiers="")
def logic(b: BlockBuilder, i: Instruction) -> None:
    dtype = required_type(i).carrier
    x, y = (b.predicate(o) if dtype == "bool" else b.read(o, dtype) for o in i.operands[1:3])
    b.write(i.operands[0], f"{x} {({'and': '&', 'or': '|', 'xor': '^'})[i.parts[0]]} {y}", dtype)


@emits("not", types=f"{BITS} pred", modifiers="")
def logical_not(b: BlockBuilder, i: Instruction) -> None:
    dtype = required_type(i).carrier
    b.write(i.operands[0], f"~{b.read(i.operands[1], dtype)}", dtype)


@emits("cnot", types=BITS, modifiers="")
def zero_test(b: BlockBuilder, i: Instruction) -> None:
    dtype = required_type(i).carrier
    b.write(i.operands[0], f"({b.read(i.operands[1], dtype)} == {b.constant(0, dtype)}).astype({dtype})", dtype)


@emits("lop3", types="b32", modifiers="or and xor")
def lop3(b: BlockBuilder, i: Instruction) -> None:
    """Any function of three bits; the table's bit (4a + 2b + c) is the result for those bits.

    lop3.op d|p, a, b, c, table, q: p is whether d has a bit set, op q; d may be `_`.
    """
    table = b.literal(i.operands[4])
    if table is None:
        raise UnknownInstruction(i.opcode)
    x, y, z = (b.read(o, "uint32") for o in i.operands[1:4])
    result = b.assign(_lut_expression(x, y, z, table))
    dest, _, predicate = (part.strip() for part in i.operands[0].partition("|"))
    if (i.parts[1] != "b32") != bool(predicate) or len(i.operands) != 5 + bool(predicate):
        raise UnknownInstruction(i.text)
    if predicate:
        sign = {"or": "|", "and": "&", "xor": "^"}[i.parts[1]]
        value = f"({result} != {b.constant(0, 'uint32')}) {sign} {b.predicate(i.operands[5])}"
        b.write(predicate, value, "bool")
    b.write(dest, result, "uint32")


def _lut_expression(x: str, y: str, z: str, table: int) -> str:
    known = {
        0x80: f"{x} & {y} & {z}",
        0xFE: f"{x} | {y} | {z}",
        0x96: f"{x} ^ {y} ^ {z}",
        0xEA: f"({x} & {y}) | {z}",
        0xF8: f"{x} | ({y} & {z})",
        0xCA: f"{z} ^ ({x} & ({y} ^ {z}))",
        0x6A: f"({x} & {y}) ^ {z}",
        0x78: f"{x} ^ ({y} & {z})",
    }
    if table in known:
        return known[table]
    terms = []
    for row in range(8):
        if table >> row & 1:
            bits = [name if row >> shift & 1 else f"~{name}" for name, shift in ((x, 2), (y, 1), (z, 0))]
            terms.append(f"({' & '.join(bits)})")
    return " | ".join(terms) if terms else f"{x} ^ {x}"


@emits("shl", "shr", types=f"{BITS} {INTEGERS}", modifiers="")
def shift(b: BlockBuilder, i: Instruction) -> None:
    """The amount is unsigned and clamped at the width: shl and unsigned shr give 0 there, signed shr the sign."""
    kind = required_type(i)
    left = i.parts[0] == "shl"
    dtype = kind.carrier if left else kind.numpy
    x = b.read(i.operands[1], dtype)
    amount = b.literal(i.operands[2])
    if amount is None:
        result = f"shift_{'left' if left else 'right'}({x}, {b.read(i.operands[2], 'uint32')})"
    else:
        amount &= 0xFFFF_FFFF
        if amount >= kind.bits and dtype.startswith("uint"):
            result = f"{x} ^ {x}"
        else:
            result = f"{x} {'<<' if left else '>>'} {b.constant(min(amount, kind.bits - 1), dtype)}"
    b.write(i.operands[0], result, dtype)


@emits("shf", types="b32", modifiers="l r wrap clamp")
def funnel_shift(b: BlockBuilder, i: Instruction) -> None:
    low, high, amount = (b.read(o, "uint32") for o in i.operands[1:4])
    b.write(i.operands[0], f"funnel_{i.parts[1]}({low}, {high}, {amount}, {'wrap' in i.parts})", "uint32")


@emits("bfe", types="u32 s32 u64 s64", modifiers="")
def extract_field(b: BlockBuilder, i: Instruction) -> None:
    kind = required_type(i)
    x = b.read(i.operands[1], kind.numpy)
    position, length = (b.read(o, "uint32") for o in i.operands[2:4])
    b.write(i.operands[0], f"bit_field_extract({x}, {position}, {length})", kind.numpy)


@emits("bfi", types="b32 b64", modifiers="")
def insert_field(b: BlockBuilder, i: Instruction) -> None:
    dtype = required_type(i).carrier
    field, base = (b.read(o, dtype) for o in i.operands[1:3])
    position, length = (b.read(o, "uint32") for o in i.operands[3:5])
    b.write(i.operands[0], f"bit_field_insert({field}, {base}, {position}, {length})", dtype)


@emits("clz", "popc", types="b32 b64", modifiers="")
def count_bits(b: BlockBuilder, i: Instruction) -> None:
    name = {"clz": "leading_zeros", "popc": "population_count"}[i.parts[0]]
    b.write(i.operands[0], f"{name}({b.read(i.operands[1], required_type(i).carrier)})", "uint32")


@emits("bfind", types="u32 s32 u64 s64", modifiers="shiftamt")
def find_leading(b: BlockBuilder, i: Instruction) -> None:
    x = b.read(i.operands[1], required_type(i).numpy)
    b.write(i.operands[0], f"leading_bit({x}, {'shiftamt' in i.parts})", "uint32")


@emits("brev", types="b32 b64", modifiers="")
def reverse(b: BlockBuilder, i: Instruction) -> None:
    dtype = required_type(i).carrier
    b.write(i.operands[0], f"reverse_bits({b.read(i.operands[1], dtype)})", dtype)


@emits("bmsk", types="b32", modifiers="clamp wrap")
def bit_mask(b: BlockBuilder, i: Instruction) -> None:
    """`b` ones from bit `a` up; both clamped at 32 or taken modulo 32."""
    start, width = (b.read(o, "uint32") for o in i.operands[1:3])
    b.write(i.operands[0], f"bits_between({start}, {width}, {'wrap' in i.parts})", "uint32")


@emits("fns", types="b32", modifiers="")
def find_nth_set(b: BlockBuilder, i: Instruction) -> None:
    mask, base = (b.read(o, "uint32") for o in i.operands[1:3])
    offset = b.read(i.operands[3], "int32")
    b.write(i.operands[0], f"nth_set_bit(G, {mask}, {base}, {offset})", "uint32")


@emits("szext", types="s32 u32", modifiers="wrap clamp")
def extend(b: BlockBuilder, i: Instruction) -> None:
    """Sign or zero extension from a given bit position; a position of 32 or more leaves the value (clamp) or wraps."""
    kind = required_type(i)
    x, length = b.read(i.operands[1], kind.numpy), b.read(i.operands[2], "uint32")
    if "wrap" in i.parts:
        length = f"({length} & {b.constant(31, 'uint32')})"
    else:
        length = f"minimum({length}, {b.constant(32, 'uint32')})"
    b.write(i.operands[0], f"bit_field_extract({x}, {b.constant(0, 'uint32')}, {length})", kind.numpy)


@emits("prmt", types="b32", modifiers="f4e b4e rc8 ecl ecr rc16")
def permute(b: BlockBuilder, i: Instruction) -> None:
    x, y = (b.read(o, "uint32") for o in i.operands[1:3])
    mode = i.parts[2] if len(i.parts) > 2 else ""
    selector = b.literal(i.operands[3])
    if selector is not None and not mode:
        b.write(i.operands[0], f"permute_bytes({x}, {y}, {selector & 0xFFFF})", "uint32")
    else:
        b.write(i.operands[0], f"permute_selected({x}, {y}, {b.read(i.operands[3], 'uint32')}, {mode!r})", "uint32")


@helper
def shift_left(x: Any, n: Any) -> Any:
    width = x.dtype.itemsize * 8
    return np.where(n < width, x << np.minimum(n, np.uint32(width - 1)).astype(x.dtype), x.dtype.type(0))


@helper
def shift_right(x: Any, n: Any) -> Any:
    width = x.dtype.itemsize * 8
    shifted = x >> np.minimum(n, np.uint32(width - 1)).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(n < width, shifted, x.dtype.type(0))


_POSITIONS = np.arange(32)


def _funnel_amount(n: Any, wrap: bool) -> Any:
    return (n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))).astype(np.uint64)


@helper
def funnel_l(low: Any, high: Any, n: Any, wrap: bool) -> Any:
    both = high.astype(np.uint64) << np.uint64(32) | low
    return ((both << _funnel_amount(n, wrap)) >> np.uint64(32)).astype(np.uint32)


@helper
def funnel_r(low: Any, high: Any, n: Any, wrap: bool) -> Any:
    both = high.astype(np.uint64) << np.uint64(32) | low
    return (both >> _funnel_amount(n, wrap)).astype(np.uint32)


@helper
def bit_field_extract(x: Any, position: Any, length: Any) -> Any:
    """Bits past the end of x read as its sign bit (signed) or zero; position and length count modulo 256."""
    width = np.uint32(x.dtype.itemsize * 8)
    position, length = position & np.uint32(255), length & np.uint32(255)
    field = shift_right(x, position)
    unused = np.where(length < width, width - length, np.uint32(0))
    field = shift_right(shift_left(field, unused), unused)
    return np.where(length == 0, x.dtype.type(0), field)


@helper
def bit_field_insert(field: Any, base: Any, position: Any, length: Any) -> Any:
    position, length = position & np.uint32(255), length & np.uint32(255)
    one = base.dtype.type(1)
    mask = shift_left(shift_left(one + (length ^ length).astype(base.dtype), length) - one, position)
    return (base & ~mask) | (shift_left(field, position) & mask)


@helper
def population_count(x: Any) -> Any:
    """Bits set, by adding neighbouring fields of 1, 2 and 4 bits and then all bytes with a product."""
    unit, width = x.dtype.type, x.dtype.itemsize * 8
    ones = (1 << width) - 1
    x = x - (x >> unit(1) & unit(ones // 3))
    x = (x & unit(ones // 5)) + (x >> unit(2) & unit(ones // 5))
    x = x + (x >> unit(4)) & unit(ones // 17)
    return (x * unit(ones // 255) >> unit(width - 8)).astype(np.uint32)


@helper
def leading_zeros(x: Any) -> Any:
    width = x.dtype.itemsize * 8
    for shift in (1, 2, 4, 8, 16, 32)[: width.bit_length() - 1]:
        x = x | x >> x.dtype.type(shift)
    return np.uint32(width) - population_count(x)


@helper
def leading_bit(x: Any, as_shift: bool) -> Any:
    """bfind: position of the most significant bit that differs from the sign; all ones if there is none."""
    width = x.dtype.itemsize * 8
    bits = np.where(x < 0, ~x, x).view(f"uint{width}") if x.dtype.kind == "i" else x
    zeros = leading_zeros(np.asarray(bits))
    found = zeros if as_shift else np.uint32(width - 1) - zeros
    return np.where(zeros == width, np.uint32(0xFFFF_FFFF), found)


@helper
def bits_between(start: Any, width: Any, wrap: bool) -> Any:
    start, width = (n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32)) for n in (start, width))
    one = np.uint64(1)
    return (((one << width.astype(np.uint64)) - one) << start.astype(np.uint64)).astype(np.uint32)


@helper
def nth_set_bit(group: Group, mask: Any, base: Any, offset: Any) -> Any:
    """fns: the |offset|-th set bit from `base` on, upwards or downwards; bit `base` itself for 0; else all ones."""
    base, offset = (group.spread(v).astype(np.int64)[:, None] for v in (base, offset))
    bits = (group.spread(mask)[:, None] >> _POSITIONS.astype(np.uint32)) & np.uint32(1) == 1
    distance = _POSITIONS - base
    bits &= np.where(offset > 0, distance >= 0, np.where(offset < 0, distance <= 0, distance == 0)) & (base < 32)
    from_below = bits.cumsum(1)
    number = np.where(offset < 0, from_below[:, -1:] - from_below + 1, from_below)
    chosen = bits & (number == np.maximum(np.abs(offset), 1))
    return np.where(chosen.any(1), chosen.argmax(1), 0xFFFF_FFFF).astype(np.uint32)


@helper
def reverse_bits(x: Any) -> Any:
    width = x.dtype.itemsize * 8
    unit = x.dtype.type
    masks = {1: 0x5555555555555555, 2: 0x3333333333333333, 4: 0x0F0F0F0F0F0F0F0F}
    for shift, mask in masks.items():
        m = unit(mask & (1 << width) - 1)
        x = (x & m) << unit(shift) | (x >> unit(shift)) & m
    return x.byteswap()


def _byte(x: Any, y: Any, number: Any) -> Any:
    """Byte 0..7 of the pair {x: 0..3, y: 4..7}."""
    return ((x if number < 4 else y) >> np.uint32(8 * (number & 3))) & np.uint32(0xFF)


@helper
def permute_bytes(x: Any, y: Any, selector: int) -> Any:
    """prmt without a mode and with a literal selector: nibble i picks byte i; its top bit asks for the sign."""
    result: Any = None
    for n in range(4):
        nibble = selector >> 4 * n & 15
        byte = _byte(x, y, nibble & 7)
        if nibble & 8:
            byte = (byte >> np.uint32(7)) * np.uint32(0xFF)
        byte = byte << np.uint32(8 * n)
        result = byte if result is None else result | byte
    return result


# prmt modes: for selector value 0..3, the bytes picked for result bytes 0..3 (PTX ISA, table of prmt modes).
_PERMUTE_MODES = {
    "f4e": [0x3210, 0x4321, 0x5432, 0x6543],
    "b4e": [0x5670, 0x6701, 0x7012, 0x0123],
    "rc8": [0x0000, 0x1111, 0x2222, 0x3333],
    "ecl": [0x3210, 0x3211, 0x3222, 0x3333],
    "ecr": [0x0000, 0x1110, 0x2210, 0x3210],
    "rc16": [0x1010, 0x3232, 0x1010, 0x3232],
}


@helper
def permute_selected(x: Any, y: Any, selector: Any, mode: str) -> Any:
    """prmt with a register selector, or with one of the named modes."""
    if mode:
        selector = np.array(_PERMUTE_MODES[mode], np.uint32)[(selector & np.uint32(3)).astype(np.int64)]
    both = y.astype(np.uint64) << np.uint64(32) | x
    result: Any = np.uint32(0)
    for n in range(4):
        nibble = (selector >> np.uint32(4 * n)) & np.uint32(15)
        byte = (both >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint32) & np.uint32(0xFF)
        byte = np.where(nibble & np.uint32(8), (byte >> np.uint32(7)) * np.uint32(0xFF), byte)
        result = result | byte << np.uint32(8 * n)
    return result
