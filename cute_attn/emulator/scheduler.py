"""Which lanes run next: the lowest basic block that has a runnable lane, all its lanes at once.

Lowest first makes diverged lanes meet again at the block after a branch, as the hardware's reconvergence does for
structured control flow. With a seed, one of the blocks at which some warp stands is drawn instead, and a random part
of the warps there takes the step: another order that the hardware could have taken. Lanes of one warp still wait for
each other, and at instructions of a warpgroup so do its warps.

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
from .errors import Deadlock, EmulatorError, EmulatorFault
from .memory import Array
from .program import Program
from .wave import Group, Wave

POLLING_ROUNDS = 20_000
"""Rounds in which lanes only polled, and nobody exited or stopped waiting, after which they are said to hang."""
STILL_ROUNDS = 100
"""Such rounds from one look at the registers to the next: if they hold the same, they always will."""
DRIFT = 0.1
"""With a seed: how often asynchronous work may complete before anybody waits for it."""


def _choose(wave: Wave, program: Program, pc: Array) -> tuple[int, Array]:
    """(block, mask of the lanes that run it). pc: EXIT for lanes that cannot run; changed in place."""
    random = wave.random
    while (block := _block(pc, random)) < EXIT:
        here = pc == block
        if random is not None:
            here &= np.repeat(pc.reshape(-1, 32).min(1) == block, 32)
        if block in program.whole_warpgroups:
            here = wave.whole_warpgroups(here)
            if not here.any():
                pc[pc == block] = EXIT
                continue
            unit = wave.warpgroup_of_lane
        else:
            unit = wave.warp_of_lane
        return block, here if random is None else _part(here, unit, random)
    return block, pc == block


def _block(pc: Array, random: np.random.Generator | None) -> int:
    lowest = int(pc.min())
    if random is None or lowest >= EXIT:
        return lowest
    of_warps = pc.reshape(-1, 32).min(1)
    return int(random.choice(np.unique(of_warps[of_warps < EXIT])))


def _part(here: Array, unit: Array, random: np.random.Generator) -> Array:
    """A random part of the warps, or of the warpgroups, that are `here`. unit: number of each lane's."""
    present = np.unique(unit[here])
    chosen = random.choice(present, size=int(random.integers(1, present.size + 1)), replace=False)
    return here & np.isin(unit, chosen)


def _deadlock(wave: Wave, what: str) -> Deadlock:
    lines = [line for explain in registry.EXPLAINERS for line in explain(wave)]
    error = Deadlock(f"deadlock in kernel {wave.kernel.name}: {what}\n  " + "\n  ".join(lines))
    error.kernel = wave.kernel.name
    return error


class _Scheduler:
    """The order of one wave."""

    def __init__(self, wave: Wave, program: Program) -> None:
        self.wave = wave
        self.program = program
        self.rounds = 0
        self.seen: Array = np.zeros(0)
        self.state: list[Any] = []
        self.ran: Array = np.zeros(wave.lanes, bool)
        self.loose = False

    def next(self) -> tuple[int, Array] | None:
        """(block, mask of its lanes) to run; None when every lane has exited. Raises Deadlock."""
        wave = self.wave
        while True:
            if wave.random is not None and wave.random.random() < DRIFT:
                for drift in registry.DRIFTERS:
                    drift(wave)
            idle = wave.waiting | wave.yielded
            if not self.loose:
                idle |= self._behind()
            block, mask = _choose(wave, self.program, np.where(idle, EXIT, wave.pc))
            if block < EXIT:
                self.ran |= mask
                return block, mask
            if not (wave.pc < EXIT).any():
                return None
            held = ~idle & (wave.pc < EXIT)
            if not self._wake(held):
                block = int(wave.pc[held].min())
                return block, held & (wave.pc == block)

    def _behind(self) -> Array:
        """Mask of the lanes of warps in which some wait or poll for what happens elsewhere: the others meet them again
        where their paths do, and do not run ahead to a barrier behind that place.
        """
        wave = self.wave
        away: Array = wave.yielded | (wave.waiting & wave.awaits_others)
        if not away.any():
            return away
        warps: Array = np.any(away.view(np.uint64).reshape(-1, 4), axis=1)
        return np.repeat(warps, 32)

    def _wake(self, held: Array) -> bool:
        """Nobody can run: asynchronous work completes, then polling lanes run again, then waits time out.

        held: lanes whose warpgroup is not complete. False if they are the only ones that can go on.
        """
        wave = self.wave
        for wake in registry.WAKERS:
            wake(wave)
        if (runnable := ~wave.waiting & (wave.pc < EXIT) & ~held).any():
            self._go_on(runnable)
            return True
        for expire in registry.TIMEOUTS:
            expire(wave)
        if not (~wave.waiting & (wave.pc < EXIT)).any():
            raise _deadlock(wave, "no thread can run any more")
        return bool((~wave.waiting & (wave.pc < EXIT) & ~held).any())

    def _go_on(self, runnable: Array) -> None:
        """Polling lanes run again. If nobody else ran since they last did, those behind them go first: they may be who
        is polled or waited for, as threads of a warp make progress independently.
        """
        wave = self.wave
        progress = (self.ran & ~wave.yielded).any()
        self.ran[:] = False
        self.loose = False
        if (runnable & ~self._behind()).any() or (wave.yielded.any() and progress):
            wave.yielded[:] = False
        elif (runnable & ~wave.yielded).any():
            self.loose = True
        else:
            self._count_polling_rounds()
            wave.yielded[:] = False

    def _count_polling_rounds(self) -> None:
        """Raises Deadlock if lanes poll and poll while the set of those who wait or have exited stays the same."""
        wave = self.wave
        idle = wave.waiting | (wave.pc >= EXIT)
        if not np.array_equal(idle, self.seen):
            self.seen, self.rounds, self.state = idle, 0, []
        self.rounds += 1
        if self.rounds > POLLING_ROUNDS or (self.rounds % STILL_ROUNDS == 0 and self._stands_still()):
            lane = int(np.argmax(~idle))
            cta, thread = wave.locate(lane)
            raise _deadlock(wave, f"CTA {cta}, thread {thread} polls for what nobody does")

    def _stands_still(self) -> bool:
        """Whether program counters and registers are those of the last look: not even a counter or a clock goes on."""
        before, registers = self.state, self.wave.registers
        self.state = [x.tobytes() if isinstance(x, (np.ndarray, np.generic)) else x for x in (self.wave.pc, *registers)]
        return self.state == before


def _name_instruction(program: Program, group: Group, block: int, error: Exception) -> None:
    """Raises a finding again with its instruction, if it lacks that; a failure of the emulator as EmulatorFault."""
    index = program.instruction_at(error.__traceback__)
    if isinstance(error, EmulatorError):
        if error.instruction is None and index is not None:
            group.fail(type(error), index, 0, str(error))
    else:
        index = program.blocks[block][-1].index if index is None else index
        group.fail(EmulatorFault, index, 0, f"the emulator itself failed: {type(error).__name__}: {error}")


def run(wave: Wave, program: Program, executed: Array) -> None:
    """Runs every lane of the wave to its exit. `executed[b]` counts the lanes that ran block b."""
    profiled, trace = wave.profile is not None, wave.trace
    order = _Scheduler(wave, program)
    watchers = [watch for prefix, watch in registry.WATCHERS if program.uses(prefix)]
    with np.errstate(all="ignore"):
        while (choice := order.next()) is not None:
            block, mask = choice
            group = wave.group(mask)
            executed[block] += group.size
            for watch in watchers:
                watch(wave, group, block)
            if trace is not None:
                trace.enter(group, block)
            try:
                function = program.function(block, profiled, trace is not None)
                outcome: tuple[Any, ...] = function(group, group.registers)
                if trace is not None:
                    trace.leave()
                registry.ACTIONS[outcome[0]](wave, group, block, *outcome[1:])
            except Exception as error:
                _name_instruction(program, group, block, error)
                raise
        for finish in registry.FINISHERS:
            finish(wave)
