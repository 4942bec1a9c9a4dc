"""Named barriers of a CTA: bar and barrier, .sync and .arrive, with and without a thread count.

A thread count counts whole warps: the lanes that a warp's end of the block leaves empty, or that have exited, arrive
with the others of their warp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..assembly import EXIT
from ..codegen import BlockBuilder
from ..errors import DivergentWarp, InvalidOperand
from ..memory import Array
from ..module import Instruction
from ..registry import EXPLAINERS, WAKERS, action, emits
from ..wave import Group, Wave

BARRIERS = 16


@dataclass
class NamedBarriers:
    """Per CTA and barrier: arrivals that do not wait, the expected count (0: every thread); per lane: where it waits.

    `at` is a barrier's number, or -1.

    `reading` is the index of the bar instruction at which a lane waits, for reports.
    """

    arrived: Array
    expected: Array
    at: Array
    reading: Array


def _state(wave: Wave) -> NamedBarriers:
    if "barriers" not in wave.state:
        counts = np.zeros((2, len(wave.ctas), BARRIERS), np.int64)
        lanes = np.full((2, wave.lanes), -1)
        wave.state["barriers"] = NamedBarriers(counts[0], counts[1], lanes[0], lanes[1])
    return wave.state["barriers"]


@emits("bar.sync", "barrier.sync", "barrier.cta.sync", "bar.cta.sync", ends_block=True)
def sync(b: BlockBuilder, i: Instruction) -> None:
    _barrier(b, i, wait=True)


@emits("bar.arrive", "barrier.arrive", "barrier.cta.arrive", "bar.cta.arrive", ends_block=True)
def arrive(b: BlockBuilder, i: Instruction) -> None:
    _barrier(b, i, wait=False)


def _barrier(b: BlockBuilder, i: Instruction, *, wait: bool) -> None:
    guard = "None" if i.guard is None else b.predicate(("!" if i.guard_negated else "") + i.guard)
    number = b.read(i.operands[0], "uint32")
    count = b.read(i.operands[1], "uint32") if len(i.operands) > 1 else "None"
    aligned = i.parts[0] == "bar" or "aligned" in i.parts
    b.finish(f"('bar', {guard}, {number}, {count}, {wait}, {aligned}, {i.index})", b.number + 1)


@action("bar")
def arrive_at(
    wave: Wave, group: Group, block: int, guard: Any, number: Any, count: Any, wait: bool, aligned: bool, index: int
) -> None:
    """The group arrives; the barriers that are now complete let their waiters go."""
    state = _state(wave)
    wave.pc[group.lanes] = block + 1
    taking = np.ones(group.size, bool) if guard is None else group.spread(guard)
    lanes = group.lane_numbers[taking]
    if lanes.size == 0:
        return
    if aligned:
        _check_convergence(wave, group, lanes, index)
    numbers = np.broadcast_to(number, (group.size,))[taking].astype(np.int64)
    if numbers.max() >= BARRIERS:
        group.fail(InvalidOperand, index, int(np.argmax(numbers)), f"barrier {int(numbers.max())}: there are 16")
    ctas = wave.cta_of_lane[lanes]
    if count is not None:
        state.expected[ctas, numbers] = _checked_count(group, count, index)[taking]
    if wait:
        state.at[lanes] = numbers
        state.reading[lanes] = index
        wave.waiting[lanes] = True
    else:
        here = np.zeros(wave.lanes, bool)
        here[lanes] = True
        np.add.at(state.arrived, (ctas, numbers), 1)
        # An aligned arrival is that of its whole warp, so the lanes that are gone are added here and only here.
        gone = np.flatnonzero(_with_absent(wave, here) & ~here) if aligned else lanes[:0]
        leaders = np.searchsorted(lanes // 32, gone // 32)
        np.add.at(state.arrived, (ctas[leaders], numbers[leaders]), 1)
    _release(wave, state, np.unique(ctas))


def _checked_count(group: Group, count: Any, index: int) -> Array:
    counts = np.broadcast_to(count, (group.size,))
    if (wrong := (counts == 0) | (counts % 32 != 0)).any():
        position = int(np.argmax(wrong))
        group.fail(
            InvalidOperand, index, position, f"{int(counts[position])} threads: a barrier counts in warps, 32 or more"
        )
    return counts


def _with_absent(wave: Wave, here: Array) -> Array:
    """`here` [lanes] and the lanes of the same warps that have exited or never were."""
    warps = here.reshape(-1, 32).any(1)
    return here | ((wave.pc >= EXIT) & np.repeat(warps, 32))


def _check_convergence(wave: Wave, group: Group, lanes: Array, index: int) -> None:
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


def _release(wave: Wave, state: NamedBarriers, ctas: Array) -> None:
    shape = (len(wave.ctas), wave.cta_lanes)
    at = state.at.reshape(shape)[ctas]
    alive_count = (wave.pc.reshape(shape)[ctas] < EXIT).sum(1)
    for number in np.unique(at[at >= 0]):
        waiting = (at == number).sum(1)
        expected = state.expected[ctas, number]
        counted = _with_absent(wave, state.at == number).reshape(shape)[ctas].sum(1) + state.arrived[ctas, number]
        all_came = waiting + state.arrived[ctas, number] >= alive_count
        complete = np.where(expected > 0, counted >= expected, all_came) & (waiting > 0)
        if not complete.any():
            continue
        done = ctas[complete]
        state.arrived[done, number] = 0
        state.expected[done, number] = 0
        lanes = state.at.reshape(len(wave.ctas), wave.cta_lanes)
        freed = np.zeros(lanes.shape, bool)
        freed[done] = lanes[done] == number
        flat = freed.reshape(-1)
        state.at[flat] = -1
        wave.waiting[flat] = False


def _explain(wave: Wave) -> list[str]:
    """For every CTA with waiters: the barrier, who waits and who has not come."""
    if "barriers" not in wave.state:
        return []
    state = _state(wave)
    lines = []
    at = state.at.reshape(len(wave.ctas), wave.cta_lanes)
    for cta in np.flatnonzero((at >= 0).any(1)):
        first = int(cta) * wave.cta_lanes
        for number in np.unique(at[cta][at[cta] >= 0]):
            waiting = np.flatnonzero(at[cta] == number)
            text = wave.kernel.instructions[int(state.reading[first + waiting[0]])].text
            counted = int(state.expected[cta, number])
            expected = counted or int((wave.pc.reshape(at.shape)[cta] < EXIT).sum())
            here = state.at == number
            came = int((_with_absent(wave, here) if counted else here).reshape(at.shape)[cta].sum())
            came += int(state.arrived[cta, number])
            missing = sorted({int(t) // 32 for t in np.flatnonzero(at[cta] != number) if t < wave.threads})
            lines.append(
                f"CTA {wave.locate(first)[0]}: barrier {int(number)} has {came} of {expected} threads; "
                f"warps {sorted({int(t) // 32 for t in waiting})} wait at `{text}`; "
                f"not there: warps {missing or 'none'}"
            )
    return lines


def _wake(wave: Wave) -> None:
    """Threads that exited count as arrived where every thread of the CTA is expected."""
    if "barriers" in wave.state:
        _release(wave, _state(wave), np.arange(len(wave.ctas)))


EXPLAINERS.append(_explain)
WAKERS.append(_wake)
