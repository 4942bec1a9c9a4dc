"""ldmatrix, stmatrix and movmatrix.

Everything here moves rows of 16 bytes, each held by four lanes: lane 4r + c has bytes 4c to 4c + 3 of row r. So eight
rows in memory order are the register of a warp, and a form of these instructions is a rearrangement of rows:
* m8n8 .b16: as they are; .trans exchanges rows and columns of the 8x8 elements.
* m16n16 .trans .b8 (ldmatrix): 16x16 bytes are transposed; two registers, of the upper and the lower eight rows.
* m16n8 .trans .b8 (stmatrix): the register of a 16x8 matrix of bytes, whose columns become the rows in memory. As in an
  accumulator of mma, lane 4g + t has columns 2t and 2t + 1 of row g, then of row g + 8.
* m8n16 and m16n16 .b8x16: 4- or 6-bit elements, 16 to a row from its first byte on, are widened to bytes when loaded.
  The rest of the 16 bytes in memory is padding and need not be written.
Lane 8j + r names row r of the j-th eight rows. (PTX ISA, "ldmatrix", "stmatrix", "movmatrix"; layouts of the byte forms
as in CUTLASS's copy atoms for sm_100.)

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
from ..registry import HELPERS, emits, helper
from ..wave import Group
from .load_store import address_expression

_COUNTS = {"x1": 1, "x2": 2, "x4": 4}
_PACKED_BITS = {"b4x16_p64": 4, "b6x16_p32": 6}


@dataclass(frozen=True)
class MatrixForm:
    """registers: of a lane, which is how many times eight rows are moved. rearranged: how rows become registers.

    packed_bits: width of the elements in memory where they are widened, else 0.
    """

    registers: int
    rearranged: str
    packed_bits: int = 0


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


_Forms = dict[tuple[str, bool, tuple[str, ...]], MatrixForm]
"""By shape, whether .trans, and the types; of one matrix."""
_LOADS: _Forms = {
    ("m8n8", False, ("b16",)): MatrixForm(1, ""),
    ("m8n8", True, ("b16",)): MatrixForm(1, "transposed"),
    ("m16n16", True, ("b8",)): MatrixForm(2, "transposed bytes"),
}
for _source, _bits in _PACKED_BITS.items():
    _LOADS["m8n16", False, ("b8x16", _source)] = MatrixForm(1, "", _bits)
    _LOADS["m16n16", True, ("b8x16", _source)] = MatrixForm(2, "transposed bytes", _bits)
_STORES: _Forms = {
    ("m8n8", False, ("b16",)): MatrixForm(1, ""),
    ("m8n8", True, ("b16",)): MatrixForm(1, "transposed"),
    ("m16n8", True, ("b8",)): MatrixForm(1, "columns of bytes"),
}


def _form(i: Instruction, forms: _Forms, registers: int) -> MatrixForm:
    """The form of the whole instruction, whose vector operand has `registers`."""
    shape, count, *rest = i.opcode.split(".")[3:]
    trans = "trans" in rest
    types = tuple(part for part in rest if part not in ("trans", "shared", "shared::cta"))
    one = forms.get((shape, trans, types))
    if one is None or count not in _COUNTS or _COUNTS[count] * one.registers != registers or registers > 4:
        raise UnknownInstruction(i.opcode)
    return MatrixForm(registers, one.rearranged, one.packed_bits)


def _name(form: MatrixForm) -> str:
    """A name by which generated code reaches the form."""
    name = f"MATRIX_{form.registers}_{form.rearranged.replace(' ', '_')}_{form.packed_bits}"
    HELPERS[name] = form
    return name


@emits("ldmatrix.sync.aligned")
def ldmatrix(b: BlockBuilder, i: Instruction) -> None:
    dests = b.vector(i.operands[0])
    form = _form(i, _LOADS, len(dests))
    address = address_expression(b, i.operands[1], "uint32")
    values = b.new_name()
    if b.guard is None:
        arguments = f"(G, {address}, {_name(form)}, {i.index})"
        load = MatrixLoad(f"{values} = matrix_rows{arguments}")
        b.operation(f"{values} = matrix_load{arguments}", (values,), pure=False, payload=load)
    else:
        b.operation(
            f"{values} = guarded_matrix_load(G, {b.guard}, {address}, {_name(form)}, {i.index})", (values,), pure=False
        )
    for n, dest in enumerate(dests):
        b.write(dest, f"{values}[{n}]", "uint32")


@emits("stmatrix.sync.aligned")
def stmatrix(b: BlockBuilder, i: Instruction) -> None:
    registers = b.vector(i.operands[1])
    form = _form(i, _STORES, len(registers))
    address = address_expression(b, i.operands[0], "uint32")
    values = ", ".join(b.read(o, "uint32") for o in registers)
    b.effect(f"matrix_store(G, {b.mask}, {address}, {_name(form)}, ({values},), {i.index})")


@emits("movmatrix.sync.aligned.m8n8.trans.b16", modifiers="")
def movmatrix(b: BlockBuilder, i: Instruction) -> None:
    value = b.read(i.operands[1], "uint32")
    b.write(i.operands[0], f"matrix_transpose(G, {b.mask}, {value}, {i.index})", "uint32")


# ---- rows and registers


def _transposed(rows: Array) -> Array:
    """16-byte rows [..., 8] -> the same with rows and columns of their 16-bit elements exchanged."""
    halves = rows.view(np.uint16).reshape(-1, 8, 8).swapaxes(1, 2)
    return np.ascontiguousarray(halves).view(np.complex128).reshape(rows.shape)


def _widened(rows: Array, bits: int) -> Array:
    """16-byte rows that begin with 16 elements of `bits` -> rows of 16 bytes."""
    packed = rows.view(np.uint8).reshape(*rows.shape, 16)
    group, shifts = (1, (0, 4)) if bits == 4 else (3, (0, 6, 12, 18))
    parts = packed[..., : 2 * bits].reshape(*rows.shape, -1, group).astype(np.uint32)
    words = parts[..., 0] if group == 1 else parts[..., 0] | parts[..., 1] << 8 | parts[..., 2] << 16
    elements = words[..., None] >> np.array(shifts, np.uint32) & np.uint32((1 << bits) - 1)
    return np.ascontiguousarray(elements.astype(np.uint8)).reshape(*rows.shape, 16).view(np.complex128)[..., 0]


def _registers_from_rows(rows: Array, form: MatrixForm) -> Array:
    """[registers, owners, 8] rows as they lie in memory -> the rows of every register."""
    if form.packed_bits:
        rows = _widened(rows, form.packed_bits)
    if form.rearranged == "transposed":
        return _transposed(rows)
    if form.rearranged == "transposed bytes":
        square = rows.view(np.uint8).reshape(-1, 2, rows.shape[1], 8, 16)  # matrix, upper or lower rows, owner, row
        columns = square.transpose(0, 4, 2, 1, 3)  # matrix, column, owner, row
        halves = columns.reshape(len(columns), 2, 8, rows.shape[1], 16).swapaxes(2, 3)
        return np.ascontiguousarray(halves).view(np.complex128).reshape(rows.shape)
    return rows


def _rows_from_registers(words: Array, form: MatrixForm) -> Array:
    """uint32 [registers, lanes] -> [registers, warps, 8] rows as they shall lie in memory."""
    rows = words.view(np.complex128).reshape(len(words), -1, 8)
    if form.rearranged == "transposed":
        return _transposed(rows)
    if form.rearranged == "columns of bytes":
        elements = words.view(np.uint8).reshape(len(words), -1, 8, 4, 2, 2)  # register, warp, g, t, half, column parity
        columns = np.ascontiguousarray(elements.transpose(0, 1, 3, 5, 4, 2)).reshape(-1)
        return columns.view(np.complex128).reshape(rows.shape)
    return rows


# ---- shared memory


def _row_elements(
    group: Group, address: Any, registers: int, index: int, verb: str, *, first_warps: bool = False
) -> tuple[Array, int, int, Array]:
    """Element indices of 16-byte rows, [registers * owners * 8], and which lane named each.

    The owners are the warps, or with `first_warps` the first warp of each CTA.
    """
    group.require_whole_warps(index)
    lanes = group.matrix_lanes(registers)
    if first_warps:
        lanes = lanes[:, :: group.warps_per_cta]
    lanes = lanes.reshape(-1)
    rows = group.spread(address)[lanes]
    elements, low, high = shared_elements(group, rows, 16, lanes, index, verb)
    return elements, low, high, lanes


def _load(group: Group, address: Any, form: MatrixForm, index: int, first_warps: bool) -> Array:
    """[registers, owners, 8] rows of registers."""
    elements, low, high, lanes = _row_elements(group, address, form.registers, index, "read", first_warps=first_warps)
    if (races := group.wave.races) is not None:
        (races.read_by_ctas if first_warps else races.read)(group, elements, 16, lanes, index)
    if form.packed_bits:
        require_written(group, elements * 2, 8, low, high, lanes, index)
        if form.packed_bits == 6:
            require_written(group, elements * 4 + 2, 4, low, high, lanes, index)
    else:
        require_written(group, elements, 16, low, high, lanes, index)
    rows = group.wave.shared.views[16].take(elements).reshape(form.registers, -1, 8)
    return _registers_from_rows(rows, form)


@helper
def matrix_load(group: Group, address: Any, form: MatrixForm, index: int) -> Array:
    """uint32 [registers, lanes]."""
    return _load(group, address, form, index, False).view(np.uint32).reshape(form.registers, group.size)


@helper
def guarded_matrix_load(group: Group, guard: Any, address: Any, form: MatrixForm, index: int) -> Array:
    """As `matrix_load` for the warps whose guard is true, which it must be in all lanes of a warp or in none."""
    chosen = group.spread(guard)
    values = np.zeros((form.registers, group.size), np.uint32)
    if chosen.any():
        values[:, chosen] = matrix_load(group.part(chosen), group.spread(address)[chosen], form, index)
    return values


@helper
def matrix_rows(group: Group, address: Any, form: MatrixForm, index: int) -> list[MatrixRows]:
    group.require_whole_warps(index)
    shared_by_cta = _same_in_all_warps(group, address)
    return [MatrixRows(rows, shared_by_cta) for rows in _load(group, address, form, index, shared_by_cta)]


def _same_in_all_warps(group: Group, address: Any) -> bool:
    """Whether each CTA's warps name the same rows; only then do the others' addresses need no check of their own."""
    if group.warps_per_cta == 1:
        return False
    if address.ndim == 0:
        return True
    table = address.reshape(-1, group.warps_per_cta, 32)
    return bool((table[:, 1:] == table[:, :1]).all())


@helper
def matrix_store(group: Group, guard: Any, address: Any, form: MatrixForm, values: tuple[Any, ...], index: int) -> None:
    words = np.stack([group.spread(v) for v in values])
    if guard is not None:
        chosen = group.spread(guard)
        if not chosen.any():
            return
        address, words = group.spread(address)[chosen], np.ascontiguousarray(words[:, chosen])
        group = group.part(chosen)
    elements, low, high, lanes = _row_elements(group, address, form.registers, index, "write")
    rows = _rows_from_registers(words, form).reshape(-1)
    if (races := group.wave.races) is not None:
        races.write(group, elements, 16, lanes, index, rows)
    group.wave.shared.views[16][elements] = rows
    group.wave.shared.mark(elements, 16, low, high)


@helper
def matrix_transpose(group: Group, guard: Any, value: Any, index: int) -> Any:
    words = group.spread(value)
    if guard is not None:
        chosen = group.spread(guard)
        result = np.zeros(group.size, np.uint32)
        if chosen.any():
            result[chosen] = matrix_transpose(group.part(chosen), None, words[chosen], index)
        return result
    group.require_whole_warps(index)
    rows = np.ascontiguousarray(words).view(np.complex128).reshape(-1, 8)
    return _transposed(rows).reshape(-1).view(np.uint32)
