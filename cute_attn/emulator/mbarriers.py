"""The mbarriers of a wave: counts, phases, and the copies in flight that report to them.

A phase completes when its pending arrivals are in and the bytes announced (expect_tx) equal the bytes that copies have
reported (complete_tx); the next phase starts at once with the full count (PTX ISA, "Parallel Synchronization and
Communication Instructions: mbarrier"). A barrier is the pair (CTA of the wave, slot); a slot is one offset in shared
memory, the same in all CTAs. A pair is carried as one number, its *key*.

Copies land as late as possible: when no thread of the wave can run and one of them waits at the barrier that the copy
reports to (`land_awaited`), or earlier if a seed says so (`drift`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .async_work import Transfers
from .errors import BarrierMismatch
from .memory import Array
from .wave import Wave
from .wave_state import WaveState

MAX_COUNT = (1 << 20) - 1
"""Largest arrival count, and largest absolute value of the bytes outstanding (PTX ISA, "Contents of the mbarrier")."""
TIMEOUTS = 3
"""How often a wait at one instruction may time out while no barrier changes, before the wave counts as stuck."""


@dataclass
class Waiters:
    """Per lane: the key of the barrier it waits at (-1: none), the phase it waits for, the instruction, timeouts."""

    key: Array
    phase: Array
    index: Array
    expired: Array
    timeouts: Array


class Mbarriers(WaveState):
    """Flat arrays over keys. `count`: arrivals per phase (0: no barrier here). `phase` counts completed phases."""

    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        self.slots = wave.shared.stride // 8
        size = len(wave.ctas) * self.slots
        self.count = np.zeros(size, np.int64)
        self.pending = np.zeros(size, np.int64)
        self.bytes = np.zeros(size, np.int64)
        self.phase = np.zeros(size, np.int64)
        self.in_flight = np.zeros(size, np.int64)
        self.polled: set[int] = set()
        self._told = np.full((3, wave.lanes), -1, np.int64)
        self._transfers: list[Transfers] = []
        none = np.full(wave.lanes, -1, np.int64)
        zero = np.zeros(wave.lanes, np.int64)
        self.waiters = Waiters(none, zero, zero.copy(), np.zeros(wave.lanes, bool), zero.copy())

    def key(self, cta: Array, offset: Array) -> Array:
        return cta * self.slots + (offset.astype(np.int64) >> 3)

    def place(self, keys: Array) -> tuple[Array, Array]:
        """(CTA of the wave, offset in its shared memory)."""
        return keys // self.slots, keys % self.slots * 8

    def describe(self, key: int) -> str:
        """ "mbarrier at 0x10 of CTA (0, 0, 0)", for findings."""
        cta = self.wave.locate(key // self.slots * self.wave.cta_lanes)[0]
        return f"mbarrier at shared offset {key % self.slots * 8:#x} of CTA {cta}"

    # ---- changes

    def fits(self, keys: Array, counts: Array) -> Array:
        """Which of these arrivals, in their order, belong to the phases in progress; the first of a barrier does."""
        unique, sums = _sums(keys, counts)
        if (sums <= self.pending[unique]).all():
            return np.ones(keys.size, bool)
        order = np.argsort(keys, kind="stable")
        total = np.cumsum(counts[order])
        first = np.diff(keys[order], prepend=-1) != 0
        before = (total - counts[order])[first]
        total -= np.repeat(before, np.diff(np.flatnonzero(first), append=keys.size))
        found = np.empty(keys.size, bool)
        found[order] = first | (total <= self.pending[keys[order]])
        return found

    def initialize(self, keys: Array, counts: Array) -> None:
        self.count[keys] = self.pending[keys] = counts
        self.bytes[keys] = self.phase[keys] = 0

    def arrive(self, keys: Array, counts: Array) -> None:
        """Arrivals, which may complete phases. Raises BarrierMismatch if a phase gets more than it has left."""
        keys, counts = _sums(keys, counts)
        while keys.size:
            taken = np.minimum(counts, self.pending[keys])
            self.pending[keys] -= taken
            counts = counts - taken
            self._settle(keys)
            left = counts > 0
            if (stuck := left & (self.pending[keys] == 0)).any():
                key = int(keys[stuck][0])
                raise BarrierMismatch(
                    f"more arrivals than expected: {self.describe(key)} counts {int(self.count[key])} per phase, all "
                    f"have come, and the phase still waits for {int(self.bytes[key])} bytes"
                )
            keys, counts = keys[left], counts[left]

    def enlarge(self, keys: Array) -> None:
        """Expects one arrival more per key in the current phase."""
        np.add.at(self.pending, keys, 1)

    def expect(self, keys: Array, nbytes: Array) -> None:
        """Announces bytes of the current phase."""
        keys, nbytes = _sums(keys, nbytes)
        self.bytes[keys] += nbytes
        self._check_range(keys)

    def report(self, keys: Array, nbytes: Array, index: int | None = None) -> None:
        """Bytes that have arrived, by copies of instruction `index`; may complete phases."""
        keys, nbytes = _sums(keys, nbytes)
        self.bytes[keys] -= nbytes
        self._check_range(keys)
        if (early := (self.pending[keys] == 0) & (self.bytes[keys] < 0)).any():
            key = int(keys[early][0])
            copy = "" if index is None else f"\n  the last of them by {self.wave.kernel.instructions[index].place}"
            raise BarrierMismatch(
                f"{int(-self.bytes[key])} bytes more than expect_tx announced were copied: {self.describe(key)}, phase "
                f"{int(self.phase[key])}{copy}"
            )
        self._settle(keys)

    def drop(self, keys: Array, counts: Array) -> None:
        """Lowers the count of this and of all later phases, as an arrival that will not come back."""
        unique, sums = _sums(keys, counts)
        self.count[unique] -= sums
        self.arrive(keys, counts)

    def _check_range(self, keys: Array) -> None:
        if (wide := np.abs(self.bytes[keys]) > MAX_COUNT).any():
            key = int(keys[wide][0])
            raise BarrierMismatch(
                f"{int(self.bytes[key])} bytes outstanding at {self.describe(key)}: the limit is {MAX_COUNT}"
            )

    def _settle(self, keys: Array) -> None:
        """Completes the phases that have all they wait for."""
        done = keys[(self.pending[keys] == 0) & (self.bytes[keys] == 0)]
        self.waiters.timeouts[:] = 0
        if not done.size:
            return
        if (early := self.in_flight[done] > 0).any():
            key = int(done[early][0])
            transfer = next(t for t in self._transfers if (self.key(t.cta, t.offset) == key).any())
            raise BarrierMismatch(
                f"phase {int(self.phase[key])} of the {self.describe(key)} completes while a copy that reports to it "
                "is in flight: expect_tx announced too few bytes for\n  "
                f"{self.wave.kernel.instructions[transfer.index].place}"
            )
        self.phase[done] += 1
        if self.wave.trace is not None:
            self.wave.trace.complete(self.count.size, done)
        if self.wave.races is not None:
            self.wave.races.mbarriers.completed(done)
        self.pending[done] = self.count[done]
        waiters = self.waiters
        freed = np.isin(waiters.key, done)
        waiters.key[freed] = -1
        self.wave.waiting[freed] = self.wave.awaits_others[freed] = False

    # ---- copies in flight

    def issue(self, transfers: Transfers) -> None:
        """Takes charge of copies that will report to these barriers."""
        if self.wave.trace is not None:
            self.wave.trace.copies(self.count.size, self.key(transfers.cta, transfers.offset), transfers)
        np.add.at(self.in_flight, self.key(transfers.cta, transfers.offset), 1)
        self._transfers.append(transfers)

    def _land(self, wanted: Array) -> None:
        """Performs the copies in flight that report to the wanted keys, in the order in which they were issued."""
        left, reports = [], []
        for transfers in self._transfers:
            keys = self.key(transfers.cta, transfers.offset)
            now = wanted[keys]
            if not now.any():
                left.append(transfers)
                continue
            transfers.perform(np.flatnonzero(now))
            np.subtract.at(self.in_flight, keys[now], 1)
            reports.append((keys[now], transfers.nbytes[now], transfers))
            if not now.all():
                left.append(transfers.part(np.flatnonzero(~now)))
        self._transfers = left
        for keys, nbytes, transfers in reports:
            if transfers.arrivals:
                self.arrive(keys, np.full(keys.size, transfers.arrivals))
            self.report(keys, nbytes, transfers.index)

    def land_awaited(self) -> None:
        """Lands what somebody waits or polls for."""
        if not self._transfers:
            return
        keys = np.unique(np.concatenate([self.waiters.key[self.waiters.key >= 0], np.array(sorted(self.polled), int)]))
        self.polled.clear()
        keys = keys[self.in_flight[keys] > 0]
        if (random := self.wave.random) is not None and keys.size:
            keys = random.choice(keys, size=int(random.integers(1, keys.size + 1)), replace=False)
        wanted = np.zeros(self.count.size, bool)
        wanted[keys] = True
        self._land(wanted)

    def drift(self) -> None:
        """Lands a random part of what is in flight."""
        assert self.wave.random is not None
        if self._transfers:
            self._land(self.wave.random.random(self.count.size) < 0.5)

    # ---- waiting

    def park(self, lanes: Array, keys: Array, phases: Array, index: int) -> None:
        """These lanes wait until their barriers have completed the phases of these numbers."""
        waiters = self.waiters
        waiters.key[lanes], waiters.phase[lanes], waiters.index[lanes] = keys, phases, index
        self.wave.waiting[lanes] = self.wave.awaits_others[lanes] = True

    def asked_again(self, lanes: Array, keys: Array, phases: Array, told: Array, index: int) -> Array:
        """Which of the lanes that are told that these phases are not complete have been told so before: they poll."""
        now = np.stack([keys, phases, np.full(lanes.size, index)])
        again: Array = told & (self._told[:, lanes] == now).all(0)
        self._told[:, lanes[told]] = now[:, told]
        self.polled.update(keys[again].tolist())
        return again

    def expire(self) -> None:
        """Lets every wait of this wave time out, unless that has been tried in vain."""
        waiters = self.waiters
        now = (waiters.key >= 0) & (waiters.timeouts < TIMEOUTS)
        waiters.timeouts[now] += 1
        waiters.expired[now] = True
        waiters.key[now] = -1
        self.wave.waiting[now] = self.wave.awaits_others[now] = False

    def explain(self) -> list[str]:
        """For every barrier at which lanes wait, or which they poll: who does, and what has not come."""
        told, phases, _ = self._told
        polls = self.wave.yielded & (told >= 0)
        polls[polls] = self.phase[told[polls]] == phases[polls]
        return [
            *self._explain("wait", self.waiters.key, self.waiters.index),
            *self._explain("poll", np.where(polls, told, -1), self._told[2]),
        ]

    def _explain(self, verb: str, at: Array, index: Array) -> list[str]:
        lines = []
        for key in np.unique(at[at >= 0]).tolist():
            lanes = np.flatnonzero(at == key)
            warps = sorted({int(t) // 32 for t in self.wave.thread_of_lane[lanes]})
            text = self.wave.kernel.instructions[int(index[lanes[0]])].place
            lacking = []
            if self.pending[key]:
                lacking.append(f"{int(self.pending[key])} of {int(self.count[key])} arrivals have not come")
            if self.bytes[key]:
                lacking.append(f"{int(self.bytes[key])} bytes announced by expect_tx are not being copied")
            lines.append(
                f"{self.describe(key)}, phase {int(self.phase[key])}: {', '.join(lacking)}; CTA "
                f"{self.wave.locate(int(lanes[0]))[0]} warps {warps} {verb} at {text}"
            )
        return lines

    def finish(self) -> None:
        """At the exit of the last thread: reports copies whose bytes nobody waited for."""
        if not self._transfers:
            return
        transfers = self._transfers[0]
        barrier = self.describe(int(self.key(transfers.cta, transfers.offset)[0]))
        raise BarrierMismatch(
            f"kernel {self.wave.kernel.name} ends with a copy in flight that nobody waited for, into shared memory "
            f"that the next CTA may own: it reports to the {barrier}\n  instruction: "
            f"{self.wave.kernel.instructions[transfers.index].place}"
        )


def _sums(keys: Array, amounts: Array) -> tuple[Array, Array]:
    """Unique keys and the sum of the amounts of each."""
    if keys.size == 1:
        return keys, amounts.astype(np.int64)
    unique, inverse = np.unique(keys, return_inverse=True)
    if unique.size == keys.size:
        return keys, amounts.astype(np.int64)
    sums = np.zeros(unique.size, np.int64)
    np.add.at(sums, inverse, amounts)
    return unique, sums
