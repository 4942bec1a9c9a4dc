"""Bulk copies of boxes of tensors: cp.async.bulk.tensor and cp.reduce.async.bulk.tensor, in tile mode.

A tensor map says where the tensor lies and what the box is (see `tensor_map`); the instruction names the coordinates of
its first element. What lies outside the tensor is filled on the way to shared memory and skipped on the way back.
Loads report to an mbarrier, stores and reductions belong to bulk groups (see `bulk_copy`). PTX ISA, "Tensors" and "Data
Movement and Conversion Instructions: Tensor copy".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..access import check_alignment
from ..bulk import BulkIssue, Units
from ..codegen import BlockBuilder
from ..errors import InvalidOperand, OutOfBounds, UnknownInstruction
from ..formats import f32_to_tf32
from ..memory import PARAMETER_WINDOW, Array
from ..module import Instruction
from ..ptx_text import split_operands
from ..registry import emits, helper
from ..tensor_map import MAP_ALIGNMENT, MAP_BYTES, SHARED_ALIGNMENT, InvalidTensorMap, Places, TensorMap, decode
from ..wave import Group
from .bulk_copy import address_in, put_in_group, reduce_into, report_to
from .load_store import address_expression

_DIMENSIONS = "1d 2d 3d 4d 5d"
_REDUCTIONS = {
    "add": "u32 s32 u64 f32 f32.ftz f16 bf16",
    "min": "u32 s32 u64 s64 f16 bf16",
    "max": "u32 s32 u64 s64 f16 bf16",
    "inc": "u32",
    "dec": "u32",
    "and": "u32 s32 u64 s64",
    "or": "u32 s32 u64 s64",
    "xor": "u32 s32 u64 s64",
}
"""Element types of a map that go with an operation."""


# ---- instructions


@emits(
    "cp.async.bulk.tensor",
    modifiers=f"{_DIMENSIONS} shared::cluster shared::cta global tile tile::gather4 mbarrier::complete_tx::bytes "
    "multicast::cluster cta_group::1 L2::cache_hint",
)
def load(b: BlockBuilder, i: Instruction) -> None:
    """cp.async.bulk.tensor.2d [dst], [map, {c0, c1}], [mbar] {, cta-mask} {, policy}"""
    to, barrier = (address_expression(b, i.operands[n], "uint32") for n in (0, 2))
    where = _box(b, i, i.operands[1])
    ctas = b.read(i.operands[3], "uint16") if "multicast@cluster" in i.parts else "None"
    b.effect(f"tensor_load(G, {to}, {where}, {barrier}, {ctas}, {b.mask}, {i.index})")


@emits(
    *(f"cp.async.bulk.tensor.{dimensions}.global.shared::cta" for dimensions in _DIMENSIONS.split()),
    modifiers="tile tile::scatter4 bulk_group L2::cache_hint",
)
def store(b: BlockBuilder, i: Instruction) -> None:
    """cp.async.bulk.tensor.2d [map, {c0, c1}], [src] {, policy}"""
    _store(b, i, "None")


@emits(
    "cp.reduce.async.bulk.tensor",
    modifiers=f"{_DIMENSIONS} global shared::cta tile bulk_group L2::cache_hint add min max inc dec and or xor",
)
def reduce(b: BlockBuilder, i: Instruction) -> None:
    """cp.reduce.async.bulk.tensor.2d.add [map, {c0, c1}], [src] {, policy}"""
    operations = [part for part in i.parts if part in _REDUCTIONS]
    if len(operations) != 1:
        raise UnknownInstruction(i.text)
    _store(b, i, repr(operations[0]))


def _store(b: BlockBuilder, i: Instruction, operation: str) -> None:
    where, source = _box(b, i, i.operands[0]), address_expression(b, i.operands[1], "uint32")
    b.effect(f"tensor_store(G, {where}, {source}, {operation}, {b.mask}, {i.index})")


def _box(b: BlockBuilder, i: Instruction, operand: str) -> str:
    """ "[map, {c0, c1}]" as arguments: address of the map, coordinates, number of coordinates of the tensor."""
    tensor_map, vector = split_operands(operand[1:-1])
    names = b.vector(vector)
    dimensions = int(next(part for part in i.parts if part in _DIMENSIONS.split())[0])
    several_rows = "tile@gather4" in i.parts or "tile@scatter4" in i.parts
    if len(names) != (5 if several_rows else dimensions) or (several_rows and dimensions != 2):
        raise UnknownInstruction(i.text)
    coordinates = ", ".join(b.read(name, "int32") for name in names)
    return f"{address_expression(b, f'[{tensor_map}]', 'uint64')}, ({coordinates},), {dimensions}"


# ---- execution


def _by_map(group: Group, tensor_map: Any, mask: Any, index: int) -> Iterator[tuple[BulkIssue, TensorMap]]:
    """The copies that a group issues, by the tensor map that they use."""
    issue = BulkIssue.of(group, mask, index)
    address = issue.take(tensor_map)
    if not address.size:
        return
    check_alignment(group, address, MAP_ALIGNMENT, issue.positions, index)
    different = address[:1] if (address == address[0]).all() else np.unique(address)
    for one in different:
        rows = np.flatnonzero(address == one)
        try:
            found = decode(_map_bytes(issue, int(one), int(rows[0])))
        except InvalidTensorMap as error:
            issue.fail(InvalidOperand, int(rows[0]), f"the tensor map at {int(one):#x} is invalid: {error}")
        yield issue.part(rows), found


def _map_bytes(issue: BulkIssue, address: int, row: int) -> bytes:
    """The meaningful half of a map, by generic address: a kernel parameter or global memory."""
    wave = issue.wave
    if address >= PARAMETER_WINDOW:
        start = address - PARAMETER_WINDOW
        if start + MAP_BYTES > wave.kernel.parameter_bytes:
            issue.fail(OutOfBounds, row, "the tensor map reaches past the end of the kernel's parameters")
        return wave.parameters[start : start + MAP_BYTES // 2].tobytes()
    place = np.array([address], np.uint64)
    if wave.memory.outside(place, MAP_BYTES) is not None:
        where = wave.memory.describe(address, MAP_BYTES)
        issue.fail(OutOfBounds, row, f"the tensor map at {address:#x} is out of bounds: {where}")
    start = int(wave.memory.index(place, 1)[0])
    return wave.memory.views[1][start : start + MAP_BYTES // 2].tobytes()


def _boxes(issue: BulkIssue, found: TensorMap, coordinates: Array, dimensions: int) -> tuple[Places, int]:
    """Where the boxes lie, those that one copy gathers together, and how many rows of shared memory each copy has."""
    if found.rank != dimensions:
        issue.fail(InvalidOperand, 0, f"the tensor map has {found.rank} dimensions, the instruction {dimensions}")
    element = found.element
    multiple = 128 if element.is_padded else 2 if element.bits < 8 else 1
    if (bad := coordinates[:, 0] % multiple != 0).any():
        row = int(np.argmax(bad))
        issue.fail(
            InvalidOperand,
            row,
            f"first coordinate {int(coordinates[row, 0])}: with {element.name} it is a multiple of {multiple}",
        )
    copies, given = coordinates.shape
    if given == dimensions:
        return found.places(coordinates), found.rows
    if found.rows != 1:
        issue.fail(InvalidOperand, 0, f"boxes of {found.box[1]} rows: single rows are gathered and scattered")
    columns = np.repeat(coordinates[:, :1], given - 1, axis=1)
    places = found.places(np.stack([columns, coordinates[:, 1:]], axis=2).reshape(-1, 2))
    inside = None if places.inside is None else places.inside.reshape(copies, -1)
    return Places(places.unit, places.start.reshape(copies, -1), places.offsets, inside), given - 1


def _coordinates(issue: BulkIssue, values: tuple[Any, ...]) -> Array:
    return np.stack([issue.take(value) for value in values], axis=1).astype(np.int64)


@helper
def tensor_load(
    group: Group,
    to: Any,
    tensor_map: Any,
    coordinates: tuple[Any, ...],
    dimensions: int,
    barrier: Any,
    ctas: Any,
    mask: Any,
    index: int,
) -> None:
    for issue, found in _by_map(group, tensor_map, mask, index):
        places, box_rows = _boxes(issue, found, _coordinates(issue, coordinates), dimensions)
        read = issue.global_units(places.start, places.offsets, places.unit, "read", places.inside)
        destination, barriers = issue.take(to), issue.take(barrier)
        if ctas is not None:
            repeated, ranks = issue.multicast(issue.take(ctas))
            issue, read = issue.part(repeated), read.select(repeated)
            destination, barriers = (address_in(ranks, x[repeated]) for x in (destination, barriers))
        _load(issue, found, read, box_rows, destination, barriers)


def _load(issue: BulkIssue, found: TensorMap, read: Units, box_rows: int, destination: Array, barriers: Array) -> None:
    unit = read.view.itemsize
    cta, start = issue.shared_place(destination, SHARED_ALIGNMENT, "write")
    written = issue.shared_units(cta, *found.shared_offsets(start, unit, box_rows), unit, "write")
    outside = found.fill(unit)
    converted = found.element.name.startswith("tf32")

    def perform(rows: Array) -> None:
        content = read.read(rows)
        if converted:
            content = f32_to_tf32(content.view(np.float32), "rn").view(content.dtype)
        if (used := read.is_used(rows)) is not None:
            content[~used] = outside
        written.write(rows, content)

    nbytes = np.full(destination.size, found.row_bytes * box_rows, np.int64)
    report_to(issue, barriers, nbytes, perform, writes=written)


@helper
def tensor_store(
    group: Group,
    tensor_map: Any,
    coordinates: tuple[Any, ...],
    dimensions: int,
    source: Any,
    operation: Any,
    mask: Any,
    index: int,
) -> None:
    for issue, found in _by_map(group, tensor_map, mask, index):
        _check_store(issue, found, operation)
        origin = _coordinates(issue, coordinates)
        if (bad := (origin < 0).any(1)).any():
            row = int(np.argmax(bad))
            where = tuple(origin[row].tolist())
            issue.fail(InvalidOperand, row, f"a store to coordinates {where}: only loads may have negative ones")
        places, box_rows = _boxes(issue, found, origin, dimensions)
        written = issue.global_units(places.start, places.offsets, places.unit, "write", places.inside)
        cta, start = issue.shared_place(issue.take(source), SHARED_ALIGNMENT, "read")
        offsets = found.shared_offsets(start, places.unit, box_rows)
        read = issue.shared_units(cta, *offsets, places.unit, "read", places.inside)
        issue.require_written(read)
        _store_boxes(issue, found, read, written, operation)


def _check_store(issue: BulkIssue, found: TensorMap, operation: str | None) -> None:
    name = found.element.name
    if found.element.is_padded:
        issue.fail(InvalidOperand, 0, f"boxes of {name} can be loaded only")
    if found.swizzle.flip:
        issue.fail(InvalidOperand, 0, "boxes whose swizzle flips halves of 16 bytes can be loaded only")
    if operation is not None and name not in _REDUCTIONS[operation].split():
        issue.fail(InvalidOperand, 0, f"{operation} of {name}: it goes with {_REDUCTIONS[operation]}")


def _store_boxes(issue: BulkIssue, found: TensorMap, read: Units, written: Units, operation: str | None) -> None:
    element = found.element.name

    def perform(rows: Array) -> None:
        content = read.read(rows)
        if operation is None:
            written.write(rows, content)
        else:
            flush = element.endswith(".ftz")
            reduce_into(written, rows, content, operation, element.removesuffix(".ftz"), flush=flush)

    put_in_group(issue, perform, reads=read)
