"""Which lanes run next: the lowest basic block that has a runnable lane, all its lanes at once.

Lowest first makes diverged lanes meet again at the block after a branch, as the hardware's reconvergence does for
structured control flow. With a seed, one of the blocks at which some warp stands is drawn instead, and a random part
of the warps there takes the step: another order that the hardware could have taken. Lanes of one warp still wait for
each other.

A block returns a tuple whose first element names an action (`registry.action`); the action moves the program
counters. A lane that has to wait is `waiting` until an action releases it. A lane that polls has `yielded`: it runs
again when nobody else can, which is also when asynchronous work completes (`registry.WAKERS`). When nobody can run and
no wait can time out, the wait is a deadlock, explained by `registry.EXPLAINERS`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import registry
from .assembly import EXIT
from .errors import Deadlock
from .memory import Array
from .program import Program
from .wave import Wave

POLLING_ROUNDS = 20_000
"""Rounds in which lanes only polled, and nobody exited or stopped waiting, after which they are said to hang."""
DRIFT = 0.1
"""With a seed: how often asynchronous work may complete before anybody waits for it."""


def _choose(pc: Array, random: np.random.Generator | None) -> tuple[int, Array]:
    """(block, mask of the lanes that run it)."""
    block = int(pc.min())
    if random is None or block >= EXIT:
        return block, pc == block
    warp_pc = pc.reshape(-1, 32).min(1)
    block = int(random.choice(np.unique(warp_pc[warp_pc < EXIT])))
    here = np.flatnonzero(warp_pc == block)
    chosen = random.choice(here, size=int(random.integers(1, here.size + 1)), replace=False)
    warps = np.zeros(warp_pc.size, bool)
    warps[chosen] = True
    return block, (pc == block) & np.repeat(warps, 32)


def _deadlock(wave: Wave, what: str) -> Deadlock:
    lines = [line for explain in registry.EXPLAINERS for line in explain(wave)]
    error = Deadlock(f"deadlock in kernel {wave.kernel.name}: {what}\n  " + "\n  ".join(lines))
    error.kernel = wave.kernel.name
    return error


class _Scheduler:
    """The order of one wave."""

    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        self.rounds = 0
        self.seen: Array = np.zeros(0)

    def next(self) -> tuple[int, Array] | None:
        """(block, mask of its lanes) to run; None when every lane has exited. Raises Deadlock."""
        wave = self.wave
        while True:
            if wave.random is not None and wave.random.random() < DRIFT:
                for drift in registry.DRIFTERS:
                    drift(wave)
            pc = np.where(wave.waiting | wave.yielded, EXIT, wave.pc)
            block, mask = _choose(pc, wave.random)
            if block < EXIT:
                return block, mask
            if not (wave.pc < EXIT).any():
                return None
            self._wake()

    def _wake(self) -> None:
        """Nobody can run: asynchronous work completes, then polling lanes run again, then waits time out."""
        wave = self.wave
        for wake in registry.WAKERS:
            wake(wave)
        if (runnable := ~wave.waiting & (wave.pc < EXIT)).any():
            if wave.yielded.any() and not (runnable & ~wave.yielded).any():
                self._count_polling_rounds()
            wave.yielded[:] = False
            return
        for expire in registry.TIMEOUTS:
            expire(wave)
        if not (~wave.waiting & (wave.pc < EXIT)).any():
            raise _deadlock(wave, "no thread can run any more")

    def _count_polling_rounds(self) -> None:
        """Raises Deadlock if lanes poll and poll while the set of those who wait or have exited stays the same."""
        wave = self.wave
        idle = wave.waiting | (wave.pc >= EXIT)
        if not np.array_equal(idle, self.seen):
            self.seen, self.rounds = idle, 0
        self.rounds += 1
        if self.rounds > POLLING_ROUNDS:
            lane = int(np.argmax(~idle))
            cta, thread = wave.locate(lane)
            raise _deadlock(wave, f"CTA {cta}, thread {thread} polls for what nobody does")


def run(wave: Wave, program: Program, executed: Array) -> None:
    """Runs every lane of the wave to its exit. `executed[b]` counts the lanes that ran block b."""
    profiled = wave.profile is not None
    order = _Scheduler(wave)
    with np.errstate(all="ignore"):
        while (choice := order.next()) is not None:
            block, mask = choice
            group = wave.group(mask)
            executed[block] += group.size
            outcome: tuple[Any, ...] = program.function(block, profiled)(group, group.registers)
            registry.ACTIONS[outcome[0]](wave, group, block, *outcome[1:])
        for finish in registry.FINISHERS:
            finish(wave)
