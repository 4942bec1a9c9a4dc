"""Exchanges inside a warp: shfl, vote, redux, match, activemask, elect.

The lanes that a member mask names must execute the instruction together; lanes that have exited do not count.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..assembly import EXIT
from ..codegen import BlockBuilder
from ..errors import DivergentWarp, UnknownInstruction
from ..memory import Array
from ..module import Instruction
from ..registry import emits, helper, instruction_type
from ..wave import Group


@emits("shfl.sync", types="b32", modifiers="up down bfly idx")
def shuffle(b: BlockBuilder, i: Instruction) -> None:
    """shfl.sync.mode.b32 d{|p}, a, b, c, membermask."""
    dest, _, valid = (part.strip() for part in i.operands[0].partition("|"))
    value, lane, clamp, members = (b.read(o, "uint32") for o in i.operands[1:5])
    pair = b.checked(f"warp_shuffle(G, {i.parts[2]!r}, {value}, {lane}, {clamp}, {members}, {b.mask}, {i.index})")
    b.write(dest, f"{pair}[0]", "uint32")
    if valid:
        b.write(valid, f"{pair}[1]", "bool")


@emits("vote.sync", types="pred b32", modifiers="any all uni ballot")
def vote(b: BlockBuilder, i: Instruction) -> None:
    mode = i.parts[2]
    predicate = b.predicate(i.operands[1])
    members = b.read(i.operands[2], "uint32")
    result = b.checked(f"warp_vote(G, {mode!r}, {predicate}, {members}, {b.mask}, {i.index})")
    b.write(i.operands[0], result, "uint32" if mode == "ballot" else "bool")


@emits("redux.sync", types="b32 u32 s32 f32", modifiers="add min max and or xor abs NaN")
def reduce(b: BlockBuilder, i: Instruction) -> None:
    kind = instruction_type(i.opcode)
    assert kind is not None
    value, members = b.read(i.operands[1], kind.numpy), b.read(i.operands[2], "uint32")
    flags = tuple(p for p in i.parts if p in ("abs", "NaN"))
    result = b.checked(f"warp_reduce(G, {i.parts[2]!r}, {flags}, {value}, {members}, {b.mask}, {i.index})")
    b.write(i.operands[0], result, kind.numpy)


@emits("match.any.sync", "match.all.sync", types="b32 b64", modifiers="")
def match(b: BlockBuilder, i: Instruction) -> None:
    kind = instruction_type(i.opcode)
    assert kind is not None
    dest, _, same = (part.strip() for part in i.operands[0].partition("|"))
    value, members = b.read(i.operands[1], kind.carrier), b.read(i.operands[2], "uint32")
    pair = b.checked(f"warp_match(G, {i.parts[1] == 'all'}, {value}, {members}, {b.mask}, {i.index})")
    b.write(dest, f"{pair}[0]", "uint32")
    if same:
        b.write(same, f"{pair}[1]", "bool")


@emits("activemask", types="b32", modifiers="")
def activemask(b: BlockBuilder, i: Instruction) -> None:
    b.write(i.operands[0], "active_lanes(G)", "uint32")


@emits("elect.sync", modifiers="")
def elect(b: BlockBuilder, i: Instruction) -> None:
    """The lowest lane of the member mask is the leader."""
    dest, _, leader = (part.strip() for part in i.operands[0].partition("|"))
    members = b.read(i.operands[1], "uint32")
    pair = b.checked(f"warp_elect(G, {members}, {b.mask}, {i.index})")
    b.write(dest, f"{pair}[0]", "uint32")
    if leader:
        b.write(leader, f"{pair}[1]", "bool")


# ---- the warp as a table of 32 columns


class _Warps:
    """The group's lanes as rows of 32: `row` and `column` of each lane, `present` [rows, 32]."""

    def __init__(self, group: Group, mask: Any) -> None:
        lanes = group.lane_numbers
        warp = lanes // 32
        self.column = lanes % 32
        self.group = group
        if group.has_whole_warps:
            self.row = np.arange(group.size) // 32
            self.rows = group.size // 32
        else:
            _, self.row = np.unique(warp, return_inverse=True)
            self.rows = int(self.row[-1]) + 1
        taking = group.taking(mask)
        self.present = np.zeros((self.rows, 32), bool)
        self.present[self.row, self.column] = taking

    def table(self, value: Any, fill: Any = 0) -> Array:
        value = self.group.spread(value)
        if self.group.has_whole_warps:
            return value.reshape(-1, 32)
        table = np.full((self.rows, 32), fill, value.dtype)
        table[self.row, self.column] = value
        return table

    def back(self, table: Array) -> Array:
        return np.ascontiguousarray(table[self.row, self.column])

    def members(self, mask: Any, index: int) -> Array:
        """[rows, 32] bool: the lanes named by the member mask; reports named lanes that are absent but alive."""
        group = self.group
        named = self.table(np.asarray(mask, np.uint32))[:, :, None] >> np.arange(32, dtype=np.uint32)
        lanes_named = (named & np.uint32(1)).astype(bool)
        # Every present lane states the mask; they must agree, so the first present one speaks for the warp. Of a warp
        # whose lanes the guard holds back, nobody is named.
        first = self.present.argmax(1)
        union = lanes_named[np.arange(self.rows), first] & self.present.any(1, keepdims=True)
        absent = union & ~self.present
        if absent.any():
            warp_start = (group.lane_numbers - self.column)[np.searchsorted(self.row, np.arange(self.rows))]
            lanes = np.minimum(warp_start[:, None] + np.arange(32), group.wave.lanes - 1)
            alive = absent & (group.wave.pc[lanes] < EXIT)
            if alive.any():
                row = int(np.argmax(alive.any(1)))
                missing = np.flatnonzero(alive[row])
                group.fail(
                    DivergentWarp,
                    index,
                    int(np.searchsorted(self.row, row)),
                    f"the member mask names lanes {missing.tolist()}, which do not execute this instruction",
                )
        return union


def _is_full(group: Group, members: Any, mask: Any) -> bool:
    return mask is None and members.ndim == 0 and int(members) == 0xFFFF_FFFF and group.has_whole_warps


_LANES = np.arange(32, dtype=np.int64)


def _source_lane(mode: str, lane: Array, clamp: Array) -> tuple[Array, Array]:
    """(source lane, in range) for each of 32 columns; lane and clamp broadcast against [.., 32]."""
    lane, clamp = lane.astype(np.int64) & 31, clamp.astype(np.int64)
    limit, segment = clamp & 31, clamp >> 8 & 31
    top = (_LANES & segment) | (limit & ~segment)
    bottom = _LANES & segment
    if mode == "up":
        source = _LANES - lane
        valid = source >= top
    elif mode == "down":
        source = _LANES + lane
        valid = source <= top
    elif mode == "bfly":
        source = _LANES ^ lane
        valid = source <= top
    elif mode == "idx":
        source = bottom | (lane & ~segment)
        valid = source <= top
    else:
        raise UnknownInstruction(f"shfl.sync.{mode}")
    return np.where(valid, source, _LANES) & 31, valid


@helper
def warp_shuffle(
    group: Group, mode: str, value: Any, lane: Any, clamp: Any, members: Any, mask: Any, index: int
) -> tuple[Any, Any]:
    if _is_full(group, members, mask) and lane.ndim == 0 and clamp.ndim == 0:
        source, valid = _source_lane(mode, np.asarray(lane), np.asarray(clamp))
        if value.ndim == 0:
            return value, np.tile(valid, group.size // 32)
        shuffled = value.reshape(-1, 32).take(source, axis=1)
        return shuffled.reshape(-1), np.tile(valid, group.size // 32)
    warps = _Warps(group, mask)
    warps.members(members, index)
    source, valid = _source_lane(mode, warps.table(lane), warps.table(clamp))
    shuffled = np.take_along_axis(warps.table(value), np.broadcast_to(source, (warps.rows, 32)), axis=1)
    return warps.back(shuffled), warps.back(np.broadcast_to(valid, (warps.rows, 32)))


@helper
def warp_vote(group: Group, mode: str, predicate: Any, members: Any, mask: Any, index: int) -> Any:
    warps = _Warps(group, mask)
    named = warps.members(members, index) & warps.present
    votes = warps.table(predicate) & named
    if mode == "ballot":
        weights = np.uint32(1) << np.arange(32, dtype=np.uint32)
        result: Any = (votes * weights).sum(1, dtype=np.uint32)
    elif mode == "any":
        result = votes.any(1)
    elif mode == "all":
        result = (votes == named).all(1)
    elif mode == "uni":
        result = (votes == named).all(1) | ~votes.any(1)
    else:
        raise UnknownInstruction(f"vote.sync.{mode}")
    return result[warps.row]


_REDUCTIONS: dict[str, Any] = {
    "add": (np.add, 0),
    "min": (np.minimum, None),
    "max": (np.maximum, None),
    "and": (np.bitwise_and, -1),
    "or": (np.bitwise_or, 0),
    "xor": (np.bitwise_xor, 0),
}


@helper
def warp_reduce(
    group: Group, name: str, flags: tuple[str, ...], value: Any, members: Any, mask: Any, index: int
) -> Any:
    warps = _Warps(group, mask)
    named = warps.members(members, index) & warps.present
    table = warps.table(value)
    floating = table.dtype.kind == "f"
    if "abs" in flags:
        table = np.abs(table)
    if floating and "NaN" not in flags:
        ufunc = {"min": np.fmin, "max": np.fmax}[name]
    else:
        ufunc = _REDUCTIONS[name][0]
    # Absent lanes repeat the first member's value where that is harmless, else the neutral element.
    neutral = _REDUCTIONS[name][1]
    first = table[np.arange(warps.rows), named.argmax(1)][:, None]
    filler = first if neutral is None else np.array(neutral).astype(table.dtype)
    reduced = ufunc.reduce(np.where(named, table, filler), axis=1, dtype=table.dtype)
    return reduced[warps.row]


@helper
def warp_match(group: Group, every: bool, value: Any, members: Any, mask: Any, index: int) -> tuple[Any, Any]:
    warps = _Warps(group, mask)
    named = warps.members(members, index) & warps.present
    table = warps.table(value)
    equal = (table[:, :, None] == table[:, None, :]) & named[:, None, :]
    weights = np.uint32(1) << np.arange(32, dtype=np.uint32)
    masks = (equal * weights).sum(2, dtype=np.uint32)
    full = (named * weights).sum(1, dtype=np.uint32)[:, None]
    same = masks == full
    if every:
        masks = np.where(same, masks, np.uint32(0))
    return warps.back(masks), warps.back(same)


@helper
def active_lanes(group: Group) -> Any:
    warps = _Warps(group, None)
    weights = np.uint32(1) << np.arange(32, dtype=np.uint32)
    return (warps.present * weights).sum(1, dtype=np.uint32)[warps.row]


@helper
def warp_elect(group: Group, members: Any, mask: Any, index: int) -> tuple[Any, Any]:
    warps = _Warps(group, mask)
    named = warps.members(members, index) & warps.present
    leader = named.argmax(1)[warps.row]
    return leader.astype(np.uint32), warps.column == leader
