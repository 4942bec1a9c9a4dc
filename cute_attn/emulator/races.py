"""The race detector: accesses to shared memory that nothing orders, on whatever schedule they are met.

Two accesses to the same bytes by different agents (see `clocks`), one of them a write, need a chain of barriers, waits
and fences between them. The detector follows the chain and not the order in which the emulator happens to step, so it
finds a missing one also where the values come out right. An asynchronous operation accesses memory from its
instruction on until somebody has waited for it, and is entered when it is issued.

The unit is the warp: what the lanes of one warp do to each other is not looked at. Two warps that write the same value
do not race. Global memory is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .clocks import INSTRUCTION, Clocks, MbarrierClocks, ObjectClocks
from .memory import Array
from .race_report import Access
from .race_rules import RaceRules
from .shadow import Places, SharedAccesses
from .wave import Group, Wave

NAMED_BARRIERS = 16


@dataclass(frozen=True)
class _Operand:
    """What wgmma of these lanes' warps read, and have not been entered for: 16-byte chunks first [n] + chunks."""

    group: Group
    lanes: Array
    first: Array
    chunks: list[Array]
    index: int
    together: int


class Races:
    """What the families tell: what the wave's warps access, and where they meet.

    `named` [CTA * 16 + number], `cluster` [cluster * 2 + parity] and `strong` [cluster] are clocks of barriers and of
    acquire and release accesses; `mbarriers` go by key.
    """

    def __init__(self, wave: Wave, accesses: SharedAccesses) -> None:
        self.wave = wave
        self.accesses = accesses
        self.clocks = Clocks(wave, accesses.kinds, len(accesses.inits))
        self.agents = self.clocks.agents
        clusters = len(wave.ctas) // wave.cluster_size
        self.named = ObjectClocks(self.clocks, len(wave.ctas) * NAMED_BARRIERS)
        self.cluster = ObjectClocks(self.clocks, 2 * clusters)
        self.strong = ObjectClocks(self.clocks, clusters)
        self.mbarriers = MbarrierClocks(self.clocks, wave.shared.stride // 8, len(accesses.inits))
        self.rules = RaceRules(self.clocks, self.mbarriers, accesses.granule)
        self._operands: dict[tuple[Group, bytes, bytes, int], _Operand] = {}

    # ---- accesses by instructions of warps

    def read(self, group: Group, elements: Array, nbytes: int, positions: Array | None, index: int) -> None:
        """The lanes of the group, or those at `positions`, read an element each."""
        if not elements.size:
            return
        if index in self.accesses.strong:
            self._strong(group, elements, nbytes, positions, index, writes=False)
        else:
            self.rules.read(self._access(group, _lanes(group, positions), Places.of(elements, nbytes), index, "warp"))

    def write(
        self,
        group: Group,
        elements: Array,
        nbytes: int,
        positions: Array | None,
        index: int,
        data: Array | None = None,
    ) -> None:
        """The same for writes, which are still to be done. data: what will be written; two may write the same."""
        if not elements.size:
            return
        if index in self.accesses.strong:
            self._strong(group, elements, nbytes, positions, index, writes=True)
        else:
            self.rules.write(
                self._access(group, _lanes(group, positions), Places.of(elements, nbytes), index, "warp", data)
            )

    def read_by_ctas(self, group: Group, elements: Array, nbytes: int, positions: Array, index: int) -> None:
        """As `read` for positions in the first of the group's warps in each CTA: all of them read these elements."""
        count = group.warps_per_cta
        table = group.warps.reshape(-1, count)
        if count == 1 or not (table[:, -1] - table[:, 0] == count - 1).all():
            for warp in range(count):
                self.read(group, elements, nbytes, positions + 32 * warp, index)
            return
        access = self._access(group, group.lane_numbers[positions], Places.of(elements, nbytes), index, "warp")
        self.rules.read_by_warps(replace(access, together=count))

    def update(self, group: Group, elements: Array, nbytes: int, positions: Array | None, index: int) -> None:
        """An atomic read and write."""
        if elements.size:
            self._strong(group, elements, nbytes, positions, index, writes=True)

    def _strong(
        self, group: Group, elements: Array, nbytes: int, positions: Array | None, index: int, *, writes: bool
    ) -> None:
        """An access that races with no other of its kind, and may acquire and release."""
        self._enter_operands()
        parts = self.wave.kernel.instructions[index].parts
        lanes = _lanes(group, positions)
        clusters = self.agents.cluster_of_warp[lanes >> 5]
        access = self._access(group, lanes, Places.of(elements, nbytes), index, "strong")
        self.rules.enter_strong(access, writes=writes)
        if not writes or parts[0] == "atom":
            self.strong.acquire(lanes, clusters, relaxed=not {"acquire", "acq_rel"}.intersection(parts))
        if writes:
            self.strong.release(lanes, clusters, relaxed=not {"release", "acq_rel"}.intersection(parts))

    # ---- asynchronous operations

    def write_later(
        self, group: Group, elements: Array, nbytes: int, positions: Array | None, index: int, kind: str
    ) -> None:
        """Operations of these lanes write an element each, through the generic proxy, until their group is awaited."""
        if elements.size:
            self.rules.write(self._access(group, _lanes(group, positions), Places.of(elements, nbytes), index, kind))

    def read_later(
        self, group: Group, lanes: Array, elements: Array, nbytes: int, index: int, kind: str, used: Array | None = None
    ) -> None:
        """Operations of these lanes [n] read elements [n, m] through the async proxy until their group is awaited.

        used: which of the elements.
        """
        elements, row = _rows(elements, used)
        if elements.size:
            access = self._access(group, lanes[row], Places.of(elements, nbytes), index, kind)
            self.rules.read(access)
            self.rules.require_fence(access)

    def read_operand(
        self, group: Group, lanes: Array, first: Array, chunks: Array, index: int, together: int = 1
    ) -> None:
        """A wgmma of these lanes' warps [n], or of so many from theirs on, reads 16-byte chunks first [n] + chunks [m].

        Reads of instructions that follow each other are entered together, before these warps learn anything new.
        """
        key = (group, lanes.tobytes(), (first - first[0]).tobytes(), together)
        if key not in self._operands:
            self._operands[key] = _Operand(group, lanes, first, [], index, together)
        operand = self._operands[key]
        operand.chunks.append(chunks + (first[0] - operand.first[0]))

    def _enter_operands(self) -> None:
        operands, self._operands = self._operands, {}
        for operand in operands.values():
            chunks = np.concatenate(operand.chunks)
            lowest = int(chunks.min())
            touched = np.zeros(int(chunks.max()) - lowest + 1, bool)
            touched[chunks - lowest] = True
            if touched.all():
                places = Places(16, operand.first + lowest, touched.size, None)
            else:
                places = Places.of(operand.first[:, None] + (lowest + np.flatnonzero(touched)), 16)
            access = self._access(operand.group, operand.lanes, places, operand.index, "wgmma")
            access = replace(access, together=operand.together)
            self.rules.read(access)
            self.rules.require_fence(access)

    def transfer(
        self,
        group: Group,
        lanes: Array,
        keys: Array,
        index: int,
        *,
        reads: tuple[Array, int, Array | None] | None = None,
        writes: tuple[Array, int, Array | None] | None = None,
        proxy: bool = True,
    ) -> None:
        """Copies of these lanes [n] that report to mbarriers, and what they access until the phase completes.

        reads, writes: (elements [n, m], their bytes, which of them). proxy: whether it is the async proxy that copies.
        """
        self.use_barriers(group, lanes, keys, index, proxy=proxy)
        stamps = self.mbarriers.stamps(keys) | np.uint64(index & INSTRUCTION)
        for place, enter in ((reads, self.rules.read), (writes, self.rules.write)):
            if place is None:
                continue
            elements, row = _rows(place[0], place[2])
            if elements.size:
                lane, places = lanes[row], Places.of(elements, place[1])
                access = Access(group, index, lane, lane >> 5, stamps[row], "mbarrier", places)
                if proxy:
                    self.rules.require_fence(access)
                enter(access)
        self.mbarriers.pending.release(lanes, self.mbarriers.objects(keys))

    def close_group(self, kind: str, lanes: Array) -> None:
        self._enter_operands()
        if kind in self.agents.kinds:  # else nothing is ever in such a group
            self.clocks.close(kind, _warps(lanes))

    def await_groups(self, kind: str, lanes: Array, newest: int) -> None:
        self._enter_operands()
        if kind in self.agents.kinds:
            self.clocks.await_groups(kind, _warps(lanes), newest)

    def await_all(self, kind: str, lanes: Array) -> None:
        self._enter_operands()
        if kind in self.agents.kinds:
            self.clocks.await_all(kind, _warps(lanes))

    # ---- barriers and fences

    def leave_named(self, lanes: Array, ctas: Array, number: int) -> None:
        """The barrier of that number is complete in these CTAs: the lanes that waited for it go on."""
        self._enter_operands()
        self.named.acquire(lanes, self.wave.cta_of_lane[lanes] * NAMED_BARRIERS + number)
        self.named.reset(ctas * NAMED_BARRIERS + number)

    def arrive_at_cluster(self, lanes: Array, generation: Array, *, relaxed: bool) -> None:
        """generation: how often each lane has arrived before."""
        self.cluster.release(lanes, self._cluster_objects(lanes, generation), relaxed=relaxed)

    def leave_cluster(self, lanes: Array, generation: Array) -> None:
        self._enter_operands()
        self.cluster.acquire(lanes, self._cluster_objects(lanes, generation))

    def _cluster_objects(self, lanes: Array, generation: Array) -> Array:
        # Who arrives for the second time after a generation has learnt all of it, so two objects serve them all.
        return self.agents.cluster_of_warp[lanes >> 5] * 2 + generation % 2

    def fence(self, lanes: Array) -> None:
        self._enter_operands()
        self.clocks.fence(_warps(lanes))

    def fence_proxy(self, lanes: Array, *, barriers_only: bool = False) -> None:
        self._enter_operands()
        self.clocks.fence_proxy(_warps(lanes), barriers_only=barriers_only)

    # ---- mbarriers

    def initialize(self, group: Group, keys: Array, positions: Array | None, index: int) -> None:
        """mbarrier.init: a write of the barrier's 8 bytes, and a new barrier."""
        access = self._access(group, _lanes(group, positions), Places.of(keys, 8), index, "warp")
        self.rules.initialize(access)
        self.mbarriers.initialize(keys)

    def use_barriers(self, group: Group, lanes: Array, keys: Array, index: int, *, proxy: bool = False) -> None:
        """An operation on mbarriers, whose initialisation has to be known to these lanes' warps."""
        access = self._access(group, lanes, Places.of(keys, 8), index, "warp")
        self.rules.use(access, proxy=proxy)

    def arrive(self, group: Group, keys: Array, positions: Array | None, index: int) -> None:
        """An arrival of the lanes of the group, or of those at `positions`, or expect_tx alone, which is relaxed."""
        lanes = _lanes(group, positions)
        self.use_barriers(group, lanes, keys, index)
        parts = self.wave.kernel.instructions[index].parts
        relaxed = "relaxed" in parts or not parts[1].startswith("arrive")
        self.mbarriers.pending.release(lanes, self.mbarriers.objects(keys), relaxed=relaxed)

    def arrive_after(self, group: Group, lanes: Array, keys: Array, index: int, kind: str) -> None:
        """An arrival that comes when what these lanes have issued is complete."""
        self.use_barriers(group, lanes, keys, index)
        if kind in self.agents.kinds:
            self.mbarriers.await_engine(kind, lanes, keys)
        self.mbarriers.pending.release(lanes, self.mbarriers.objects(keys))

    def test_barriers(self, group: Group, keys: Array, positions: Array | None, index: int, passed: Array) -> None:
        """A test or wait, which finds the phase complete where `passed`."""
        self._enter_operands()
        lanes = _lanes(group, positions)
        self.use_barriers(group, lanes, keys, index)
        if passed.any():
            relaxed = "relaxed" in self.wave.kernel.instructions[index].parts
            objects = self.mbarriers.objects(keys[passed])
            self.mbarriers.complete.acquire(lanes[passed], objects, relaxed=relaxed)

    def _access(
        self,
        group: Group,
        lanes: Array,
        places: Places,
        index: int,
        kind: str,
        data: Array | None = None,
    ) -> Access:
        warps = lanes >> 5
        stamps = self.clocks.stamps[kind].take(warps)
        stamps |= np.uint64(index & INSTRUCTION)
        return Access(group, index, lanes, warps, stamps, kind, places, data)


def _lanes(group: Group, positions: Array | None) -> Array:
    return group.lane_numbers if positions is None else group.lane_numbers[positions]


def _rows(elements: Array, used: Array | None) -> tuple[Array, Array]:
    """Elements [n, m] and the n of each row of them; single elements where not all are used."""
    if used is None or used.all():
        return elements, np.arange(len(elements))
    return elements[used][:, None], np.nonzero(used)[0]


def _warps(lanes: Array) -> Array:
    """The warps that have one of these lanes, which ascend, or nearly."""
    warps = lanes >> 5
    changes = np.flatnonzero(warps[1:] != warps[:-1]) + 1
    return np.unique(np.concatenate([warps[:1], warps[changes]]))
