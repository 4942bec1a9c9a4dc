"""wgmma in flight: what has been issued and not yet waited for, and the registers that will hold its results.

A `Multiplication` is one executed wgmma.mma_async of some warpgroups. It is computed when a wgmma.wait_group needs it,
as late as the program allows: only then is shared memory read, and the accumulators change. Multiplications that went
on with one accumulator are then one product. Until the wait, the accumulator registers are `InFlight`: they can be
moved, and continued by another wgmma of the same shape; anything else is a finding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from ..async_work import CommitGroups
from ..errors import AccumulatorInFlight, UninitializedShared
from ..memory import Array
from ..registers import Pending
from ..wave import Group, Wave
from ..wave_state import WaveState
from .wgmma_product import ROWS, WARPGROUP, WgmmaKind, accumulate, register_operand, shared_operand

_PENDING, _ABSORBED, _DONE = 0, 1, 2
_REMEMBERED_JOINS = 64


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
        self._joins: dict[tuple[int, ...], tuple[Any, Accumulators]] = {}

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

    def join(self, size: int, sources: tuple[tuple[Array, Accumulators], ...]) -> Accumulators:
        """Accumulators of several groups, at these positions of a larger one. Remembered by their identity."""
        key = tuple(id(thing) for pair in sources for thing in pair)
        if key not in self._joins:
            if len(self._joins) >= _REMEMBERED_JOINS:
                self._joins.clear()
            found: dict[Multiplication, list[tuple[Array, Array]]] = {}
            for ours, source in sources:
                for m, places, mine in source.parts:
                    positions = ours if mine is None else ours[mine]
                    theirs = np.arange(positions.size) if places is None else places
                    found.setdefault(m, []).append((theirs, positions))
            parts = []
            for m, pieces in found.items():  # warps of a warpgroup may have moved their registers one by one
                places, positions = (np.concatenate(column) for column in zip(*pieces, strict=True))
                order = np.argsort(positions)
                parts.append((m, places[order], positions[order]))
            parts.sort(key=lambda part: int(part[2][0]))
            self._joins[key] = sources, Accumulators(size, parts)
        return self._joins[key][1]

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
        self.state[rows] = _DONE
        if (self.state == _DONE).all():  # operands and predecessors are needed no more
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


def _all(places: Array | None) -> Array:
    return np.zeros(0) if places is None else places


class Accumulators:
    """Where the accumulator registers of a group's lanes come from.

    parts: multiplications with, for the lanes that each will write, their places among its lanes and their positions in
    the group; None for all of them in order.
    """

    def __init__(self, size: int, parts: Sequence[tuple[Multiplication, Array | None, Array | None]]) -> None:
        self.size = size
        self.parts = parts
        self.wave = parts[0][0].group.wave
        self._flight = Flight.of(self.wave)
        self._known_at, self._waited, self._computed = -1, False, False
        self._selections: dict[int, tuple[Array, Accumulators | None]] = {}

    def same_as(self, other: Accumulators) -> bool:
        """Whether every lane's come from the same place."""
        if self is other:
            return True
        return len(self.parts) == len(other.parts) and all(
            m is n and np.array_equal(_all(p), _all(q)) and np.array_equal(_all(a), _all(b))
            for (m, p, a), (n, q, b) in zip(self.parts, other.parts, strict=True)
        )

    def waited(self) -> bool:
        """Whether the program has waited for all of them."""
        if not self._waited and self._known_at != self._flight.waits:
            self._known_at = self._flight.waits
            self._waited = not any(
                self._flight.in_flight(m)[slice(None) if places is None else places // WARPGROUP].any()
                for m, places, _ in self.parts
            )
        return self._waited

    def value(self, slot: int, base: Array | None) -> Array:
        """Register `slot` of the accumulators; `base` has the lanes that none of them writes."""
        if not self._computed:
            self._require_computed()
        m, places, positions = self.parts[0]
        assert m.result is not None
        if positions is None:
            return m.result[slot] if places is None else m.result[slot][places]
        result = np.empty(self.size, np.uint32) if base is None else base.copy()
        for m, places, positions in self.parts:
            assert m.result is not None
            result[positions] = m.result[slot] if places is None else m.result[slot][places]
        return result

    def _require_computed(self) -> None:
        for m, places, _ in self.parts:
            states = m.state if places is None else m.state[places // WARPGROUP]
            if not (states == _DONE).all():
                raise AccumulatorInFlight(
                    f"use of a copy of an accumulator register, taken while `{m.name}` was in flight: another wgmma "
                    "has gone on with the accumulator since"
                )
        self._computed = True

    def select(self, positions: Array) -> Accumulators | None:
        """The same for some of the lanes; None if none of these is written. Remembered by the array's identity."""
        if id(positions) not in self._selections:
            place = np.full(self.size, -1)
            place[positions] = np.arange(positions.size)
            parts: list[tuple[Multiplication, Array | None, Array | None]] = []
            for m, places, mine in self.parts:
                there = place if mine is None else place[mine]
                kept = np.flatnonzero(there >= 0)
                if kept.size:
                    whole = kept.size == positions.size
                    parts.append((m, kept if places is None else places[kept], None if whole else there[kept]))
            selected = Accumulators(positions.size, parts) if parts else None
            self._selections[id(positions)] = (positions, selected)
        return self._selections[id(positions)][1]


class InFlight(Pending):
    """Register `slot` of accumulators in flight; `base` holds the lanes that are not in flight, if there are any."""

    __slots__ = ("base", "slot", "source")

    def __init__(self, source: Accumulators, slot: int, base: Array | None = None) -> None:
        self.source = source
        self.slot = slot
        self.base = base

    def settled(self) -> Array | None:
        return self.source.value(self.slot, self.base) if self.source.waited() else None

    def part(self, positions: Array) -> Any:
        selected = self.source.select(positions)
        base = None if self.base is None else self.base[positions]
        if selected is None:
            return base
        return InFlight(selected, self.slot, base)

    def joined(self, size: int, parts: list[tuple[Array, Any]], base: Array) -> Pending:
        sources = tuple((ours, value.source) for ours, value in parts)
        if any(value.slot != self.slot for _, value in parts):
            self.refuse()
        return InFlight(Flight.of(self.source.wave).join(size, sources), self.slot, base)

    def refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise AccumulatorInFlight(
            f"use of a register that `{self.source.parts[0][0].name}` has yet to write: "
            "no wgmma.wait_group has waited for it"
        )

    __getattr__ = refuse
    __array_ufunc__ = refuse
    __array_function__ = refuse
    __array__ = refuse


_OPERATORS = """
    add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod and rand or ror xor rxor lshift rlshift
    rshift rrshift neg invert abs lt le gt ge getitem setitem len iter bool int float index contains
"""
for _operator in _OPERATORS.split():
    setattr(InFlight, f"__{_operator}__", InFlight.refuse)
