"""Global, shared and local memory: flat byte arrays, checked before every access.

Global memory is the process's own memory, seen through one window that spans all tensors passed in; each access
must lie inside one span. Shared and local memory belong to a wave (see `wave`): one slice per CTA or per lane.
Checks compare the smallest and largest address first and look at single lanes only to name the culprit.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# dtype that moves an access of that many bytes as one element; complex128 is the only 16-byte one, and copying it
# never touches the bits.
UNIT: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}

SHARED_WINDOW = 1 << 56
"""Generic address of shared byte 0. Process addresses are below 2^48, so windows and tensors cannot meet."""
CLUSTER_SHIFT = 24
"""A 32-bit shared address: the rank in the cluster plus one above this bit, 0 for the executing CTA's own memory."""
LOCAL_WINDOW = 1 << 57
"""Generic address of the executing thread's local byte 0."""
PARAMETER_WINDOW = 1 << 58
"""Generic address of the first byte of the kernel's parameter buffer."""


@dataclass(frozen=True)
class Span:
    """Memory that a kernel may touch: process address, size in bytes, and the name used in findings."""

    start: int
    nbytes: int
    name: str

    @property
    def end(self) -> int:
        return self.start + self.nbytes


class GlobalMemory:
    """The tensors that were passed in. Spans may overlap (views of one storage); nothing outside them is touched.

    The caller keeps the memory behind the spans alive.
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        self.spans = sorted((s for s in spans if s.nbytes > 0), key=lambda s: (s.start, s.nbytes))
        self._starts: list[int] = []
        self._ends: list[int] = []
        for span in self.spans:
            if self._ends and span.start < self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], span.end)
            else:
                self._starts.append(span.start)
                self._ends.append(span.end)
        self._start_array = np.array(self._starts, np.uint64)
        self._end_array = np.array(self._ends, np.uint64)
        low = self._starts[0] & ~63 if self._starts else 64
        high = -(-max(self._ends, default=low + 64) // 64) * 64
        self._low = np.uint64(low)
        window = np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))
        self.views: dict[int, Array] = {size: window.view(unit) for size, unit in UNIT.items()}

    def with_spans(self, more: Iterable[Span]) -> GlobalMemory:
        return GlobalMemory([*self.spans, *more])

    def outside(self, address: Array, nbytes: int) -> Array | None:
        """None if every access of `nbytes` at `address` (uint64) lies inside one span; else a mask of those not."""
        if address.size == 0:
            return None
        low, high = int(address.min()), int(address.max())
        at = bisect_right(self._starts, low) - 1
        if at >= 0 and high + nbytes <= self._ends[at]:
            return None
        if not self._starts:
            return np.ones(address.shape, bool)
        where = np.searchsorted(self._start_array, address, "right") - 1
        held = where.clip(0)
        end = address + np.uint64(nbytes)
        bad = (where < 0) | (end > self._end_array[held]) | (end < address)
        return bad if bad.any() else None

    def index(self, address: Array, nbytes: int) -> Array:
        """Element index into `views[nbytes]` of checked, aligned addresses."""
        return ((address - self._low) >> np.uint64(nbytes.bit_length() - 1)).view(np.int64)

    def describe(self, address: int, nbytes: int) -> str:
        """Where an access lies relative to the nearest span: "16 bytes past the end of `out` (4096 bytes)"."""
        if not self.spans:
            return "no tensor was passed to this kernel"

        def distance(span: Span) -> int:
            return span.start - address if address < span.start else max(address + nbytes - span.end, 0)

        span = min(self.spans, key=distance)
        what = f"`{span.name}` ({span.nbytes} bytes)"
        if address < span.start:
            return f"{span.start - address} bytes before the start of {what}"
        if address >= span.end:
            return f"{address - span.end} bytes past the end of {what}"
        return f"at byte {address - span.start} of {what}, reaching {address + nbytes - span.end} bytes past its end"


def aligned_bytes(count: int, fill: int) -> NDArray[np.uint8]:
    """`count` bytes of value `fill`, starting at a multiple of 64."""
    raw = np.empty(count + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    data = raw[offset : offset + count]
    data.fill(fill)
    return data


class PrivateMemory:
    """Shared memory of the CTAs, or local memory of the lanes, of one wave: `owners` slices of `size` bytes.

    Unwritten bytes hold 0xFF, which is a NaN in every floating-point format wide enough to have one here.
    """

    def __init__(self, owners: int, size: int, alignment: int = 16) -> None:
        self.size = size
        self.stride = -(-max(size, alignment) // alignment) * alignment
        self.owners = owners
        self.data = aligned_bytes(owners * self.stride, 0xFF)
        self.views: dict[int, Array] = {n: self.data.view(unit) for n, unit in UNIT.items()}

    def base(self, owner: Array, nbytes: int) -> Array:
        """Element index into `views[nbytes]` of each owner's first byte."""
        return owner * np.int64(self.stride // nbytes)


class SharedMemory(PrivateMemory):
    """Shared memory that remembers which bytes were written.

    `_gap` is an interval of CTA-relative offsets outside of which every byte of every CTA is known to be written;
    accesses that miss it need no look at the flags.
    """

    def __init__(self, owners: int, size: int) -> None:
        # Tiles are multiples of this, and begin at multiples of it.
        super().__init__(owners, size, 1024)
        self._written = aligned_bytes(owners * self.stride, 0)
        self._flags: dict[int, Array] = {n: self._written.view(unit) for n, unit in UNIT.items()}
        self._gap = (0, size)
        self._stale = False

    def mark(self, index: Array, nbytes: int, low: int, high: int) -> None:
        """Notes a write of elements `index` of `views[nbytes]`, all within offsets [low, high) of their CTA."""
        if high <= self._gap[0] or low >= self._gap[1]:
            return
        self._flags[nbytes][index] = np.full(nbytes, 1, np.uint8).view(UNIT[nbytes])[0]
        self._stale = True

    def unwritten(self, index: Array, nbytes: int, low: int, high: int) -> Array | None:
        """None if everything read was written; else a mask over `index` of the accesses that touch unwritten bytes."""
        if high <= self._gap[0] or low >= self._gap[1]:
            return None
        if self._stale:
            self._find_gap()
            if high <= self._gap[0] or low >= self._gap[1]:
                return None
        flags = self._flags[nbytes].take(index)
        bad = (flags.reshape(-1, 1).view(np.uint8) == 0).any(1).reshape(index.shape)
        return bad if bad.any() else None

    def _find_gap(self) -> None:
        everywhere = self._written.reshape(self.owners, self.stride)[:, : self.size].min(axis=0)
        missing = np.flatnonzero(everywhere == 0)
        self._gap = (int(missing[0]), int(missing[-1]) + 1) if missing.size else (self.size, self.size)
        self._stale = False
