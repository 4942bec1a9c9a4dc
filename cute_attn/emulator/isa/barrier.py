"""Named barriers of a CTA: bar and barrier, .sync, .arrive and .red, with and without a thread count."""

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
    if aligned and guard is None:
        _check_convergence(wave, group, index)
    numbers = np.broadcast_to(number, (group.size,))[taking].astype(np.int64)
    if lanes.size == 0:
        return
    if numbers.max() >= BARRIERS:
        group.fail(InvalidOperand, index, int(np.argmax(numbers)), f"barrier {int(numbers.max())}: there are 16")
    ctas = wave.cta_of_lane[lanes]
    if count is not None:
        state.expected[ctas, numbers] = np.broadcast_to(count, (group.size,))[taking]
    if wait:
        state.at[lanes] = numbers
        state.reading[lanes] = index
        wave.waiting[lanes] = True
    else:
        np.add.at(state.arrived, (ctas, numbers), 1)
    _release(wave, state, np.unique(ctas))


def _check_convergence(wave: Wave, group: Group, index: int) -> None:
    """An aligned barrier needs all threads of a warp that have not exited."""
    if group.has_whole_warps:
        return
    here = np.zeros(wave.lanes, bool)
    here[group.lanes] = True
    alive = (wave.pc < EXIT) | here
    warps = here.reshape(-1, 32).any(1)
    missing = (alive & ~here).reshape(-1, 32).any(1) & warps
    if missing.any():
        warp = int(np.flatnonzero(missing)[0])
        position = int(np.searchsorted(group.lane_numbers, warp * 32))
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
        total = waiting + state.arrived[ctas, number]
        expected = state.expected[ctas, number]
        complete = (total >= np.where(expected > 0, expected, alive_count)) & (waiting > 0)
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
            expected = int(state.expected[cta, number]) or int((wave.pc.reshape(at.shape)[cta] < EXIT).sum())
            came = waiting.size + int(state.arrived[cta, number])
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
