"""ldmatrix, stmatrix and movmatrix of 8x8 matrices of 16-bit elements.

A matrix row is 16 bytes, held by four lanes: lane 4r + c holds elements 2c and 2c + 1 of row r. So eight rows in memory
order are the register of a warp, and .trans exchanges rows and columns of the 16-bit elements first.
Lane 8j + r gives the address of row r of matrix j.

Matrices that only feed mma are never spread over lanes: `MatrixRows` hands their rows straight to the product, and once
per CTA where all its warps load the same ones, as they do with K and V.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class MatrixLoad:
    """Payload of an ldmatrix operation: the statement to use instead if all its results go to mma only."""

    rows_code: str


@dataclass(frozen=True)
class MatrixRows:
    """One 8x8 matrix per warp, or per CTA: `rows` [owners, 8] elements of 16 bytes."""

    rows: Array
    per_cta: bool

    def by_warp(self, warps: int) -> Array:
        """[warps, 8]."""
        return np.repeat(self.rows, warps // len(self.rows), axis=0) if self.per_cta else self.rows


def _count(i: Instruction) -> int:
    count = next((_COUNTS[p] for p in i.parts if p in _COUNTS), None)
    if count is None or "m8n8" not in i.parts or i.parts[-1] != "b16" or i.guard is not None:
        raise UnknownInstruction(i.opcode)
    return count


@emits("ldmatrix.sync.aligned.m8n8")
def ldmatrix(b: BlockBuilder, i: Instruction) -> None:
    address = address_expression(b, i.operands[1], "uint32")
    arguments = f"(G, {address}, {_count(i)}, {'trans' in i.parts}, {i.index})"
    values = b.new_name()
    load = MatrixLoad(f"{values} = matrix_rows{arguments}")
    b.operation(f"{values} = matrix_load{arguments}", (values,), pure=False, payload=load)
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


def _row_elements(
    group: Group, address: Any, count: int, index: int, verb: str, *, first_warps: bool = False
) -> tuple[Array, int, int, Array]:
    """Element indices of 16-byte rows, [count * owners * 8] matrix by matrix, and which lane named each.

    The owners are the warps, or with `first_warps` the first warp of each CTA.
    """
    group.require_whole_warps(index)
    lanes = group.matrix_lanes(count, first_warps)
    rows = group.spread(address)[lanes]
    elements, low, high = shared_elements(group, rows, 16, lanes, index, verb)
    return elements, low, high, lanes


def _transposed(rows: Array) -> Array:
    """[matrices, 8 rows] of 16 bytes -> the same with rows and columns exchanged, as uint32 words."""
    halves = rows.view(np.uint16).reshape(-1, 8, 8)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).view(np.uint32)


def _load(group: Group, address: Any, count: int, transposed: bool, index: int, first_warps: bool) -> Array:
    """uint32 words of the matrices, [count * owners * 32]."""
    elements, low, high, lanes = _row_elements(group, address, count, index, "read", first_warps=first_warps)
    require_written(group, elements, 16, low, high, lanes, index)
    rows = group.wave.shared.views[16].take(elements)
    return (_transposed(rows) if transposed else rows.view(np.uint32)).reshape(-1)


@helper
def matrix_load(group: Group, address: Any, count: int, transposed: bool, index: int) -> Any:
    return _load(group, address, count, transposed, index, False).reshape(count, group.size)


@helper
def matrix_rows(group: Group, address: Any, count: int, transposed: bool, index: int) -> list[MatrixRows]:
    warps = group.require_whole_warps(index)
    shared_by_cta = group.has_whole_ctas and _same_in_all_warps(group, address)
    owners = warps * 32 // group.wave.cta_lanes if shared_by_cta else warps
    words = _load(group, address, count, transposed, index, shared_by_cta)
    matrices = words.view(np.complex128).reshape(count, owners, 8)
    return [MatrixRows(rows, shared_by_cta) for rows in matrices]


def _same_in_all_warps(group: Group, address: Any) -> bool:
    """Whether each CTA's warps name the same rows; only then do the others' addresses need no check of their own."""
    if group.wave.cta_lanes == 32:
        return False
    if address.ndim == 0:
        return True
    table = address.reshape(-1, group.wave.cta_lanes // 32, 32)
    return bool((table[:, 1:] == table[:, :1]).all())


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
