"""Named barriers of a CTA: bar and barrier, .sync, .arrive and .red, with and without a thread count.

`named_barriers` knows when they are complete.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..assembly import EXIT
from ..codegen import BlockBuilder
from ..errors import DivergentWarp, InvalidOperand
from ..memory import Array
from ..module import Instruction
from ..named_barriers import BARRIERS, KINDS, BarrierUse, NamedBarriers, with_absent
from ..registry import EXPLAINERS, WAKERS, action, emits
from ..wave import Group, Wave

_SYNC = ("bar.sync", "bar.cta.sync", "barrier.sync", "barrier.cta.sync")
_ARRIVE = ("bar.arrive", "bar.cta.arrive", "barrier.arrive", "barrier.cta.arrive")
_REDUCE = ("bar.red", "bar.cta.red", "barrier.red", "barrier.cta.red")


@emits(*_SYNC, *_ARRIVE, modifiers="aligned", ends_block=True)
def barrier(b: BlockBuilder, i: Instruction) -> None:
    """bar.sync a {, count}; bar.arrive a, count"""
    _use(b, i, i.operands, BarrierUse("arrive" not in i.parts, _is_aligned(i), 0, i.index), "None")


@emits(*_REDUCE, types="u32 pred", modifiers="aligned popc and or", ends_block=True)
def reducing_barrier(b: BlockBuilder, i: Instruction) -> None:
    """bar.red.popc.u32 d, a {, count}, {!}p; bar.red.and.pred and .or.pred likewise. The result comes with release."""
    kind = next(KINDS.index(f"red.{part}") for part in i.parts if part in ("popc", "and", "or"))
    b.written_after_block(i.operands[0])
    _use(b, i, i.operands[1:-1], BarrierUse(True, _is_aligned(i), kind, i.index), b.predicate(i.operands[-1]))


def _is_aligned(i: Instruction) -> bool:
    return i.parts[0] == "bar" or "aligned" in i.parts


def _use(b: BlockBuilder, i: Instruction, operands: tuple[str, ...], use: BarrierUse, vote: str) -> None:
    b.take_guard()
    number = b.read(operands[0], "uint32")
    count = b.read(operands[1], "uint32") if len(operands) > 1 else "None"
    b.finish(f"('bar', {b.mask}, {number}, {count}, {vote}, {b.constant(use)})", b.number + 1)


@action("bar")
def arrive_at(
    wave: Wave, group: Group, block: int, guard: Any, number: Any, count: Any, vote: Any, use: BarrierUse
) -> None:
    """The group arrives; the barriers that are now complete let their waiters go."""
    state = NamedBarriers.of(wave)
    wave.pc[group.lanes] = block + 1
    taking = group.taking(guard)
    lanes = group.lane_numbers[taking]
    if lanes.size == 0:
        return
    if use.aligned:
        check_convergence(wave, group, lanes, use.index)
    numbers = np.broadcast_to(number, (group.size,))[taking].astype(np.int64)
    if numbers.max() >= BARRIERS:
        group.fail(
            InvalidOperand, use.index, int(np.argmax(numbers)), f"named barrier {int(numbers.max())}: a CTA has 0 to 15"
        )
    counts = np.zeros(lanes.size, np.int64) if count is None else _checked_count(group, count, use.index)[taking]
    keys = wave.cta_of_lane[lanes] * BARRIERS + numbers
    state.enter(group, lanes, keys, counts, use)
    if wave.trace is not None:
        wave.trace.arrive("bar", state.expected.size, keys, lanes)
    if wave.races is not None:
        wave.races.named.release(lanes, keys)
    if use.waits:
        state.at[lanes] = numbers
        state.reading[lanes] = use.index
        if use.kind:
            state.votes[lanes] = group.spread(vote)[taking]
        wave.waiting[lanes] = True
    else:
        arrived = state.arrived.reshape(-1)
        np.add.at(arrived, keys, 1)
        if use.aligned:
            # An aligned arrival is that of its whole warp, so the lanes that are gone are added here and only here.
            here = np.zeros(wave.lanes, bool)
            here[lanes] = True
            gone = np.flatnonzero(with_absent(wave, here) & ~here)
            np.add.at(arrived, keys[np.searchsorted(lanes // 32, gone // 32)], 1)
    state.release(np.unique(keys), group, use.index)


def _checked_count(group: Group, count: Any, index: int) -> Array:
    counts = np.broadcast_to(count, (group.size,))
    if (wrong := (counts == 0) | (counts % 32 != 0)).any():
        position = int(np.argmax(wrong))
        group.fail(
            InvalidOperand, index, position, f"{int(counts[position])} threads: a barrier counts in warps, 32 or more"
        )
    return counts.astype(np.int64)


def check_convergence(wave: Wave, group: Group, lanes: Array, index: int) -> None:
    """An aligned barrier needs all threads of a warp that have not exited: `lanes` are those that execute it."""
    if group.has_whole_warps and lanes.size == group.size:
        return
    here = np.zeros(wave.lanes, bool)
    here[lanes] = True
    alive = wave.pc < EXIT
    warps = here.reshape(-1, 32).any(1)
    missing = (alive & ~here).reshape(-1, 32).any(1) & warps
    if missing.any():
        warp = int(np.flatnonzero(missing)[0])
        position = int(np.searchsorted(group.lane_numbers, lanes[lanes // 32 == warp][0]))
        present = int(here.reshape(-1, 32)[warp].sum())
        group.fail(
            DivergentWarp, index, position, f"barrier reached by {present} lanes of a warp and not by the others"
        )


WAKERS.append(NamedBarriers.calling("wake"))
EXPLAINERS.append(NamedBarriers.calling("explain"))
