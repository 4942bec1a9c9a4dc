"""Accumulator registers that a wgmma in flight has yet to write (see `wgmma_flight`).

Until the wait they can be moved, and continued by another wgmma of the same shape; anything else is a finding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from ..errors import AccumulatorInFlight
from ..memory import Array
from ..registers import Pending
from ..wave import Wave
from ..wave_state import WaveState
from .wgmma_flight import DONE, Flight, Multiplication
from .wgmma_product import WARPGROUP

_REMEMBERED_JOINS = 64


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
            if not (states == DONE).all():
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


class _Joins(WaveState):
    """Accumulators of several groups of a wave as one, remembered by their identity."""

    def __init__(self, wave: Wave) -> None:
        self.remembered: dict[tuple[int, ...], tuple[Any, Accumulators]] = {}

    def of_groups(self, size: int, sources: tuple[tuple[Array, Accumulators], ...]) -> Accumulators:
        """Those of groups at these positions of a larger one."""
        key = tuple(id(thing) for pair in sources for thing in pair)
        if key not in self.remembered:
            if len(self.remembered) >= _REMEMBERED_JOINS:
                self.remembered.clear()
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
            self.remembered[key] = sources, Accumulators(size, parts)
        return self.remembered[key][1]


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
        return InFlight(_Joins.of(self.source.wave).of_groups(size, sources), self.slot, base)

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
