"""wgmma in flight: what has been issued and not yet waited for.

A `Multiplication` is one executed wgmma.mma_async of some warpgroups. It is computed when a wgmma.wait_group needs it,
as late as the program allows: only then is shared memory read, and the accumulators change. Multiplications that went
on with one accumulator are then one product. What the accumulator registers hold until then: `wgmma_accumulators`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from ..async_work import CommitGroups
from ..errors import UninitializedShared
from ..memory import Array
from ..wave import Group, Wave
from ..wave_state import WaveState
from .wgmma_product import ROWS, WARPGROUP, WgmmaKind, accumulate, register_operand, shared_operand

_PENDING, _ABSORBED, DONE = 0, 1, 2


def lanes_of(warpgroups: Array) -> Array:
    """Positions of the lanes of warpgroups, in an array that holds 128 lanes for each."""
    return (warpgroups[:, None] * WARPGROUP + np.arange(WARPGROUP)).reshape(-1)


class Flight(WaveState):
    """What a wave's warpgroups have in flight. A warpgroup is known by its first lane in the wave."""

    def __init__(self, wave: Wave) -> None:
        self.groups = CommitGroups.of(wave, "wgmma")
        self.waited = np.zeros(wave.lanes, np.int64)
        self.waits = 0
        self._due: list[tuple[Multiplication, Array]] | None = None
        self._outstanding: list[Multiplication] = []

    def issue(self, multiplication: Multiplication) -> None:
        def perform(rows: Array) -> None:
            if self._due is None:
                multiplication.compute(rows)
            else:
                self._due.append((multiplication, rows))

        self.groups.issue(multiplication.leaders, perform)
        self._outstanding.append(multiplication)

    def outstanding(self) -> list[Multiplication]:
        """Those for which some warpgroup has not waited."""
        return self._outstanding

    def wait(self, leaders: Array, newest: int) -> None:
        """Computes all but the newest commit groups of these warpgroups; their registers can be used from now on."""
        self._due = []
        self.groups.wait(leaders, newest)
        due, self._due = self._due, None
        for multiplication, rows in reversed(due):  # the last of a sum takes the others along
            multiplication.compute(rows)
        self.waited[leaders] = np.maximum(self.waited[leaders], self.groups.open[leaders] - newest)
        self.waits += 1
        self._outstanding = [m for m in self._outstanding if self.in_flight(m).any()]

    def in_flight(self, m: Multiplication) -> Array:
        """[warpgroups] bool: those that have not waited for a multiplication."""
        return m.groups >= self.waited[m.leaders]


@dataclass(eq=False)
class Multiplication:
    """One wgmma.mma_async. Rows of all arrays are warpgroups, or their lanes.

    note: what `wgmma_registers` knows of the instruction. positions: of the first lanes in the group that issued it;
    leaders, ctas: their numbers in the wave. a: descriptors, or four registers. c: the accumulator's registers, None if
    it starts from zero. previous: the multiplication in flight whose accumulator it continues, with its rows there.
    groups: number of the commit group, by warpgroup.
    """

    kind: WgmmaKind
    note: Any
    group: Group
    positions: Array
    leaders: Array
    ctas: Array
    a: Array | Sequence[Array]
    b: Array
    c: Array | None
    previous: Multiplication | None
    previous_rows: Array
    groups: Array
    state: Array = field(init=False)
    continued: Array = field(init=False)
    result: Array | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.state = np.full(len(self.ctas), _PENDING, np.int8)
        self.continued = np.zeros(len(self.ctas), bool)

    @property
    def index(self) -> int:
        """Of the instruction."""
        return self.note.index

    @property
    def name(self) -> str:
        """The instruction, its operand lists cut short."""
        return self.group.wave.kernel.instructions[self.index].text.split(",")[0] + ", ...}"

    def compute(self, rows: Array) -> None:
        """Computes the accumulators of some warpgroups, with everything in flight that they continue."""
        rows = rows[self.state[rows] == _PENDING]
        if not rows.size:
            return
        steps = [(self, rows)]
        at, at_rows = steps[0]
        c: Array | None
        while (before := at.previous) is not None:
            before_rows = at.previous_rows[at_rows]
            fresh = bool((before.state[before_rows] == _PENDING).all())
            if not fresh or before.kind != self.kind or len(steps) == self.kind.longest_chain:
                before.compute(before_rows)
                c = before.registers(before_rows)
                break
            at, at_rows = before, before_rows
            steps.append((at, at_rows))
        else:
            c = at.c if at.c is None or len(at_rows) == len(at.ctas) else at.c[:, lanes_of(at_rows)]
        self._store(rows, self._product(steps[::-1], c))
        for step, step_rows in steps[1:]:
            step.state[step_rows] = _ABSORBED
        self.state[rows] = DONE
        if (self.state == DONE).all():  # operands and predecessors are needed no more
            self.previous = self.c = None
            self.a = ()

    def _product(self, steps: list[tuple[Multiplication, Array]], c: Array | None) -> Array:
        wave, kind, ctas = self.group.wave, self.kind, self.ctas[steps[-1][1]]

        def unwritten(number: int, warpgroup: int) -> NoReturn:
            step, rows = steps[number]
            step.group.fail(
                UninitializedShared,
                step.index,
                int(step.positions[rows[warpgroup]]),
                "operand in shared memory that nobody has written, when the wgmma is waited for",
            )

        right, owner = shared_operand(
            wave, ctas, np.stack([s.b[r] for s, r in steps]), kind.n, kind.b_major_mn, kind.b, kind.k, unwritten
        )
        if kind.a_in_registers:
            fragments = [[x if len(r) == len(s.ctas) else x[lanes_of(r)] for x in s.a] for s, r in steps]
            left = register_operand(fragments, kind.a)
        else:
            descriptors = np.stack([s.a[r] for s, r in steps])  # type: ignore[call-overload]
            left, owner_of_a = shared_operand(wave, ctas, descriptors, ROWS, kind.a_major_mn, kind.a, kind.k, unwritten)
            if len(left) != len(ctas) or (owner_of_a != np.arange(len(ctas))).any():
                left = left[owner_of_a]
        return accumulate(wave, kind, left, right, owner, c)

    def _store(self, rows: Array, registers: Array) -> None:
        if len(rows) == len(self.ctas):
            self.result = registers
            return
        if self.result is None:
            self.result = np.zeros((len(registers), len(self.ctas) * WARPGROUP), np.uint32)
        self.result[:, lanes_of(rows)] = registers

    def goes_on_from(self, other: Multiplication) -> bool:
        """Whether this is the other one or continues its accumulator."""
        at: Multiplication | None = self
        while at is not None and at is not other:
            at = at.previous
        return at is not None

    def registers(self, rows: Array) -> Array:
        """Computed accumulators, [registers, lanes]."""
        assert self.result is not None
        return self.result if len(rows) == len(self.ctas) else self.result[:, lanes_of(rows)]
