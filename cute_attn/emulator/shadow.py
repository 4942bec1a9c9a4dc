"""Shadow memory of the race detector: the stamp of the last write, and of each agent's last read, of shared memory.

A *granule* is the unit in which it remembers: the smallest access to shared memory that the kernel's instructions can
make, 16 bytes in many kernels that move tiles. Stamps are those of `clocks`; 0 means never.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .clocks import KINDS, Agents
from .memory import Array, SharedMemory
from .module import Instruction, Kernel
from .registry import instruction_type

_ACCESSES = re.compile(r"(?:ld|ldu|st|atom|red)\.")
_ENGINES = {
    "cp.async": re.compile(r"cp\.async\.c[ag]\."),
    "bulk": re.compile(r"cp\.(?:reduce\.)?async\.bulk\."),
    "wgmma": re.compile(r"wgmma\.mma_async"),
}
_ELSEWHERE = ("global", "local", "param", "const")
BLOCK_BYTES = 1024
LONG_ROW = 32
"""Elements from which on it pays to see whether they are contiguous."""
_STRONG = ("relaxed", "acquire", "release", "acq_rel", "volatile", "mmio")


@dataclass(frozen=True)
class SharedAccesses:
    """What a kernel's instructions say of its accesses to shared memory.

    kinds: the agents that make them (see `clocks`). granule: bytes of the smallest access, 16 at most; what the others
    move is a multiple of that. inits: the mbarrier.init, and strong: loads and stores that may race with their like, by
    index.
    """

    kinds: tuple[str, ...]
    granule: int
    inits: frozenset[int]
    strong: frozenset[int]

    @classmethod
    def of(cls, kernel: Kernel) -> SharedAccesses:
        sizes = [size for i in kernel.instructions if (size := _access_bytes(i)) is not None]
        inits = (i.index for i in kernel.instructions if i.opcode.startswith("mbarrier.init"))
        strong = frozenset(i.index for i in kernel.instructions if _ACCESSES.match(i.opcode) and _is_strong(i))
        kinds = {"strong"} if strong else set()
        for i in kernel.instructions:
            kinds.update(kind for kind, opcode in _ENGINES.items() if opcode.match(i.opcode))
        known = tuple(kind for kind in KINDS if kind == "warp" or kind in kinds)
        return cls(known, min(sizes, default=16), frozenset(inits), strong)


def _access_bytes(i: Instruction) -> int | None:
    """The bytes of one access of this instruction, where it may be one to shared memory; None where it is none.

    mbarriers, of 8 bytes, have a shadow of their own.
    """
    if i.opcode.startswith(("cp.async.ca.", "cp.async.cg.")):
        return min(int(i.operands[2], 0), 16)
    if i.opcode.startswith("st.bulk"):
        return 8
    if i.opcode.startswith("tensormap."):
        return 4
    if not _ACCESSES.match(i.opcode) or any(part.split("@")[0] in _ELSEWHERE for part in i.parts):
        return None
    kind = instruction_type(i.opcode)
    count = next((int(part[1:]) for part in i.parts if part in ("v2", "v4", "v8")), 1)
    return 1 if kind is None else min(kind.bytes * count, 16)


def _is_strong(i: Instruction) -> bool:
    return any(part in _STRONG for part in i.parts) or i.parts[0] in ("atom", "red")


class ByAgent:
    """The last accesses of one kind of agents of a CTA: `stamps` [agents of that kind, units of the wave].

    used: the agents that have made any.
    """

    def __init__(self, agents: int, units: int) -> None:
        self.stamps = np.zeros((agents, units), np.uint64)
        self.used: set[int] = set()

    def enlarge(self, agents: int) -> None:
        stamps = np.zeros((agents, self.stamps.shape[1]), np.uint64)
        stamps[: len(self.stamps)] = self.stamps
        self.stamps = stamps


@dataclass(frozen=True)
class Places:
    """[n, m] elements of `nbytes` of shared memory: `scattered`, or where that is None the m from `first` [n] on.

    first: the lowest element of each n.
    """

    nbytes: int
    first: Array
    length: int
    scattered: Array | None

    @classmethod
    def of(cls, elements: Array, nbytes: int) -> Places:
        """Of [n, m] elements, no one twice in a row, or of [n]."""
        if elements.ndim == 1:
            return cls(nbytes, elements, 1, elements[:, None])
        first, length = elements.min(1), elements.shape[1]
        if length >= LONG_ROW and (elements.max(1) - first == length - 1).all():
            return cls(nbytes, first, length, None)
        return cls(nbytes, first, length, elements)

    def blocks(self) -> Places | None:
        """In units of BLOCK_BYTES, if all of it is whole blocks."""
        count = BLOCK_BYTES // self.nbytes
        if self.scattered is not None or self.length % count or (self.first % count).any():
            return None
        return Places(BLOCK_BYTES, self.first // count, self.length // count, None)

    def __getitem__(self, rows: Array) -> Places:
        scattered = None if self.scattered is None else self.scattered[rows]
        return Places(self.nbytes, self.first[rows], self.length, scattered)

    def element(self, row: int, number: int) -> int:
        return int(self.first[row]) + number if self.scattered is None else int(self.scattered[row, number])

    def granules(self, granule: int) -> Places:
        """The same in units of a granule, which is not larger than an element, or holds it."""
        if self.nbytes == granule:
            return self
        if self.nbytes < granule:
            count = granule // self.nbytes
            if self.scattered is None and (self.first % count == self.first[0] % count).all():
                last = int(self.first[0]) % count + self.length - 1
                return Places(granule, self.first // count, last // count + 1, None)
            elements = self.elements() // count
            return Places(granule, elements.min(1), self.length, elements)
        count = self.nbytes // granule
        if self.scattered is None:
            return Places(granule, self.first * count, self.length * count, None)
        every = (self.scattered[:, :, None] * count + np.arange(count)).reshape(len(self.scattered), -1)
        return Places(granule, self.first * count, every.shape[1], every)

    def elements(self) -> Array:
        return self.first[:, None] + np.arange(self.length) if self.scattered is None else self.scattered


def _rows_of(table: Array, first: Array, length: int) -> Array | None:
    """`length` elements of a table from each of the places [n], as a view [a, b, length] with a * b = n.

    None where the places have no two strides.
    """
    for inner in (1, 2, 3, 4):
        if first.size % inner:
            continue
        places = first.reshape(-1, inner)
        across = int(places[0, -1] - places[0, 0]) // max(inner - 1, 1)
        along = int(places[1, 0] - places[0, 0]) if len(places) > 1 else 0
        regular = places[0, 0] + along * np.arange(len(places))[:, None] + across * np.arange(inner)
        if (places == regular).all():
            shape, strides = (len(places), inner, length), tuple(8 * n for n in (along, across, 1))
            return np.lib.stride_tricks.as_strided(table[int(first[0]) :], shape, strides)
    return None


class ShadowMemory:
    """`writes` [granules of the wave]; `by_agent`: reads, and writes that are kept apart, in tables of their own.

    Their key is the agent's rank relative to the CTA whose memory it is, the table's name, and its unit: granules, or
    blocks for accesses to whole ones. An agent's last access is the newer one of both.
    """

    def __init__(self, shared: SharedMemory, granule: int, agents: Agents) -> None:
        self.granule = granule
        self.agents = agents
        self.writes = np.zeros(shared.owners * shared.stride // granule, np.uint64)
        self.nbytes = shared.owners * shared.stride
        self.by_agent: dict[tuple[int, str, int], ByAgent] = {}

    def last(self, table: Array, places: Places) -> Array:
        """The stamps at places [n, m] in a table of their units: [n, units], or [n, 1] where they are the same."""
        if places.scattered is None and (view := _rows_of(table, places.first, places.length)) is not None:
            if (view == view[:, :, :1]).all():
                return view[:, :, 0].reshape(-1, 1)
            return view.reshape(-1, places.length)
        stamps = table.take(places.elements())
        return stamps[:, :1] if places.length > 4 and (stamps == stamps[:, :1]).all() else stamps

    def note_write(self, places: Places, stamps: Array) -> None:
        """stamps: [n] for places [n, m]."""
        self._put(self.writes, places.granules(self.granule), stamps)

    def last_writes(self, places: Places) -> Array:
        return self.last(self.writes, places.granules(self.granule))

    def _put(self, table: Array, places: Places, stamps: Array) -> None:
        if places.scattered is None and (view := _rows_of(table, places.first, places.length)) is not None:
            view[:] = stamps.reshape(*view.shape[:2], 1)
            return
        elements = places.elements()
        if places.length == 1:
            table[elements[:, 0]] = stamps
        elif places.length > 16:
            table[elements.reshape(-1)] = np.repeat(stamps, places.length)
        else:
            for n in range(places.length):
                table[elements[:, n]] = stamps

    def note(self, relative: int, table: str, agents: int, rows: Array, places: Places, stamps: Array) -> None:
        """rows [n]: which of the table's `agents` accesses the places [n, m]."""
        places = places.blocks() or places.granules(self.granule)
        key = (relative, table, places.nbytes)
        units = self.nbytes // places.nbytes
        if key not in self.by_agent:
            self.by_agent[key] = ByAgent(agents, units)
        elif len(self.by_agent[key].stamps) < agents:
            self.by_agent[key].enlarge(agents)
        by_agent = self.by_agent[key]
        by_agent.used.update(np.flatnonzero(np.bincount(rows)).tolist())
        above = rows * units
        scattered = None if places.scattered is None else places.scattered + above[:, None]
        there = Places(places.nbytes, places.first + above, places.length, scattered)
        self._put(by_agent.stamps.reshape(-1), there, stamps)
