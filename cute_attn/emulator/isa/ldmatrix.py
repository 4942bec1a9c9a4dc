"""ldmatrix, stmatrix and movmatrix of 8x8 matrices of 16-bit elements.

A matrix row is 16 bytes, held by four lanes: lane 4r + c holds elements 2c and 2c + 1 of row r. So eight rows in memory
order are the register of a warp, and .trans exchanges rows and columns of the 16-bit elements first.
Lane 8j + r gives the address of row r of matrix j.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..access import require_written, shared_elements
from ..codegen import BlockBuilder
from ..errors import UnknownInstruction
from ..memory import Array
from ..module import Instruction
from ..registry import emits, helper
from ..wave import Group
from .load_store import address_expression

_COUNTS = {"x1": 1, "x2": 2, "x4": 4}


def _count(i: Instruction) -> int:
    count = next((_COUNTS[p] for p in i.parts if p in _COUNTS), None)
    if count is None or "m8n8" not in i.parts or i.parts[-1] != "b16" or i.guard is not None:
        raise UnknownInstruction(i.opcode)
    return count


@emits("ldmatrix.sync.aligned.m8n8")
def ldmatrix(b: BlockBuilder, i: Instruction) -> None:
    address = address_expression(b, i.operands[1], "uint32")
    values = b.checked(f"matrix_load(G, {address}, {_count(i)}, {'trans' in i.parts}, {i.index})")
    for n, dest in enumerate(b.vector(i.operands[0])):
        b.write(dest, f"{values}[{n}]", "uint32")


@emits("stmatrix.sync.aligned.m8n8")
def stmatrix(b: BlockBuilder, i: Instruction) -> None:
    count = _count(i)
    address = address_expression(b, i.operands[0], "uint32")
    values = ", ".join(b.read(o, "uint32") for o in b.vector(i.operands[1]))
    b.effect(f"matrix_store(G, {address}, {count}, {'trans' in i.parts}, ({values},), {i.index})")


@emits("movmatrix.sync.aligned.m8n8.trans.b16")
def movmatrix(b: BlockBuilder, i: Instruction) -> None:
    value = b.read(i.operands[1], "uint32")
    b.write(i.operands[0], f"matrix_transpose(G, {value}, {i.index})", "uint32")


def _row_elements(group: Group, address: Any, count: int, index: int, verb: str) -> tuple[Array, int, int, Array]:
    """Element indices of 16-byte rows, [count * warps * 8] matrix by matrix, and which lane named each."""
    warps = group.require_whole_warps(index)
    lanes = np.arange(group.size).reshape(warps, 32)[:, : 8 * count]
    lanes = np.ascontiguousarray(lanes.reshape(warps, count, 8).swapaxes(0, 1)).reshape(-1)
    rows = group.spread(address)[lanes]
    elements, low, high = shared_elements(group, rows, 16, lanes, index, verb)
    return elements, low, high, lanes


def _transposed(rows: Array) -> Array:
    """[matrices, 8 rows] of 16 bytes -> the same with rows and columns exchanged, as uint32 words."""
    halves = rows.view(np.uint16).reshape(-1, 8, 8)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).view(np.uint32)


@helper
def matrix_load(group: Group, address: Any, count: int, transposed: bool, index: int) -> Any:
    elements, low, high, lanes = _row_elements(group, address, count, index, "read")
    require_written(group, elements, 16, low, high, lanes, index)
    rows = group.wave.shared.views[16].take(elements)
    words = _transposed(rows) if transposed else rows.view(np.uint32)
    return words.reshape(count, group.size)


@helper
def matrix_store(group: Group, address: Any, count: int, transposed: bool, values: tuple[Any, ...], index: int) -> None:
    elements, low, high, _ = _row_elements(group, address, count, index, "write")
    words = np.stack([group.spread(v) for v in values])
    words = _transposed(words) if transposed else words
    group.wave.shared.views[16][elements] = words.reshape(-1).view(np.complex128)
    group.wave.shared.mark(elements, 16, low, high)


@helper
def matrix_transpose(group: Group, value: Any, index: int) -> Any:
    group.require_whole_warps(index)
    return _transposed(np.ascontiguousarray(group.spread(value))).reshape(-1)
