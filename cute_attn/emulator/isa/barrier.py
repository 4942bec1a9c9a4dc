"""Named barriers of a CTA: bar and barrier, .sync, .arrive and .red, with and without a thread count.

A thread count counts whole warps: the lanes that a warp's end of the block leaves empty, or that have exited, arrive
with the others of their warp. A barrier is complete when its count is reached, also by arrivals alone, and then starts
anew (PTX ISA, "bar, barrier"). What the ISA leaves undefined is a finding: other counts, or another kind of barrier,
than those who are there have given; a warp that arrives twice; more warps than the count. Arrivals at a barrier that is
never complete are none: a ping-pong kernel leaves the turn of a warpgroup that gets no tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ..assembly import EXIT
from ..codegen import BlockBuilder
from ..errors import BarrierMismatch, DivergentWarp, InvalidOperand
from ..memory import Array
from ..module import Instruction
from ..registry import EXPLAINERS, WAKERS, action, emits
from ..wave import Group, Wave
from ..wave_state import WaveState

BARRIERS = 16
_KINDS = ("sync", "red.popc", "red.and", "red.or")


class NamedBarriers(WaveState):
    """What a wave's barriers know, by CTA and number, and where lanes wait.

    [ctas, 16]: `arrived`, arrivals that do not wait, of the phase that is being filled; `expected`, its thread count
    (0: every thread, -1: nobody has come yet); `kind`, of `_KINDS`; `warps`, a bit for each warp that has come; `last`,
    the instruction that came last.
    [lanes]: `at`, the barrier where a lane waits or -1, `reading`, the instruction there, and `votes`, its predicate.
    """

    def __init__(self, wave: Wave) -> None:
        shape = (len(wave.ctas), BARRIERS)
        self.arrived, self.kind, self.warps, self.last = np.zeros((4, *shape), np.int64)
        self.expected = np.full(shape, -1)
        self.at, self.reading = np.full((2, wave.lanes), -1)
        self.votes = np.zeros(wave.lanes, bool)


@dataclass(frozen=True)
class BarrierUse:
    """A barrier instruction: does it wait, must whole warps execute it, its number in `_KINDS`; `index` is its own."""

    waits: bool
    aligned: bool
    kind: int
    index: int


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
    kind = next(_KINDS.index(f"red.{part}") for part in i.parts if part in ("popc", "and", "or"))
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
        _check_convergence(wave, group, lanes, use.index)
    numbers = np.broadcast_to(number, (group.size,))[taking].astype(np.int64)
    if numbers.max() >= BARRIERS:
        group.fail(
            InvalidOperand, use.index, int(np.argmax(numbers)), f"named barrier {int(numbers.max())}: a CTA has 0 to 15"
        )
    counts = np.zeros(lanes.size, np.int64) if count is None else _checked_count(group, count, use.index)[taking]
    keys = wave.cta_of_lane[lanes] * BARRIERS + numbers
    _enter(state, group, lanes, keys, counts, use)
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
            gone = np.flatnonzero(_with_absent(wave, here) & ~here)
            np.add.at(arrived, keys[np.searchsorted(lanes // 32, gone // 32)], 1)
    _release(wave, state, np.unique(keys), group, use.index)


def _checked_count(group: Group, count: Any, index: int) -> Array:
    counts = np.broadcast_to(count, (group.size,))
    if (wrong := (counts == 0) | (counts % 32 != 0)).any():
        position = int(np.argmax(wrong))
        group.fail(
            InvalidOperand, index, position, f"{int(counts[position])} threads: a barrier counts in warps, 32 or more"
        )
    return counts.astype(np.int64)


def _enter(state: NamedBarriers, group: Group, lanes: Array, keys: Array, counts: Array, use: BarrierUse) -> None:
    """Notes who comes to which barrier, and reports what does not fit those who are there."""
    wave = group.wave
    expected, kind, warps = state.expected.reshape(-1), state.kind.reshape(-1), state.warps.reshape(-1)
    fresh = keys[expected[keys] < 0]
    if fresh.size:
        expected[keys] = np.where(expected[keys] < 0, counts, expected[keys])
        kind[fresh] = use.kind
    there = expected[keys]
    if (differs := (there != counts) & (np.where(there == 0, wave.cta_lanes, there) != _or_all(wave, counts))).any():
        n = int(np.argmax(differs))
        _mismatch(
            state, group, use.index, lanes[n], keys[n],
            f"is used with {_threads(counts[n])}, and with {_threads(there[n])}",
        )  # fmt: skip
    if (differs := kind[keys] != use.kind).any():
        n = int(np.argmax(differs))
        here = _KINDS[int(kind[keys[n]])]
        _mismatch(state, group, use.index, lanes[n], keys[n], f"is used as a {_KINDS[use.kind]}, and as a {here}")
    if use.aligned:
        first = np.flatnonzero(np.diff(lanes // 32, prepend=-1))
        bits = np.int64(1) << wave.thread_of_lane[lanes[first]] // 32
        # Waiting where one has arrived already is how a warp gives itself the first turn.
        if not use.waits and (again := warps[keys[first]] & bits != 0).any():
            n = int(first[np.argmax(again)])
            _mismatch(state, group, use.index, lanes[n], keys[n], "is reached twice by this warp before it is complete")
        np.bitwise_or.at(warps, keys[first], bits)
    state.last.reshape(-1)[keys] = use.index


def _or_all(wave: Wave, counts: Array) -> Array:
    return np.where(counts == 0, wave.cta_lanes, counts)


def _threads(count: int) -> str:
    return f"{int(count)} threads" if count else "all threads"


def _mismatch(state: NamedBarriers, group: Group, index: int, lane: int, key: int, what: str) -> NoReturn:
    cta, number = divmod(int(key), BARRIERS)
    came = [warp for warp in range(32) if int(state.warps[cta, number]) >> warp & 1]
    last = group.wave.kernel.instructions[int(state.last[cta, number])]
    there = f"; there already: warps {came}, the last at {last.place}" if came else ""
    position = int(np.searchsorted(group.lane_numbers, lane))
    group.fail(BarrierMismatch, index, position, f"barrier {number} {what}{there}")


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


def _release(wave: Wave, state: NamedBarriers, keys: Array, group: Group | None = None, index: int = 0) -> None:
    """Completes those of the barriers `keys` (ascending) to which everybody has come.

    group, index: who came last, to be named if they were too many.
    """
    shape = (len(wave.ctas), wave.cta_lanes)
    for number in np.unique(keys % BARRIERS):
        ctas = keys[keys % BARRIERS == number] // BARRIERS
        here = state.at == number
        waiting = here.reshape(shape)[ctas].sum(1)
        arrived, expected = state.arrived[ctas, number], state.expected[ctas, number]
        counted = arrived + _with_absent(wave, here).reshape(shape)[ctas].sum(1)
        alive = (wave.pc.reshape(shape)[ctas] < EXIT).sum(1)
        complete = np.where(expected > 0, counted >= expected, (expected == 0) & (waiting + arrived >= alive))
        if group is not None and (over := (expected > 0) & (counted > expected)).any():
            n = int(np.argmax(over))
            lane = group.lane_numbers[np.argmax(group.cta == ctas[n])]
            what = f"counts {int(expected[n])} threads, and {int(counted[n])} have come"
            _mismatch(state, group, index, lane, ctas[n] * BARRIERS + number, what)
        if complete.any():
            _complete(wave, state, ctas[complete], int(number))


def _complete(wave: Wave, state: NamedBarriers, ctas: Array, number: int) -> None:
    """The barrier of that number is complete in these CTAs: who waits goes on, and it starts anew."""
    state.arrived[ctas, number] = state.warps[ctas, number] = 0
    state.expected[ctas, number] = -1
    table = state.at.reshape(len(wave.ctas), wave.cta_lanes)
    freed = np.zeros(table.shape, bool)
    freed[ctas] = table[ctas] == number
    if state.kind[ctas, number].any():
        _write_results(wave, state, freed)
    flat = freed.reshape(-1)
    if wave.races is not None:
        wave.races.leave_named(np.flatnonzero(flat), ctas, number)
    state.at[flat] = -1
    wave.waiting[flat] = False
    if wave.trace is not None:
        left = np.flatnonzero(flat)
        wave.trace.release("bar", wave.cta_of_lane[left] * BARRIERS + number, left, f"bar.sync {number}")


def _write_results(wave: Wave, state: NamedBarriers, freed: Array) -> None:
    """Results of bar.red in the lanes `freed` [ctas, lanes of a CTA]: over all threads that came."""
    votes = state.votes.reshape(freed.shape)
    count = np.broadcast_to((votes & freed).sum(1, keepdims=True), freed.shape).reshape(-1)
    every = np.broadcast_to((votes | ~freed).all(1, keepdims=True), freed.shape).reshape(-1)
    flat = freed.reshape(-1)
    for index in np.unique(state.reading[flat]):
        lanes = flat & (state.reading == index)
        instruction = wave.kernel.instructions[index]
        result = {"popc": count.astype(np.uint32), "and": every, "or": count > 0}
        values = next(v for name, v in result.items() if name in instruction.parts)
        group = wave.group(lanes)
        group.registers[wave.kernel.registers[instruction.operands[0]]] = values[group.lanes]


# ---- reports


def _explain(wave: Wave) -> list[str]:
    """For every CTA with waiters: the barrier, who waits and who has not come."""
    if (state := NamedBarriers.known(wave)) is None:
        return []
    lines = []
    at = state.at.reshape(len(wave.ctas), wave.cta_lanes)
    for cta in np.flatnonzero((at >= 0).any(1)):
        first = int(cta) * wave.cta_lanes
        for number in np.unique(at[cta][at[cta] >= 0]):
            waiting = np.flatnonzero(at[cta] == number)
            place = wave.kernel.instructions[int(state.reading[first + waiting[0]])].place
            counted = int(state.expected[cta, number])
            expected = counted or int((wave.pc.reshape(at.shape)[cta] < EXIT).sum())
            here = state.at == number
            came = int((_with_absent(wave, here) if counted else here).reshape(at.shape)[cta].sum())
            came += int(state.arrived[cta, number])
            missing = sorted({int(t) // 32 for t in np.flatnonzero(at[cta] != number) if t < wave.threads})
            lines.append(
                f"CTA {wave.locate(first)[0]}: barrier {int(number)} has {came} of {expected} threads; "
                f"warps {sorted({int(t) // 32 for t in waiting})} wait at {place}; "
                f"not there: warps {missing or 'none'}"
            )
    return lines


def _wake(wave: Wave) -> None:
    """Threads that exited count as arrived where every thread of the CTA is expected."""
    if (state := NamedBarriers.known(wave)) is not None:
        _release(wave, state, np.flatnonzero(state.expected.reshape(-1) >= 0))


EXPLAINERS.append(_explain)
WAKERS.append(_wake)
