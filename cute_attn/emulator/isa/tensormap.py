"""tensormap.replace and tensormap.cp_fenceproxy: tensor maps that the kernel edits.

`tensor_map` has the format. Fields are replaced as ptxas does it, by changing words in memory (PTX ISA,
"tensormap.replace", "tensormap.cp_fenceproxy"); a map is checked when a copy uses it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..access import check_alignment, split_generic
from ..bulk import BulkIssue, Units
from ..codegen import BlockBuilder
from ..errors import DivergentWarp, OutOfBounds, UnknownInstruction
from ..memory import Array
from ..module import Instruction
from ..registry import emits, helper
from ..tensor_map import MAP_ALIGNMENT, MAP_BYTES
from ..wave import Group
from .load_store import address_expression, state_space

Change = tuple[int, int, int]
"""(word of the map, mask of the bits that change, left shift of the value: negative to the right)."""

_WORD = 0xFFFFFFFF
_ENUMERATIONS = {
    "interleave_layout": (0x1800, 11, 3),
    "swizzle_mode": (0x406000, 13, 4),  # and not the one of 96 bytes
    "swizzle_atomicity": (0x180000, 19, 4),
    "fill_mode": (0x8000, 15, 2),
}
"""Mask and shift in word 2 of a field with an immediate value, and how many values it has."""
_ORDINALS = {"box_dim": 5, "global_dim": 5, "global_stride": 4, "element_stride": 5}
_PLAIN = ("global_address", "rank")
_TYPES = {"global_address": "b64", "global_stride": "b64"}


def _changes(field: str, ordinal: int) -> list[Change]:
    """Where the value of an integer field goes. Sizes and traversal strides are stored less one."""
    if field == "global_address":
        return [(0, _WORD, 0), (1, _WORD, -32)]
    if field == "rank":
        return [(2, 0x70, 4)]
    if field == "global_dim":
        return [(8 + ordinal, _WORD, 0)]
    if field == "global_stride":
        return [(3 + ordinal, _WORD, -4), (7, 0xF << 4 * ordinal, 4 * ordinal - 36)]
    if field == "element_stride":
        return [(13, 7 << 3 * ordinal, 3 * ordinal)]
    return [(13, 0xFF << 24, 24)] if ordinal == 0 else [(14, 0xFF << 8 * (ordinal - 1), 8 * (ordinal - 1))]


@emits(
    "tensormap.replace.tile",
    types="b32 b64",
    modifiers=" ".join(["global shared::cta b1024", *_ENUMERATIONS, *_ORDINALS, *_PLAIN, "elemtype"]),
)
def replace(b: BlockBuilder, i: Instruction) -> None:
    """tensormap.replace.tile.field.b1024.type [map] {, ordinal}, value"""
    field = i.parts[3]
    if i.parts[-1] != _TYPES.get(field, "b32"):
        raise UnknownInstruction(i.text)
    space = state_space(i)
    address = address_expression(b, i.operands[0], "uint32" if space == "shared" else "uint64")
    if field in _ORDINALS:
        ordinal = b.literal(i.operands[1])
        if ordinal is None or not 0 <= ordinal < _ORDINALS[field]:
            raise UnknownInstruction(i.text)
        changes = _changes(field, ordinal)
    elif field in _PLAIN:
        changes = _changes(field, 0)
    else:
        mask, bits = _enumeration(i, field, b.literal(i.operands[1]))
        number = b.constant(bits, "uint64")
        b.effect(f"change_map(G, {space!r}, {address}, ((2, {mask}, 0),), {number}, {b.mask}, {i.index})")
        return
    value = f"{b.read(i.operands[-1], 'uint64' if i.parts[-1] == 'b64' else 'uint32')}.astype(uint64)"
    if field in ("box_dim", "global_dim", "element_stride"):
        value = f"{value} - {b.constant(1, 'uint64')}"
    b.effect(f"change_map(G, {space!r}, {address}, {tuple(changes)!r}, {value}, {b.mask}, {i.index})")


def _enumeration(i: Instruction, field: str, number: int | None) -> tuple[int, int]:
    """(mask, bits) in word 2 of an immediate value."""
    if field == "elemtype" and number is not None and 0 <= number < 16:
        # TF32 is f32 with a bit of its own; other types do not take it away in ptxas's code.
        tf32 = number in (11, 12)
        kind = number - 4 if tf32 else number - 2 if number > 12 else number
        return 0x780 | (1 << 16 if tf32 else 0), kind << 7 | tf32 << 16
    if field not in _ENUMERATIONS or number is None or not 0 <= number < _ENUMERATIONS[field][2]:
        raise UnknownInstruction(i.text)
    mask, shift, _ = _ENUMERATIONS[field]
    return mask, number << shift


@emits(
    "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release",
    modifiers="cta cluster gpu sys sync aligned",
)
def copy_map(b: BlockBuilder, i: Instruction) -> None:
    """tensormap.cp_fenceproxy [dst], [src], 128: the whole warp copies one map from shared to global memory."""
    to, source = address_expression(b, i.operands[0], "uint64"), address_expression(b, i.operands[1], "uint32")
    if b.literal(i.operands[2]) != MAP_BYTES or i.parts[-2:] != ("sync", "aligned"):
        raise UnknownInstruction(i.text)
    b.effect(f"copy_tensor_map(G, {to}, {source}, {b.mask}, {i.index})")


# ---- execution

_WORDS = 4 * np.arange(MAP_BYTES // 4)


@helper
def change_map(
    group: Group, space: str, address: Any, changes: tuple[Change, ...], value: Any, mask: Any, index: int
) -> None:
    pieces = split_generic(group, address, mask) if space == "generic" else [(space, address, mask)]
    for window, offset, inside in pieces:
        issue = BulkIssue.of(group, inside, index)
        start = issue.take(offset)
        check_alignment(group, start, MAP_ALIGNMENT, issue.positions, index)
        if window == "shared":
            cta, start = issue.shared_place(start.astype(np.uint32), MAP_ALIGNMENT, "write")
            words = issue.shared_units(cta, start, _WORDS, 4, "write")
        elif window == "global":
            words = issue.global_units(start[:, None], _WORDS, 4, "write")
        else:
            issue.fail(OutOfBounds, 0, f"tensormap.replace of a map in {window} memory")
        _change(issue, words, issue.take(value), changes)


def _change(issue: BulkIssue, words: Units, value: Array, changes: tuple[Change, ...]) -> None:
    every = np.arange(value.size)
    races = None if words.shared is None else issue.wave.races
    for word, mask, shift in changes:
        one = Units(words.view, words.elements[:, word : word + 1], None, words.shared, words.extent)
        if races is not None:
            races.write(issue.group, one.elements[:, 0], 4, issue.positions, issue.index)
        if mask != _WORD and one.shared is not None:
            issue.require_written(one)
        moved = value << np.uint64(shift) if shift >= 0 else value >> np.uint64(-shift)
        kept = one.read(every)[:, 0] & np.uint32(~mask & _WORD)
        one.write(every, (kept | (moved & np.uint64(mask)).astype(np.uint32))[:, None])


@helper
def copy_tensor_map(group: Group, to: Any, source: Any, mask: Any, index: int) -> None:
    warps = group.require_whole_warps(index)
    if mask is not None and not mask.all():
        group.fail(DivergentWarp, index, 0, "tensormap.cp_fenceproxy guarded off in some of the threads")
    issue = BulkIssue(group, np.arange(0, 32 * warps, 32), index)
    cta, start = issue.shared_place(issue.take(source), MAP_BYTES, "read")
    address = issue.take(to)
    check_alignment(group, address, MAP_BYTES, issue.positions, index)
    read = issue.shared_units(cta, start, _WORDS, 4, "read")
    if (races := issue.wave.races) is not None:
        races.read(group, read.elements.reshape(-1), 4, np.repeat(issue.positions, _WORDS.size), index)
    issue.require_written(read)
    written = issue.global_units(address[:, None], _WORDS, 4, "write")
    every = np.arange(warps)
    written.write(every, read.read(every))
