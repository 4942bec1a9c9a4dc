"""The named barriers of a wave's CTAs: who has come, who waits, when one is complete.

A thread count counts whole warps: the lanes that a warp's end of the block leaves empty, or that have exited, arrive
with the others of their warp. A barrier is complete when its count is reached, also by arrivals alone, and then starts
anew (PTX ISA, "bar, barrier"). What the ISA leaves undefined is a finding: other counts, or another kind of barrier,
than those who are there have given; a warp that arrives twice; more warps than the count. Arrivals at a barrier that is
never complete are none: a ping-pong kernel leaves the turn of a warpgroup that gets no tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from .assembly import EXIT
from .errors import BarrierMismatch
from .memory import Array
from .wave import Group, Wave
from .wave_state import WaveState

BARRIERS = 16
KINDS = ("sync", "red.popc", "red.and", "red.or")


@dataclass(frozen=True)
class BarrierUse:
    """A barrier instruction: does it wait, must whole warps execute it, its number in `KINDS`; `index` is its own."""

    waits: bool
    aligned: bool
    kind: int
    index: int


class NamedBarriers(WaveState):
    """What a wave's barriers know, by CTA and number, and where lanes wait.

    [ctas, 16]: `arrived`, arrivals that do not wait, of the phase that is being filled; `expected`, its thread count
    (0: every thread, -1: nobody has come yet); `kind`, of `KINDS`; `warps`, a bit for each warp that has come; `last`,
    the instruction that came last.
    [lanes]: `at`, the barrier where a lane waits or -1, `reading`, the instruction there, and `votes`, its predicate.
    """

    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        shape = (len(wave.ctas), BARRIERS)
        self.arrived, self.kind, self.warps, self.last = np.zeros((4, *shape), np.int64)
        self.expected = np.full(shape, -1)
        self.at, self.reading = np.full((2, wave.lanes), -1)
        self.votes = np.zeros(wave.lanes, bool)

    def enter(self, group: Group, lanes: Array, keys: Array, counts: Array, use: BarrierUse) -> None:
        """Notes who comes to which barrier, and reports what does not fit those who are there."""
        wave = group.wave
        expected, kind, warps = self.expected.reshape(-1), self.kind.reshape(-1), self.warps.reshape(-1)
        fresh = keys[expected[keys] < 0]
        if fresh.size:
            expected[keys] = np.where(expected[keys] < 0, counts, expected[keys])
            kind[fresh] = use.kind
        there = expected[keys]
        if (differs := _or_all(wave, there) != _or_all(wave, counts)).any():
            n = int(np.argmax(differs))
            what = f"is used with {_threads(counts[n])}, and with {_threads(there[n])}"
            self._mismatch(group, use.index, lanes[n], keys[n], what)
        if (differs := kind[keys] != use.kind).any():
            n = int(np.argmax(differs))
            here = KINDS[int(kind[keys[n]])]
            self._mismatch(group, use.index, lanes[n], keys[n], f"is used as a {KINDS[use.kind]}, and as a {here}")
        if use.aligned:
            first = np.flatnonzero(np.diff(lanes // 32, prepend=-1))
            bits = np.int64(1) << wave.thread_of_lane[lanes[first]] // 32
            # Waiting where one has arrived already is how a warp gives itself the first turn.
            if not use.waits and (again := warps[keys[first]] & bits != 0).any():
                n = int(first[np.argmax(again)])
                what = "is reached twice by this warp before it is complete"
                self._mismatch(group, use.index, lanes[n], keys[n], what)
            np.bitwise_or.at(warps, keys[first], bits)
        self.last.reshape(-1)[keys] = use.index

    def _mismatch(self, group: Group, index: int, lane: int, key: int, what: str) -> NoReturn:
        cta, number = divmod(int(key), BARRIERS)
        came = [warp for warp in range(32) if int(self.warps[cta, number]) >> warp & 1]
        last = group.wave.kernel.instructions[int(self.last[cta, number])]
        there = f"; there already: warps {came}, the last at {last.place}" if came else ""
        position = int(np.searchsorted(group.lane_numbers, lane))
        group.fail(BarrierMismatch, index, position, f"barrier {number} {what}{there}")

    def release(self, keys: Array, group: Group | None = None, index: int = 0) -> None:
        """Completes those of the barriers `keys` (ascending) to which everybody has come.

        group, index: who came last, to be named if they were too many.
        """
        wave = self.wave
        shape = (len(wave.ctas), wave.cta_lanes)
        for number in np.unique(keys % BARRIERS):
            ctas = keys[keys % BARRIERS == number] // BARRIERS
            here = self.at == number
            waiting = here.reshape(shape)[ctas].sum(1)
            arrived, expected = self.arrived[ctas, number], self.expected[ctas, number]
            counted = arrived + with_absent(wave, here).reshape(shape)[ctas].sum(1)
            alive = (wave.pc.reshape(shape)[ctas] < EXIT).sum(1)
            complete = np.where(expected > 0, counted >= expected, (expected == 0) & (waiting + arrived >= alive))
            if group is not None and (over := (expected > 0) & (counted > expected)).any():
                n = int(np.argmax(over))
                lane = group.lane_numbers[np.argmax(group.cta == ctas[n])]
                what = f"counts {int(expected[n])} threads, and {int(counted[n])} have come"
                self._mismatch(group, index, lane, ctas[n] * BARRIERS + number, what)
            if complete.any():
                self._complete(ctas[complete], int(number))

    def _complete(self, ctas: Array, number: int) -> None:
        """The barrier of that number is complete in these CTAs: who waits goes on, and it starts anew."""
        wave = self.wave
        self.arrived[ctas, number] = self.warps[ctas, number] = 0
        self.expected[ctas, number] = -1
        table = self.at.reshape(len(wave.ctas), wave.cta_lanes)
        freed = np.zeros(table.shape, bool)
        freed[ctas] = table[ctas] == number
        if self.kind[ctas, number].any():
            self._write_results(freed)
        flat = freed.reshape(-1)
        if wave.races is not None:
            wave.races.leave_named(np.flatnonzero(flat), ctas, number)
        self.at[flat] = -1
        wave.waiting[flat] = False
        if wave.trace is not None:
            left = np.flatnonzero(flat)
            wave.trace.release("bar", wave.cta_of_lane[left] * BARRIERS + number, left, f"bar.sync {number}")

    def _write_results(self, freed: Array) -> None:
        """Results of bar.red in the lanes `freed` [ctas, lanes of a CTA]: over all threads that came."""
        wave = self.wave
        votes = self.votes.reshape(freed.shape)
        count = np.broadcast_to((votes & freed).sum(1, keepdims=True), freed.shape).reshape(-1)
        every = np.broadcast_to((votes | ~freed).all(1, keepdims=True), freed.shape).reshape(-1)
        flat = freed.reshape(-1)
        for index in np.unique(self.reading[flat]):
            lanes = flat & (self.reading == index)
            instruction = wave.kernel.instructions[index]
            result = {"popc": count.astype(np.uint32), "and": every, "or": count > 0}
            values = next(v for name, v in result.items() if name in instruction.parts)
            group = wave.group(lanes)
            group.registers[wave.kernel.registers[instruction.operands[0]]] = values[group.lanes]

    def wake(self) -> None:
        """Threads that exited count as arrived where every thread of the CTA is expected."""
        self.release(np.flatnonzero(self.expected.reshape(-1) >= 0))

    def explain(self) -> list[str]:
        """For every CTA with waiters: the barrier, who waits and who has not come."""
        wave = self.wave
        lines = []
        at = self.at.reshape(len(wave.ctas), wave.cta_lanes)
        for cta in np.flatnonzero((at >= 0).any(1)):
            first = int(cta) * wave.cta_lanes
            for number in np.unique(at[cta][at[cta] >= 0]):
                waiting = np.flatnonzero(at[cta] == number)
                place = wave.kernel.instructions[int(self.reading[first + waiting[0]])].place
                counted = int(self.expected[cta, number])
                expected = counted or int((wave.pc.reshape(at.shape)[cta] < EXIT).sum())
                here = self.at == number
                came = int((with_absent(wave, here) if counted else here).reshape(at.shape)[cta].sum())
                came += int(self.arrived[cta, number])
                missing = sorted({int(t) // 32 for t in np.flatnonzero(at[cta] != number) if t < wave.threads})
                lines.append(
                    f"CTA {wave.locate(first)[0]}: barrier {int(number)} has {came} of {expected} threads; "
                    f"warps {sorted({int(t) // 32 for t in waiting})} wait at {place}; "
                    f"not there: warps {missing or 'none'}"
                )
        return lines


def with_absent(wave: Wave, here: Array) -> Array:
    """`here` [lanes] and the lanes of the same warps that have exited or never were."""
    warps = here.reshape(-1, 32).any(1)
    return here | ((wave.pc >= EXIT) & np.repeat(warps, 32))


def _or_all(wave: Wave, counts: Array) -> Array:
    return np.where(counts == 0, wave.cta_lanes, counts)


def _threads(count: int) -> str:
    return f"{int(count)} threads" if count else "all threads"
