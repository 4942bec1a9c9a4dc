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
        return cls(group, np.flatnonzero(group.taking(mask)), index)

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

    def shared_units(
        self, cta: Array, start: Array, offsets: Array, unit: int, verb: str, used: Array | None = None
    ) -> Units:
        """Units of the CTAs' shared memory: `start` [copies] + `offsets`, [units] or [copies, units]."""
        shared = self.wave.shared
        low, high = (start + offsets.min(-1), start + offsets.max(-1) + unit) if offsets.size else (start, start)
        if high.size and int(high.max()) > shared.size:
            row = int(np.argmax(high))
            self.fail(
                OutOfBounds,
                row,
                f"shared {verb} of bytes {int(low[row]):#x} to {int(high[row]):#x} is out of bounds: the CTA has "
                f"{shared.size} bytes of shared memory",
            )
        first = (start >> LOG2[unit]) + shared.base(cta, unit)
        extent = (int(low.min(initial=shared.size)), int(high.max(initial=0)))
        return Units(shared.views[unit], first[:, None] + (offsets >> LOG2[unit]), used, shared, extent)

    def require_written(self, units: Units) -> None:
        """Reports units of shared memory that nobody has written."""
        assert units.shared is not None
        elements, rows = units.elements, np.broadcast_to(self.positions[:, None], units.elements.shape)
        elements, rows = (x.reshape(-1) if units.used is None else x[units.used] for x in (elements, rows))
        require_written(self.group, elements, units.view.itemsize, *units.extent, rows, self.index)

    def global_units(self, start: Array, offsets: Array, unit: int, verb: str, used: Array | None = None) -> Units:
        """Units of global memory: uint64 addresses `start` [copies, parts] + int64 `offsets` [units of a part].

        Those that are used, [copies, parts * units], must be in tensors.
        """
        memory = self.wave.memory
        whole = used is None and offsets.size > 0
        if not whole or memory.outside(start + np.uint64(offsets.min()), int(np.ptp(offsets)) + unit) is not None:
            self._require_in_tensors(start, offsets, unit, verb, used)
        first = memory.index(start, 1) >> LOG2[unit]
        elements = (first[:, :, None] + (offsets >> LOG2[unit])).reshape(len(start), start.shape[1] * offsets.size)
        return Units(memory.views[unit], elements if used is None else np.where(used, elements, 0), used)

    def _require_in_tensors(self, start: Array, offsets: Array, unit: int, verb: str, used: Array | None) -> None:
        address = start[:, :, None] + offsets.view(np.uint64)
        address = address.reshape(len(start), start.shape[1] * offsets.size)
        rows, columns = np.nonzero(np.ones(address.shape, bool) if used is None else used)
        memory, touched = self.wave.memory, address[rows, columns]
        if (bad := memory.outside(touched, unit)) is not None:
            first = int(np.argmax(bad))
            at = int(touched[first])
            self.fail(
                OutOfBounds,
                int(rows[first]),
                f"global {verb} of {unit} bytes at {at:#x}, part of a bulk copy, is out of bounds: "
                f"{memory.describe(at, unit)} ({unit * int(bad.sum())} bytes in all)",
            )
