"""Which lanes run next: the lowest basic block that has a runnable lane, all its lanes at once.

Lowest first makes diverged lanes meet again at the block after a branch, as the hardware's reconvergence does for
structured control flow. With a seed, one of the blocks at which some warp stands is drawn instead, and a random part
of the warps there takes the step: another order that the hardware could have taken. Lanes of one warp still wait for
each other.

A block returns a tuple whose first element names an action (`registry.action`); the action moves the program
counters. A lane that has to wait is `waiting` until an action releases it; when nobody can run, the wait is a
deadlock, explained by `registry.EXPLAINERS`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import registry
from .assembly import EXIT
from .errors import Deadlock
from .memory import Array
from .program import Program
from .wave import Group, Wave


def _runnable(wave: Wave) -> Array:
    return np.where(wave.waiting, EXIT, wave.pc)


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


def _group(wave: Wave, mask: Array) -> Group:
    lanes = np.flatnonzero(mask)
    if lanes.size == wave.lanes:
        return wave.everyone
    first, last = int(lanes[0]), int(lanes[-1])
    return Group(wave, slice(first, last + 1) if last - first + 1 == lanes.size else lanes)


def _deadlock(wave: Wave) -> Deadlock:
    lines = [line for explain in registry.EXPLAINERS for line in explain(wave)]
    error = Deadlock(f"deadlock: no thread of kernel {wave.kernel.name} can run\n  " + "\n  ".join(lines))
    error.kernel = wave.kernel.name
    return error


def run(
    wave: Wave,
    program: Program,
    executed: Array,
    random: np.random.Generator | None = None,
) -> None:
    """Runs every lane of the wave to its exit. `executed[b]` counts the lanes that ran block b."""
    profiled = wave.profile is not None
    with np.errstate(all="ignore"):
        while True:
            block, mask = _choose(_runnable(wave), random)
            if block >= EXIT:
                if not wave.waiting.any():
                    return
                for wake in registry.WAKERS:
                    wake(wave)
                if int(_runnable(wave).min()) >= EXIT:
                    raise _deadlock(wave)
                continue
            group = _group(wave, mask)
            executed[block] += group.size
            outcome: tuple[Any, ...] = program.function(block, profiled)(group, group.registers)
            registry.ACTIONS[outcome[0]](wave, group, block, *outcome[1:])
