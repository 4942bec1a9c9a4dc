"""Asynchronous work in flight: it completes as late as the program's own waits allow.

Two ways to wait exist. `CommitGroups`: a thread (or warp, or warpgroup) closes groups of operations and waits until all
but its newest n groups are complete. `Transfers`: copies that report their bytes to mbarriers, where others wait.

An operation is issued by the lanes of a group in one instruction, and each lane's part is a *row* of it. Rows complete
one by one or together: `perform(rows)` does the work of those rows at that moment, so memory is read and written then
and not before. With a seed, rows may complete at any moment between their issue and that last one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .memory import Array
from .wave import Wave

Perform = Callable[[Array], None]
"""Does the work of some rows of an operation: positions into the lanes that issued it, ascending."""


@dataclass
class _Operation:
    """Rows in flight of one instruction: the lane and its group's number for each, and their positions when issued.

    number: how many operations the wave had issued before.
    """

    number: int
    lanes: Array
    groups: Array
    rows: Array
    perform: Perform


class CommitGroups:
    """The operations of one kind ("cp.async", "bulk", "wgmma") that the lanes of a wave have in flight.

    `open` [lanes] is the number of the group that a lane is filling; `issued` counts operations.
    """

    def __init__(self, wave: Wave, kind: str) -> None:
        self.wave = wave
        self.kind = kind
        self.open = np.zeros(wave.lanes, np.int64)
        self.issued = 0
        self._operations: list[_Operation] = []

    @classmethod
    def of(cls, wave: Wave, kind: str) -> CommitGroups:
        """The wave's groups of a kind, made at their first use."""
        groups: dict[str, CommitGroups] = wave.state.setdefault("commit groups", {})
        if kind not in groups:
            groups[kind] = cls(wave, kind)
        return groups[kind]

    def issue(self, lanes: Array, perform: Perform, nbytes: int | Array = 0) -> None:
        """Puts an operation of `lanes` (numbers in the wave), each of `nbytes`, into the groups they are filling."""
        if self.wave.trace is not None:
            self.wave.trace.issue(self.kind, lanes, self.open[lanes], nbytes)
        operation = _Operation(self.issued, lanes, self.open[lanes], np.arange(lanes.size), perform)
        self._operations.append(operation)
        self.issued += 1

    def commit(self, lanes: Array) -> None:
        """Closes the group that each of the lanes is filling."""
        if self.wave.trace is not None:
            self.wave.trace.commit(self.kind, lanes, self.open[lanes])
        self.open[lanes] += 1

    def wait(self, lanes: Array, newest: int) -> None:
        """Completes the closed groups of these lanes, except each lane's `newest` last ones."""
        if self.wave.trace is not None:
            self.wave.trace.wait(self.kind, lanes, self.open[lanes] - 1 - newest)
        limit = np.zeros(self.wave.lanes, np.int64)
        limit[lanes] = self.open[lanes] - newest
        self._complete(lambda op: op.groups < limit[op.lanes])

    def wait_all(self, lanes: Array, before: int | None = None) -> None:
        """Completes what these lanes have issued, in closed groups or not; of the wave's first `before` operations."""
        if self.wave.trace is not None and before is None:
            self.wave.trace.wait(self.kind, lanes, self.open[lanes], everything=True)
        chosen = np.zeros(self.wave.lanes, bool)
        chosen[lanes] = True
        limit = self.issued if before is None else before
        self._complete(lambda op: chosen[op.lanes] & (op.number < limit))

    def finish(self) -> None:
        """Completes everything."""
        self._complete(lambda op: np.ones(op.lanes.size, bool))

    def drift(self, random: np.random.Generator) -> None:
        """Completes a random part of what is in flight. A lane's operations stay in order."""
        lucky = random.random(self.wave.lanes) < 0.5
        self._complete(lambda op: lucky[op.lanes])

    def _complete(self, due: Callable[[_Operation], Array]) -> None:
        left = []
        for operation in self._operations:
            now = due(operation)
            if now.all():
                operation.perform(operation.rows)
                continue
            if now.any():
                operation.perform(operation.rows[now])
                keep = ~now
                operation = replace(
                    operation,
                    lanes=operation.lanes[keep],
                    groups=operation.groups[keep],
                    rows=operation.rows[keep],
                )
            left.append(operation)
        self._operations = left


@dataclass
class Transfers:
    """Copies of one instruction that report to mbarriers, a row each.

    cta, offset: the mbarrier that is told, by CTA of the wave and offset in its shared memory. nbytes: what is reported
    (complete_tx) once the row has been performed, and arrivals: how many arrive then. lane: who issued the row; index:
    the instruction.
    """

    cta: Array
    offset: Array
    nbytes: Array
    lane: Array
    index: int
    perform: Perform
    arrivals: int = 0

    def part(self, rows: Array) -> Transfers:
        """The same with some rows only; `perform` still takes positions into this object's rows."""
        whole = self.perform
        return Transfers(
            self.cta[rows],
            self.offset[rows],
            self.nbytes[rows],
            self.lane[rows],
            self.index,
            lambda some: whole(rows[some]),
            self.arrivals,
        )
