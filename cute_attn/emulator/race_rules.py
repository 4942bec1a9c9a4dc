"""The rules of the race detector: which accesses to shared memory have to be known to whom.

An access is checked against the last write of what it touches, a write against the last read of every agent as well,
and then takes its place among them. Those of whom everything is known are not looked up.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .clocks import AGENT_SHIFT, ASYNC_PROXY, BARRIER_INIT, HAPPENS_BEFORE, INSTRUCTION, Clocks, MbarrierClocks
from .exits import Visits
from .memory import Array
from .race_report import Access, RaceReport
from .shadow import ShadowMemory
from .wave import Group

STRONG_WRITES = "strong writes"
_SHIFT = np.uint64(AGENT_SHIFT)
_VERBS = ("read", "write", "init")
_NOBODY = np.zeros(0, np.int64)


class RaceRules:
    """What was last done to the wave's shared memory, and to its mbarriers' initial state (`barriers`)."""

    def __init__(self, clocks: Clocks, mbarriers: MbarrierClocks, granule: int) -> None:
        self.wave = clocks.wave
        self.clocks = clocks
        self.agents = clocks.agents
        self.mbarriers = mbarriers
        self.report = RaceReport(clocks, mbarriers)
        self.shadow = ShadowMemory(self.wave.shared, granule, self.agents)
        self.barriers = ShadowMemory(self.wave.shared, 8, self.agents)
        self.visits = Visits(clocks)
        clusters = len(self.wave.ctas) // self.wave.cluster_size
        self._last = {verb: np.zeros((clusters, clocks.count), np.uint64) for verb in _VERBS}
        self._news = dict.fromkeys(_VERBS, 0)
        self._noted: dict[tuple[str, str], tuple[Group, int]] = {}
        self._suspected: dict[tuple[str, int], tuple[object, Array]] = {}
        self._jointly: dict[tuple[int, int], tuple[int, Array]] = {}

    # ---- accesses

    def read(self, access: Access) -> None:
        self._check_writes(access, "read")
        self._note_last("read", access)
        self._note(access, access.kind)
        self._visit(access)

    def read_by_warps(self, access: Access) -> None:
        """The same read by several warps: those that have to know (see `Access.together`)."""
        self._check_writes(access, "read")
        self._note_last("read", access)
        for warp in range(access.together):
            stamps = self.clocks.stamps[access.kind][access.warps + warp] | np.uint64(access.index & INSTRUCTION)
            self._note(replace(access, stamps=stamps), access.kind)

    def write(self, access: Access) -> None:
        self._check_writes(access, "write")
        self._check_reads(access)
        self._note_last("write", access)
        self._visit(access)
        self.shadow.note_write(access.places, access.stamps)
        self._check_each_other(access)

    def enter_strong(self, access: Access, *, writes: bool) -> None:
        """An access that races with no other of its kind.

        It is entered beside the last write, not in its place: what came before still has to be known.
        """
        self._check_writes(access, "write" if writes else "read")
        if writes:
            self._check_reads(access)
        self._note_last("write" if writes else "read", access)
        self._note(access, STRONG_WRITES if writes else "strong")
        self._visit(access)

    def initialize(self, access: Access) -> None:
        """The initialisation of mbarriers, of 8 bytes each."""
        self._check_writes(access, "write")
        self._check_reads(access)
        self._check_init(access, "init")
        self._note_last("init", access)
        self.barriers.note_write(access.places, access.stamps)

    def use(self, access: Access, *, proxy: bool) -> None:
        """An operation on mbarriers, whose initialisation has to be known. proxy: the async proxy is told of them."""
        self._check_init(access, "use")
        self._visit(access)
        if proxy:
            self.require_fence(access, BARRIER_INIT)

    def require_fence(self, access: Access, plane: int = ASYNC_PROXY) -> None:
        """What the generic proxy has written has to be visible to the async proxy."""
        verb, shadow = ("write", self.shadow) if plane == ASYNC_PROXY else ("init", self.barriers)
        suspects = self._suspects(verb, access, plane)
        if not suspects.size or suspects[0] >= self.agents.generic:  # they ascend
            return
        stamps = shadow.last_writes(access.places)
        unknown = self._unknown(access, stamps, plane) & (stamps >> _SHIFT < np.uint64(self.agents.generic))
        if not unknown.any():
            return
        self.report.fence(access, unknown, stamps, shadow.granule, barrier=plane == BARRIER_INIT)

    # ---- the last accesses

    def _note(self, access: Access, table: str) -> None:
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

    def _note_last(self, verb: str, access: Access) -> None:
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

    def _visit(self, access: Access) -> None:
        if self.wave.cluster_size > 1:
            ctas = access.places.first * access.places.nbytes // self.wave.shared.stride
            self.visits.note(ctas, access.warps, access.stamps)

    # ---- what is known

    def _suspects(self, verb: str, access: Access, plane: int = HAPPENS_BEFORE) -> Array:
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

    def _unknown(self, access: Access, stamps: Array, plane: int = HAPPENS_BEFORE) -> Array:
        """Which of the stamps [n, granules] the warps of the access do not know."""
        entry = (stamps >> _SHIFT).view(np.int64)
        entry += (access.warps * self.clocks.count)[:, None]
        unknown: Array = stamps > self._known(plane, access.together).take(entry)
        return unknown

    # ---- checks

    def _check_writes(self, access: Access, verb: str) -> None:
        suspects = self._suspects("write", access)
        if not suspects.size:
            return
        stamps = self.shadow.last_writes(access.places)
        unknown = self._unknown(access, stamps)
        if unknown.any():
            unknown &= ~self._harmless(access, stamps)
            if unknown.any():
                self.report.race(access, unknown, stamps, verb, "write", self.shadow.granule)
        if access.kind != "strong":
            self._check_each_agent(access, suspects, verb, "write")

    def _check_reads(self, access: Access) -> None:
        suspects = self._suspects("read", access)
        if suspects.size:
            self._check_each_agent(access, suspects, "write", "read")

    def _check_each_agent(self, access: Access, suspects: Array, verb: str, earlier: str) -> None:
        """Checks against the last read, or the last strong write, of each of the agents."""
        wanted: set[tuple[str, int]] | None = None
        for (_, table, unit), by_agent in self.shadow.by_agent.items():
            if (table == STRONG_WRITES) != (earlier == "write") or table == access.kind == "strong":
                continue
            if wanted is None:
                wanted = {(kind, row) for kind, _, row in map(self.agents.identify, suspects.tolist())}
            places = access.places.granules(unit)
            for row in sorted(by_agent.used):
                if (table.removesuffix(" writes"), row) in wanted:
                    stamps = self.shadow.last(by_agent.stamps[row], places)
                    if (unknown := self._unknown(access, stamps)).any():
                        self.report.race(access, unknown, stamps, verb, earlier, unit)

    def _harmless(self, access: Access, stamps: Array) -> Array:
        """Where the earlier write, of another warp, wrote what is written now."""
        if access.data is None:
            return np.zeros(stamps.shape, bool)
        old = self.wave.shared.views[access.places.nbytes].take(access.places.first)
        same = _bytes(old, stamps.shape) == _bytes(access.data, stamps.shape)
        return same.all(2) & (stamps >> _SHIFT < np.uint64(self.agents.warps * self.agents.cluster_size))

    def _check_each_other(self, access: Access) -> None:
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
        self.report.race(access, others, stamps, "write", "write", self.shadow.granule)

    def _check_init(self, access: Access, verb: str) -> None:
        """The barrier's last initialisation has to be known."""
        if self._suspects("init", access).size:
            stamps = self.barriers.last_writes(access.places)
            if (unknown := self._unknown(access, stamps)).any():
                self.report.race(access, unknown, stamps, verb, "init", 8)


def _bytes(elements: Array, shape: tuple[int, ...]) -> Array:
    """[n, granules per access, bytes of a granule]"""
    return np.ascontiguousarray(elements).view(np.uint8).reshape(*shape, -1)
