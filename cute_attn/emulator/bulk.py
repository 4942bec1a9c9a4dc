"""Bulk copies: what an instruction that moves blocks of memory asynchronously has in common with its kin.

Each lane that executes it issues one copy. A copy's source and destination are `Units`: indices of aligned pieces of
memory, found and checked when the copy is issued, so that a finding names the instruction; read and written when the
copy completes (see `async_work`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from .access import LOG2, check_alignment, cluster_cta, require_written
from .errors import EmulatorError, InvalidOperand, OutOfBounds
from .memory import CLUSTER_SHIFT, Array, SharedMemory
from .wave import Group


def _some(array: Array, rows: Array) -> Array:
    return array if rows.size == len(array) else array[rows]


@dataclass(frozen=True)
class Units:
    """Pieces of memory of some copies: elements of `view`, int64 [copies, units].

    used: which of them there are, where not all. shared: the memory they lie in if that is shared memory, and
    `extent` the offsets in a CTA between which they all lie.
    """

    view: Array
    elements: Array
    used: Array | None = None
    shared: SharedMemory | None = None
    extent: tuple[int, int] = (0, 0)

    @property
    def place(self) -> tuple[Array, int, Array | None]:
        """(elements [copies, units], bytes of each, which of them)."""
        return self.elements, self.view.itemsize, self.used

    def select(self, rows: Array) -> Units:
        """The same for other copies: `rows` names those that they repeat."""
        used = None if self.used is None else self.used[rows]
        return Units(self.view, self.elements[rows], used, self.shared, self.extent)

    def read(self, rows: Array) -> Array:
        """Contents [rows, units]; those that are not used mean nothing."""
        return self.view.take(_some(self.elements, rows))

    def is_used(self, rows: Array) -> Array | None:
        return None if self.used is None else _some(self.used, rows)

    def write(self, rows: Array, content: Array) -> None:
        elements = _some(self.elements, rows)
        if (used := self.is_used(rows)) is not None:
            elements, content = elements[used], content[used]
        self.view[elements] = content
        if self.shared is not None:
            self.shared.mark(elements, self.view.itemsize, *self.extent)


class BulkIssue:
    """The lanes that execute a bulk copy: `positions` in the group, `lanes` in the wave, one copy each."""

    def __init__(self, group: Group, positions: Array, index: int) -> None:
        self.group = group
        self.wave = group.wave
        self.positions = positions
        self.lanes: Array = group.lane_numbers[positions]
        self.index = index

    @classmethod
    def of(cls, group: Group, mask: Any, index: int) -> BulkIssue:
        return cls(group, np.arange(group.size) if mask is None else np.flatnonzero(group.spread(mask)), index)

    def part(self, rows: Array) -> BulkIssue:
        """Copies issued by the lanes of some of these: `rows` may repeat and leave out."""
        return BulkIssue(self.group, self.positions[rows], self.index)

    def take(self, value: Any) -> Array:
        """An operand of the instruction, per copy."""
        taken: Array = self.group.spread(value)[self.positions]
        return taken

    def fail(self, error: type[EmulatorError], row: int, what: str) -> NoReturn:
        self.group.fail(error, self.index, int(self.positions[row]), what)

    def multicast(self, mask: Array) -> tuple[Array, Array]:
        """A copy per CTA that a 16-bit mask names: (which of these copies, rank of the CTA)."""
        size = self.wave.cluster_size
        if (bad := mask.astype(np.int64) >> size != 0).any():
            row = int(np.argmax(bad))
            self.fail(InvalidOperand, row, f"multicast to CTAs {int(mask[row]):#x}: the cluster has {size}")
        rows, ranks = np.nonzero((mask[:, None].astype(np.int64) >> np.arange(size)) & 1)
        return rows, ranks

    def shared_place(self, address: Array, alignment: int, verb: str) -> tuple[Array, Array]:
        """(CTA of the wave, offset in its shared memory) of uint32 addresses, aligned."""
        check_alignment(self.group, address, alignment, self.positions, self.index)
        if address.size and int(address.max()) >> CLUSTER_SHIFT:
            cta, offset = cluster_cta(self.group, address, self.positions, self.index, verb)
            return cta, offset.astype(np.int64)
        return self.group.cta[self.positions], address.astype(np.int64)

    def shared_units(self, cta: Array, offsets: Array, unit: int, verb: str, used: Array | None = None) -> Units:
        """Units at `offsets` [copies, units] of the CTAs' shared memory."""
        shared = self.wave.shared
        low, high = (int(offsets.min()), int(offsets.max()) + unit) if offsets.size else (0, 0)
        if high > shared.size:
            row = int(np.argmax(offsets.max(1)))
            self.fail(
                OutOfBounds,
                row,
                f"shared {verb} of bytes {int(offsets[row].min()):#x} to {int(offsets[row].max()) + unit:#x} is out of "
                f"bounds: the CTA has {shared.size} bytes of shared memory",
            )
        elements = (offsets >> LOG2[unit]) + shared.base(cta, unit)[:, None]
        return Units(shared.views[unit], elements, used, shared, (low, high))

    def require_written(self, units: Units) -> None:
        """Reports units of shared memory that nobody has written."""
        assert units.shared is not None
        elements, rows = units.elements, np.broadcast_to(self.positions[:, None], units.elements.shape)
        elements, rows = (x.reshape(-1) if units.used is None else x[units.used] for x in (elements, rows))
        require_written(self.group, elements, units.view.itemsize, *units.extent, rows, self.index)

    def global_units(self, address: Array, unit: int, verb: str, used: Array | None = None) -> Units:
        """Units at the uint64 addresses [copies, units], which are aligned; those that are used must be in tensors."""
        memory = self.wave.memory
        touched = address.reshape(-1) if used is None else address[used]
        if (bad := memory.outside(touched, unit)) is not None:
            first = int(np.argmax(bad))
            row = first // address.shape[1] if used is None else int(np.nonzero(used)[0][first])
            at = int(touched[first])
            self.fail(
                OutOfBounds,
                row,
                f"global {verb} of {unit} bytes at {at:#x}, part of a bulk copy, is out of bounds: "
                f"{memory.describe(at, unit)} ({unit * int(bad.sum())} bytes in all)",
            )
        elements = memory.index(address, unit)
        return Units(memory.views[unit], elements if used is None else np.where(used, elements, 0), used)
