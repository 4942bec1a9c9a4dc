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
    if not _ACCESSES.match(i.opcode) or any(part.split("@")[0] in _ELSEWHERE for part in i.parts):
        return None
    kind = instruction_type(i.opcode)
    count = next((int(part[1:]) for part in i.parts if part in ("v2", "v4", "v8")), 1)
    return 1 if kind is None else min(kind.bytes * count, 16)


def _is_strong(i: Instruction) -> bool:
    return any(part in _STRONG for part in i.parts) or i.parts[0] in ("atom", "red")


class ByAgent:
    """The last accesses of one kind of agents of a CTA: `stamps` [agents of that kind, granules of the wave].

    used: the agents that have made any.
    """

    def __init__(self, agents: int, granules: int) -> None:
        self.stamps = np.zeros((agents, granules), np.uint64)
        self.used: set[int] = set()

    def enlarge(self, agents: int) -> None:
        stamps = np.zeros((agents, self.stamps.shape[1]), np.uint64)
        stamps[: len(self.stamps)] = self.stamps
        self.stamps = stamps


class ShadowMemory:
    """`writes` [granules of the wave]; `by_agent`: reads, and writes that are kept apart, in tables of their own.

    Their key is the agent's rank relative to the CTA whose memory it is, and the table's name.
    """

    def __init__(self, shared: SharedMemory, granule: int, agents: Agents) -> None:
        self.granule = granule
        self.agents = agents
        self.per_cta = shared.stride // granule
        self.writes = np.zeros(shared.owners * self.per_cta, np.uint64)
        self.by_agent: dict[tuple[int, str], ByAgent] = {}

    def granules(self, elements: Array, nbytes: int) -> Array:
        """[n, m] elements of `nbytes` -> [n, m * granules per element]."""
        if nbytes <= self.granule:
            return elements if nbytes == self.granule else elements * nbytes // self.granule
        count = nbytes // self.granule
        return (elements[:, :, None] * count + np.arange(count)).reshape(len(elements), -1)

    def last(self, stamps: Array, elements: Array, nbytes: int) -> Array:
        """The stamps [n, m * granules per element] of elements [n, m] in a table of all granules."""
        if nbytes <= self.granule:
            return stamps.take(self.granules(elements, nbytes))
        table = stamps.reshape(-1, nbytes // self.granule)
        return table.take(elements, axis=0).reshape(len(elements), -1)

    def note_write(self, elements: Array, nbytes: int, stamps: Array) -> None:
        """stamps: [n] for elements [n, m]."""
        self._put(self.writes, elements, nbytes, stamps)

    def _put(self, table: Array, elements: Array, nbytes: int, stamps: Array) -> None:
        values = stamps if elements.shape[1] == 1 else np.repeat(stamps, elements.shape[1])
        flat = elements.reshape(-1)
        if nbytes <= self.granule:
            table[flat if nbytes == self.granule else flat * nbytes // self.granule] = values
            return
        count = nbytes // self.granule
        first = flat * count
        for n in range(count):
            table[first + n if n else first] = values

    def accesses_by(self, relative: int, table: str, agents: int) -> ByAgent:
        """A table of accesses, made at its first use, for so many agents."""
        key = (relative, table)
        if key not in self.by_agent:
            self.by_agent[key] = ByAgent(agents, self.writes.size)
        elif len(self.by_agent[key].stamps) < agents:
            self.by_agent[key].enlarge(agents)
        return self.by_agent[key]

    def note(self, by_agent: ByAgent, rows: Array, elements: Array, nbytes: int, stamps: Array) -> None:
        """rows [n]: which of the agents accesses the elements [n, m]."""
        if nbytes < self.granule:
            elements, nbytes = elements * nbytes // self.granule, self.granule
        by_agent.used.update(np.flatnonzero(np.bincount(rows)).tolist())
        per_row = self.writes.size // (nbytes // self.granule)
        self._put(by_agent.stamps.reshape(-1), (rows * per_row)[:, None] + elements, nbytes, stamps)
