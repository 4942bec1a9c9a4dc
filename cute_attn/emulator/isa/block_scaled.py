"""The scales of block-scaled mma.sync: which byte of which lane belongs to which row and block of k.

PTX ISA, "Block Scaling for mma.sync" (g = lane / 4): of the four lanes of a row, thread-id-a 0 or 1 selects the first
or second two, and of these the even one holds the scales of row g of A, the odd one those of row g + 8. thread-id-b
0 to 3 selects the lane with the scales of column g of B. A lane's register has four bytes: with one scale to a row
byte-id selects any of them, with two the lower (0) or upper (2) half, with four it is 0. Scale n is for the n-th part
of k.

An element's product with its scale is exact in float32 as long as the scale is not extreme; for a ue8m0 beyond 2^±40
the product of the matrices is done in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..codegen import BlockBuilder
from ..errors import InvalidOperand, UnknownInstruction
from ..formats import NARROW_VALUES
from ..memory import Array
from ..module import Instruction
from ..wave import Group
from .matrix_kind import MmaKind

_MODERATE = 2.0**40


def scale_operands(b: BlockBuilder, i: Instruction) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of (scales, byte-id, thread-id) of A and of B, the operands after C."""
    if len(i.operands) != 8:
        raise UnknownInstruction(i.opcode)
    names = []
    for data, selectors in (i.operands[4:6], i.operands[6:8]):
        (register,), (byte_id, thread_id) = b.vector(data), b.vector(selectors)
        names.append((b.read(register, "uint32"), _selector(b, byte_id), _selector(b, thread_id)))
    return names[0], names[1]


def _selector(b: BlockBuilder, operand: str) -> str:
    """The name of a selector: of the constant itself where a register was only just given one.

    So instructions whose selectors are equal name the same values, and can be told to share an operand.
    """
    name = b.read(operand, "uint16")
    for operation in reversed(b.code.operations):
        if operation.writes == (name,):
            constant = operation.code.removeprefix(f"{name} = ")
            return constant if constant in b.constants else name
    return name


def _selectors(group: Group, value: Any, allowed: tuple[int, ...], what: str, index: int) -> Array:
    """[warps, 1] or [1, 1]: a selector per warp; it must be the same in all lanes of a warp, and one of `allowed`."""
    table = np.reshape(value, (-1, 32) if value.ndim else (1, 1)).astype(np.int64)
    wrong = (table != table[:, :1]) | ~np.isin(table, allowed)
    if wrong.any():
        lane = int(np.argmax(wrong))
        rule = f"it must be one of {', '.join(map(str, allowed))}, and the same in a warp"
        group.fail(InvalidOperand, index, lane, f"{what} is {int(table.flat[lane])}: {rule}")
    return table[:, :1]


def scales_of(group: Group, kind: MmaKind, side: str, operands: tuple[Any, ...], index: int) -> Array:
    """uint8 [warps, 16 rows of A or 8 columns of B, scales] of operands (scales, byte-id, thread-id)."""
    data, byte_id, thread_id = operands
    bytes_allowed = {1: (0, 1, 2, 3), 2: (0, 2), 4: (0,)}[kind.scales]
    first = _selectors(group, byte_id, bytes_allowed, f"byte-id-{side}", index)
    lane_of_quad = _selectors(group, thread_id, (0, 1) if side == "a" else (0, 1, 2, 3), f"thread-id-{side}", index)
    rows = np.arange(16 if side == "a" else 8)
    lanes = 4 * (rows % 8) + (2 * lane_of_quad + rows // 8 if side == "a" else lane_of_quad)
    warps = group.size // 32
    words = group.spread(data).reshape(warps, 32)[np.arange(warps)[:, None], lanes]
    chosen = words.view(np.uint8).reshape(warps, rows.size, 4)
    if kind.scales == 4:
        return chosen
    columns = (first + np.arange(kind.scales))[:, None]
    return np.take_along_axis(chosen, np.broadcast_to(columns, (warps, 1, kind.scales)), axis=2)


def scale_values(codes: Array, kind: MmaKind) -> Array:
    """float32."""
    assert kind.scale is not None
    return NARROW_VALUES[kind.scale].take(codes)


def scaled(values: Array, scales: Array) -> Array:
    """[..., k] elements times their blocks' [..., scales]; float64 if float32 might not hold a product of two."""
    if not ((scales <= _MODERATE) & (scales >= 1 / _MODERATE) | (scales == 0)).all():
        values, scales = values.astype(np.float64), scales.astype(np.float64)
    blocks = values.reshape(*scales.shape, -1) * scales[..., None]
    return blocks.reshape(values.shape)
