"""The registers of a wave, as the groups of lanes that execute blocks see them.

A register is one array over all lanes of the wave, or a numpy scalar while it is the same in all. What a part of the
wave writes is kept as a *piece* of its own: warps that play different roles then read and write their registers without
a copy, and a value that is the same in all lanes of one role stays a scalar. Values are never changed in place.

A register may also be *pending*: an asynchronous operation will write it, and until the program has waited for that it
can only be moved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import Array

if TYPE_CHECKING:
    from .wave import Group

_MOST_PIECES = 8


class Pending:
    """A register's value in the lanes of a group while an asynchronous operation has yet to write some of them."""

    ndim = 1

    def settled(self) -> Array | None:
        """The value, if the program has waited for it in all lanes."""
        raise NotImplementedError

    def part(self, positions: Array) -> Pending:
        """The same register in some of the lanes."""
        raise NotImplementedError

    def joined(self, size: int, parts: list[tuple[Array, Any]], base: Array) -> Pending:
        """The register in `size` lanes: pending `parts` (positions, value), this one first, and `base` elsewhere."""
        raise NotImplementedError


class Split:
    """A register that parts of the wave have written: `pieces` hold in their groups' lanes, `base` in all others.

    `views` are values gathered from these, by group; they hold until the next write.
    """

    __slots__ = ("base", "pieces", "views")

    def __init__(self, base: Any, pieces: list[tuple[Group, Any]], views: dict[Group, Any]) -> None:
        self.base = base
        self.pieces = pieces
        self.views = views


class RegisterWindow:
    """The wave's registers in the lanes of one group."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._registers = group.wave.registers
        self._keeps = group.wave.random is None  # where the order is shuffled, the same group hardly ever comes again

    def __getitem__(self, index: int) -> Any:
        value = self._registers[index]
        group = self._group
        if value.__class__ is not Split:
            if value.ndim == 0 or group.is_whole:
                return value
            part = value[group.lanes]
            if self._keeps:
                self._registers[index] = Split(value, [], {group: part})
            return part
        if (known := value.views.get(group)) is None:
            known = self._read(value)
            if self._keeps:
                value.views[group] = known
        if isinstance(known, Pending) and (array := known.settled()) is not None:
            self[index] = known = array
        return known

    def _read(self, register: Split) -> Any:
        """The value in this group's lanes, put together from pieces and base."""
        group = self._group
        parts = []
        covered = 0
        for owner, value in register.pieces:
            if owner is group:
                return value
            if (common := group.common(owner)) is not None:
                theirs, ours = common
                part = value if value.ndim == 0 else value.part(theirs) if isinstance(value, Pending) else value[theirs]
                if ours.size == group.size:
                    return part
                parts.append((ours, part))
                covered += ours.size
        base = register.base
        if not parts:
            return base if base.ndim == 0 or group.is_whole else base[group.lanes]
        if covered == group.size:
            whole = np.empty(group.size, base.dtype)
        else:
            whole = np.array(self._spread(base)[group.lanes])
        pending = []
        for ours, part in parts:
            array = part.settled() if isinstance(part, Pending) else part
            if array is None:
                pending.append((ours, part))
            else:
                whole[ours] = array
        return pending[0][1].joined(group.size, pending, whole) if pending else whole

    def _spread(self, value: Any) -> Array:
        return value if value.ndim else np.full(self._group.wave.lanes, value)

    def __setitem__(self, index: int, value: Any) -> None:
        group, old = self._group, self._registers[index]
        pending = isinstance(value, Pending)
        if group.is_whole and not pending:
            self._registers[index] = value
            return
        if old.__class__ is not Split:
            old = Split(old, [], {})
        base, pieces = self._without(old, group)
        if pending or (self._keeps and len(pieces) < _MOST_PIECES):
            self._registers[index] = Split(base, [*pieces, (group, value)], {group: value})
            return
        whole = np.array(self._spread(base))
        kept = []
        for owner, piece in [*pieces, (group, value)]:
            if isinstance(piece, Pending):
                kept.append((owner, piece))
            else:
                whole[owner.lanes] = piece
        self._registers[index] = Split(whole, kept, {}) if kept else whole

    def _without(self, register: Split, group: Group) -> tuple[Any, list[tuple[Group, Any]]]:
        """Base and pieces that hold outside of a group's lanes."""
        base, kept = register.base, []
        for owner, value in register.pieces:
            if owner is group:
                continue
            common = group.common(owner)
            if common is None:
                kept.append((owner, value))
                continue
            theirs, _ = common
            if theirs.size == owner.size:
                continue
            if isinstance(value, Pending):
                left = np.ones(owner.size, bool)
                left[theirs] = False
                kept.append((owner.part(left), value.part(np.flatnonzero(left))))
            else:
                base = np.array(self._spread(base))
                base[owner.lanes] = value
        return base, kept
