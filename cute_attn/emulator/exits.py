"""Part of the race detector: what others of a cluster do to a CTA's shared memory has to be over before the CTA exits.

Each of these accesses, to its memory or its mbarriers, has to be known (see `clocks`) to some warp of the CTA when its
threads leave. A CTA's own asynchronous copies are not looked at: programs of NVIDIA's leave bulk stores to complete by
themselves.
"""

from __future__ import annotations

import numpy as np

from .clocks import AGENT_SHIFT, HAPPENS_BEFORE, INSTRUCTION, Clocks
from .errors import ExitedCta
from .memory import Array
from .registry import FINISHERS
from .wave import Wave

_SHIFT = np.uint64(AGENT_SHIFT)


class Visits:
    """`last` [CTAs of the wave, agents of a cluster]: the newest stamp of each visitor of a CTA's shared memory."""

    def __init__(self, clocks: Clocks) -> None:
        self.clocks = clocks
        self.wave = clocks.wave
        self.last = np.zeros((len(self.wave.ctas), 0), np.uint64)

    def note(self, ctas: Array, warps: Array, stamps: Array) -> None:
        """Accesses to the memory of these CTAs on behalf of these warps, which may be their own."""
        foreign = ctas != warps // self.clocks.agents.warps
        if not foreign.any():
            return
        ctas, stamps = ctas[foreign], stamps[foreign]
        if self.last.shape[1] < self.clocks.count:
            more = np.zeros((len(self.last), self.clocks.count - self.last.shape[1]), np.uint64)
            self.last = np.concatenate([self.last, more], axis=1)
        np.maximum.at(self.last, (ctas, (stamps >> _SHIFT).view(np.int64)), stamps)

    def check(self) -> None:
        """After the last exit. Raises ExitedCta."""
        ctas, agents = self.last.shape
        known = self.clocks.known[HAPPENS_BEFORE].reshape(ctas, -1, self.clocks.count).max(1)[:, :agents]
        late = self.last > known
        if late.any():
            cta, agent = (int(n[0]) for n in np.nonzero(late))
            self._report(cta, int(self.last[cta, agent]))

    def _report(self, cta: int, stamp: int) -> None:
        wave = self.wave
        kind, rank, _ = self.clocks.agents.identify(stamp >> AGENT_SHIFT)
        instruction = wave.kernel.instructions[stamp & INSTRUCTION]
        visitor = cta // wave.cluster_size * wave.cluster_size + rank
        where, whence = (wave.locate(n * wave.cta_lanes)[0] for n in (cta, visitor))
        whose = "" if kind == "mbarrier" else f" of CTA {whence}"
        error = ExitedCta(
            f"CTA {where} may exit before {instruction.place}{whose} is done with its shared memory: a barrier of the "
            f"cluster before the exit, or a wait for it in the former CTA, is missing\n  kernel: {wave.kernel.name}"
        )
        error.instruction, error.kernel, error.cta = instruction.text, wave.kernel.name, where
        raise error


def _check(wave: Wave) -> None:
    if wave.races is not None:
        wave.races.rules.visits.check()


FINISHERS.append(_check)
