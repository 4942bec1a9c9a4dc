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

from .clocks import (
    AGENT_SHIFT,
    ASYNC_PROXY,
    BARRIER_INIT,
    HAPPENS_BEFORE,
    INSTRUCTION,
    Clocks,
    MbarrierClocks,
    ObjectClocks,
)
from .errors import DataRace, MissingProxyFence
from .exits import Visits
from .memory import Array
from .shadow import Places, ShadowMemory, SharedAccesses
from .wave import Group, Wave

NAMED_BARRIERS = 16
_STRONG_WRITES = "strong writes"
_WAITS = {"cp.async": "cp.async.wait_group", "bulk": "cp.async.bulk.wait_group", "wgmma": "wgmma.wait_group"}
_SHIFT = np.uint64(AGENT_SHIFT)
_VERBS = ("read", "write", "init")
_NOBODY = np.zeros(0, np.int64)


@dataclass(frozen=True)
class _Access:
    """One instruction's accesses: places [n, m], and for each n the lane whose warp must know of earlier accesses, and
    the stamp of these.

    together: so many warps, this one the first, have to know. data [n]: what a write of the generic proxy will write.
    """

    group: Group
    index: int
    lanes: Array
    warps: Array
    stamps: Array
    kind: str
    places: Places
    data: Array | None = None
    together: int = 1


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
    """What the wave's warps know, what they last did to its shared memory, and the objects at which they meet.

    `named` [CTA * 16 + number], `cluster` [cluster * 2 + parity] and `strong` [cluster] are clocks of barriers and of
    acquire and release accesses; `mbarriers` go by key.
    """

    def __init__(self, wave: Wave, accesses: SharedAccesses) -> None:
        self.wave = wave
        self.accesses = accesses
        self.clocks = Clocks(wave, accesses.kinds, len(accesses.inits))
        self.agents = self.clocks.agents
        self.shadow = ShadowMemory(wave.shared, accesses.granule, self.agents)
        self.barriers = ShadowMemory(wave.shared, 8, self.agents)
        clusters = len(wave.ctas) // wave.cluster_size
        self.named = ObjectClocks(self.clocks, len(wave.ctas) * NAMED_BARRIERS)
        self.cluster = ObjectClocks(self.clocks, 2 * clusters)
        self.strong = ObjectClocks(self.clocks, clusters)
        self.mbarriers = MbarrierClocks(self.clocks, wave.shared.stride // 8, len(accesses.inits))
        self.visits = Visits(self.clocks)
        self._last = {verb: np.zeros((clusters, self.clocks.count), np.uint64) for verb in _VERBS}
        self._news = dict.fromkeys(_VERBS, 0)
        self._noted: dict[tuple[str, str], tuple[Group, int]] = {}
        self._suspected: dict[tuple[str, int], tuple[object, Array]] = {}
        self._jointly: dict[tuple[int, int], tuple[int, Array]] = {}
        self._operands: dict[tuple[Group, bytes, bytes, int], _Operand] = {}

    # ---- accesses by instructions of warps

    def read(self, group: Group, elements: Array, nbytes: int, positions: Array | None, index: int) -> None:
        """The lanes of the group, or those at `positions`, read an element each."""
        if not elements.size:
            return
        if index in self.accesses.strong:
            self._strong(group, elements, nbytes, positions, index, writes=False)
        else:
            self._read(self._access(group, _lanes(group, positions), Places.of(elements, nbytes), index, "warp"))

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
            self._write(self._access(group, _lanes(group, positions), Places.of(elements, nbytes), index, "warp", data))

    def read_by_ctas(self, group: Group, elements: Array, nbytes: int, positions: Array, index: int) -> None:
        """As `read` for positions in the first of the group's warps in each CTA: all of them read these elements."""
        count = group.warps_per_cta
        table = group.warps.reshape(-1, count)
        if count == 1 or not (table[:, -1] - table[:, 0] == count - 1).all():
            for warp in range(count):
                self.read(group, elements, nbytes, positions + 32 * warp, index)
            return
        access = self._access(group, group.lane_numbers[positions], Places.of(elements, nbytes), index, "warp")
        access = replace(access, together=count)
        self._check_writes(access, "read")
        self._note_last("read", access)
        for warp in range(count):
            stamps = self.clocks.stamps["warp"][access.warps + warp] | np.uint64(index & INSTRUCTION)
            self._note(replace(access, stamps=stamps), "warp")

    def update(self, group: Group, elements: Array, nbytes: int, positions: Array | None, index: int) -> None:
        """An atomic read and write."""
        if elements.size:
            self._strong(group, elements, nbytes, positions, index, writes=True)

    def _strong(
        self, group: Group, elements: Array, nbytes: int, positions: Array | None, index: int, *, writes: bool
    ) -> None:
        """An access that races with no other of its kind, and may acquire and release.

        It is entered beside the last write, not in its place: what came before still has to be known.
        """
        self._enter_operands()
        parts = self.wave.kernel.instructions[index].parts
        lanes = _lanes(group, positions)
        clusters = self.agents.cluster_of_warp[lanes >> 5]
        access = self._access(group, lanes, Places.of(elements, nbytes), index, "strong")
        self._check_writes(access, "write" if writes else "read")
        if writes:
            self._check_reads(access)
        self._note_last("write" if writes else "read", access)
        self._note(access, _STRONG_WRITES if writes else "strong")
        self._visit(access)
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
            self._write(self._access(group, _lanes(group, positions), Places.of(elements, nbytes), index, kind))

    def read_later(
        self, group: Group, lanes: Array, elements: Array, nbytes: int, index: int, kind: str, used: Array | None = None
    ) -> None:
        """Operations of these lanes [n] read elements [n, m] through the async proxy until their group is awaited.

        used: which of the elements.
        """
        elements, row = _rows(elements, used)
        if elements.size:
            access = self._access(group, lanes[row], Places.of(elements, nbytes), index, kind)
            self._read(access)
            self._require_fence(access)

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
            self._read(access)
            self._require_fence(access)

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
        for place, enter in ((reads, self._read), (writes, self._write)):
            if place is None:
                continue
            elements, row = _rows(place[0], place[2])
            if elements.size:
                lane, places = lanes[row], Places.of(elements, place[1])
                access = _Access(group, index, lane, lane >> 5, stamps[row], "mbarrier", places)
                if proxy:
                    self._require_fence(access)
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
        self._check_writes(access, "write")
        self._check_reads(access)
        self._check_init(access, "init")
        self._note_last("init", access)
        self.barriers.note_write(access.places, access.stamps)
        self.mbarriers.initialize(keys)

    def use_barriers(self, group: Group, lanes: Array, keys: Array, index: int, *, proxy: bool = False) -> None:
        """An operation on mbarriers, whose initialisation has to be known to these lanes' warps."""
        access = self._access(group, lanes, Places.of(keys, 8), index, "warp")
        self._check_init(access, "use")
        if self.wave.cluster_size > 1:
            self.visits.note(keys // self.mbarriers.slots, access.warps, access.stamps)
        if proxy:
            self._require_fence(access, BARRIER_INIT)

    def _check_init(self, access: _Access, verb: str) -> None:
        """The barrier's last initialisation has to be known."""
        if self._suspects("init", access).size:
            stamps = self.barriers.last_writes(access.places)
            if (unknown := self._unknown(access, stamps)).any():
                self._report(access, unknown, stamps, verb, "init", 8)

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

    # ---- the rules

    def _access(
        self,
        group: Group,
        lanes: Array,
        places: Places,
        index: int,
        kind: str,
        data: Array | None = None,
    ) -> _Access:
        warps = lanes >> 5
        stamps = self.clocks.stamps[kind].take(warps)
        stamps |= np.uint64(index & INSTRUCTION)
        return _Access(group, index, lanes, warps, stamps, kind, places, data)

    def _read(self, access: _Access) -> None:
        self._check_writes(access, "read")
        self._note_last("read", access)
        self._note(access, access.kind)
        self._visit(access)

    def _visit(self, access: _Access) -> None:
        if self.wave.cluster_size > 1:
            ctas = access.places.first * access.places.nbytes // self.wave.shared.stride
            self.visits.note(ctas, access.warps, access.stamps)

    def _note(self, access: _Access, table: str) -> None:
        """Enters the access among the last ones of each agent."""
        agents = (access.stamps >> _SHIFT).view(np.int64)
        size = self.agents.cluster_size
        local = agents if size == 1 else agents // size
        if access.kind in self.agents.kinds:
            rows, count = local - self.agents.kinds.index(access.kind) * self.agents.warps, self.agents.warps
        else:
            rows, count = local - self.agents.fixed, self.mbarriers.columns
        places = access.places
        relative = 0 if size == 1 else (agents - places.first * places.nbytes // self.wave.shared.stride) % size
        if not np.any(relative):
            self.shadow.note(0, table, count, rows, places, access.stamps)
            return
        for other in np.unique(relative).tolist():
            some = relative == other
            self.shadow.note(other, table, count, rows[some], places[some], access.stamps[some])

    def _write(self, access: _Access) -> None:
        self._check_writes(access, "write")
        self._check_reads(access)
        self._note_last("write", access)
        self._visit(access)
        self.shadow.note_write(access.places, access.stamps)
        self._check_each_other(access)

    def _note_last(self, verb: str, access: _Access) -> None:
        """Keeps the newest stamp of every agent: of whom everything is known, nothing has to be looked up."""
        if access.kind in self.agents.kinds:
            warps = access.group.warps  # perhaps more than take part, which does no harm
            if self._noted.get((verb, access.kind)) == (access.group, self.clocks.version):
                return
            self._noted[verb, access.kind] = (access.group, self.clocks.version)
            stamps = self.clocks.stamps[access.kind][warps]
        else:
            warps, stamps = access.warps, access.stamps
        last = self._last[verb]
        if last.shape[1] < self.clocks.count:
            more = np.zeros((last.shape[0], self.clocks.count - last.shape[1]), np.uint64)
            last = self._last[verb] = np.concatenate([last, more], axis=1)
        last[self.agents.cluster_of_warp[warps], (stamps >> _SHIFT).view(np.int64)] = stamps | np.uint64(INSTRUCTION)
        self._news[verb] += 1

    def _suspects(self, verb: str, access: _Access, plane: int = HAPPENS_BEFORE) -> Array:
        """Agents of which some warp of the group does not know everything."""
        now = (access.group, self.clocks.version, self._news[verb])
        before, agents = self._suspected.get((verb, plane), (None, _NOBODY))
        if before != now:
            warps = access.group.warps
            known = self.clocks.known[plane] if access.group.is_whole else self.clocks.known[plane, warps]
            last = self._last[verb]
            agents = np.flatnonzero((known[:, : last.shape[1]] < last[self.agents.cluster_of_warp[warps]]).any(0))
            self._suspected[verb, plane] = (now, agents)
        return agents

    def _known(self, plane: int, together: int) -> Array:
        """Flat [warps, agents]: what each warp and the next ones, `together` in all, know."""
        if together == 1:
            return self.clocks.known[plane].reshape(-1)
        version, known = self._jointly.get((plane, together), (-1, _NOBODY))
        if version != self.clocks.version:
            own = self.clocks.known[plane]
            lowest = own.copy()
            for n in range(1, together):
                np.minimum(lowest[:-n], own[n:], out=lowest[:-n])
            known = lowest.reshape(-1)
            self._jointly[plane, together] = (self.clocks.version, known)
        return known

    def _unknown(self, access: _Access, stamps: Array, plane: int = HAPPENS_BEFORE) -> Array:
        """Which of the stamps [n, granules] the warps of the access do not know."""
        entry = (stamps >> _SHIFT).view(np.int64)
        entry += (access.warps * self.clocks.count)[:, None]
        unknown: Array = stamps > self._known(plane, access.together).take(entry)
        return unknown

    def _check_writes(self, access: _Access, verb: str) -> None:
        suspects = self._suspects("write", access)
        if not suspects.size:
            return
        stamps = self.shadow.last_writes(access.places)
        unknown = self._unknown(access, stamps)
        if unknown.any():
            unknown &= ~self._harmless(access, stamps)
            if unknown.any():
                self._report(access, unknown, stamps, verb, "write")
        if access.kind != "strong":
            self._check_each_agent(access, suspects, verb, "write")

    def _check_reads(self, access: _Access) -> None:
        suspects = self._suspects("read", access)
        if suspects.size:
            self._check_each_agent(access, suspects, "write", "read")

    def _check_each_agent(self, access: _Access, suspects: Array, verb: str, earlier: str) -> None:
        """Checks against the last read, or the last strong write, of each of the agents."""
        wanted: set[tuple[str, int]] | None = None
        for (_, table, unit), by_agent in self.shadow.by_agent.items():
            if (table == _STRONG_WRITES) != (earlier == "write") or table == access.kind == "strong":
                continue
            if wanted is None:
                wanted = {(kind, row) for kind, _, row in map(self.agents.identify, suspects.tolist())}
            places = access.places.granules(unit)
            for row in sorted(by_agent.used):
                if (table.removesuffix(" writes"), row) in wanted:
                    stamps = self.shadow.last(by_agent.stamps[row], places)
                    if (unknown := self._unknown(access, stamps)).any():
                        self._report(access, unknown, stamps, verb, earlier, unit)

    def _harmless(self, access: _Access, stamps: Array) -> Array:
        """Where the earlier write, of another warp, wrote what is written now."""
        if access.data is None:
            return np.zeros(stamps.shape, bool)
        old = self.wave.shared.views[access.places.nbytes].take(access.places.first)
        same = _bytes(old, stamps.shape) == _bytes(access.data, stamps.shape)
        return same.all(2) & (stamps >> _SHIFT < np.uint64(self.agents.warps * self.agents.cluster_size))

    def _check_each_other(self, access: _Access) -> None:
        """Two warps' writes of one instruction to the same place."""
        stamps = self.shadow.last_writes(access.places)
        if (stamps == access.stamps[:, None]).all():
            return
        others = (stamps ^ access.stamps[:, None]) >> _SHIFT != 0
        if access.data is not None:
            unique, place = np.unique(access.places.first, return_inverse=True)
            written = np.zeros(unique.size, access.data.dtype)
            written[place] = access.data
            others &= (_bytes(written[place], stamps.shape) != _bytes(access.data, stamps.shape)).any(2)
            if not others.any():
                return
        self._report(access, others, stamps, "write", "write")

    def _require_fence(self, access: _Access, plane: int = ASYNC_PROXY) -> None:
        """What the generic proxy has written has to be visible to the async proxy."""
        verb, shadow = ("write", self.shadow) if plane == ASYNC_PROXY else ("init", self.barriers)
        suspects = self._suspects(verb, access, plane)
        if not suspects.size or suspects[0] >= self.agents.generic:  # they ascend
            return
        stamps = shadow.last_writes(access.places)
        unknown = self._unknown(access, stamps, plane) & (stamps >> _SHIFT < np.uint64(self.agents.generic))
        if not unknown.any():
            return
        n, granule = np.unravel_index(int(np.argmax(unknown)), unknown.shape)
        stamp = int(stamps[n, granule])
        what = "accesses" if plane == ASYNC_PROXY else "reports to"
        thing = "shared memory" if plane == ASYNC_PROXY else "the mbarrier"
        fence = "fence.proxy.async" if plane == ASYNC_PROXY else "fence.mbarrier_init (or fence.proxy.async)"
        self._fail(
            MissingProxyFence,
            access,
            int(n),
            stamp,
            f"the async proxy {what} {thing} at {self._where(access, int(n), int(granule), shadow.granule)}, which "
            f"{self._who(access, int(n), stamp)} wrote through the generic proxy by {self._instruction(stamp)}; no "
            f"{fence} lies between",
        )

    # ---- reports

    def _report(
        self, access: _Access, unknown: Array, stamps: Array, verb: str, earlier: str, unit: int | None = None
    ) -> None:
        """unknown, stamps: [n, units]."""
        n, granule = (int(x) for x in np.unravel_index(int(np.argmax(unknown)), unknown.shape))
        stamp, count = int(stamps[n, granule]), int(unknown.any(1).sum())
        verb = {"use": "operation on the mbarrier", "init": "mbarrier"}.get(verb, f"{verb} of shared memory")
        self._fail(
            DataRace,
            access,
            n,
            stamp,
            f"{verb} at {self._where(access, n, granule, unit or self.shadow.granule)}, "
            f"{access.places.nbytes} bytes, races with its {earlier} by "
            f"{self._who(access, n, stamp)}, {self._instruction(stamp)}: {self._missing(access, n, stamp)} "
            f"({count} {'access' if count == 1 else 'accesses'} in all)",
        )

    def _fail(self, error: type[DataRace | MissingProxyFence], access: _Access, n: int, stamp: int, what: str) -> None:
        position = int(np.searchsorted(access.group.lane_numbers, access.lanes[n]))
        position = min(position, access.group.size - 1)
        try:
            access.group.fail(error, access.index, position, what)
        except error as finding:
            finding.other = self.wave.kernel.instructions[stamp & INSTRUCTION].text
            raise

    def _instruction(self, stamp: int) -> str:
        return self.wave.kernel.instructions[stamp & INSTRUCTION].place

    def _where(self, access: _Access, n: int, number: int, unit: int) -> str:
        """The place of the unit of that number, or of the access where that begins within."""
        stride = self.wave.shared.stride
        places = access.places
        byte = max(places.granules(unit).element(n, number) * unit, int(places.first[n]) * places.nbytes)
        return f"offset {byte % stride:#x} of CTA {self._cta(byte // stride)}"

    def _cta(self, cta: int) -> tuple[int, int, int]:
        return self.wave.locate(cta * self.wave.cta_lanes)[0]

    def _owner(self, access: _Access, n: int, stamp: int) -> tuple[str, int, int]:
        """(kind, CTA of the wave, warp of the CTA or column of the mbarrier) of the stamp's agent."""
        kind, rank, number = self.agents.identify(stamp >> AGENT_SHIFT)
        cluster = int(self.agents.cluster_of_warp[access.warps[n]])
        return kind, cluster * self.agents.cluster_size + rank, number

    def _who(self, access: _Access, n: int, stamp: int) -> str:
        kind, cta, number = self._owner(access, n, stamp)
        place = f" of CTA {self._cta(cta)}"
        if kind == "mbarrier":
            offset = self.mbarriers.slot_of_column[number] * 8
            return f"a copy that reports to the mbarrier at {offset:#x}{place}"
        names = {
            "warp": f"warp {number}",
            "strong": f"warp {number}",
            "cp.async": f"a copy of warp {number}",
            "bulk": f"a bulk copy of warp {number}",
            "wgmma": f"the wgmma of warps {number} to {number + 3}",
        }
        return names[kind] + place

    def _missing(self, access: _Access, n: int, stamp: int) -> str:
        kind, cta, number = self._owner(access, n, stamp)
        if kind in ("warp", "strong"):
            return "no barrier orders them"
        if kind == "mbarrier":
            return "no wait for that phase of the mbarrier lies between"
        warp = cta * self.agents.warps + number
        wait = _WAITS[kind]
        agent = stamp >> AGENT_SHIFT
        if warp == int(access.warps[n]):
            return f"{wait} is missing, or lets too many groups be in flight"
        if int(self.clocks.known[HAPPENS_BEFORE, warp, agent]) >= stamp:
            return f"no barrier orders this after its {wait}"
        return f"{wait} by the issuing warp, followed by a barrier, is missing"


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


def _bytes(elements: Array, shape: tuple[int, ...]) -> Array:
    """[n, granules per access, bytes of a granule]"""
    return np.ascontiguousarray(elements).view(np.uint8).reshape(*shape, -1)
