"""What the race detector reports: which two accesses, whose, where, and what is missing between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from .clocks import AGENT_SHIFT, HAPPENS_BEFORE, INSTRUCTION, Clocks, MbarrierClocks
from .errors import DataRace, MissingProxyFence
from .memory import Array
from .shadow import Places
from .wave import Group

_WAITS = {"cp.async": "cp.async.wait_group", "bulk": "cp.async.bulk.wait_group", "wgmma": "wgmma.wait_group"}


@dataclass(frozen=True)
class Access:
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


class RaceReport:
    """Raises the findings."""

    def __init__(self, clocks: Clocks, mbarriers: MbarrierClocks) -> None:
        self.wave = clocks.wave
        self.clocks = clocks
        self.agents = clocks.agents
        self.mbarriers = mbarriers

    def race(self, access: Access, unknown: Array, stamps: Array, verb: str, earlier: str, unit: int) -> NoReturn:
        """unknown, stamps: [n, units] of so many bytes. verb, earlier: what the access is, and what it races with."""
        n, granule = (int(x) for x in np.unravel_index(int(np.argmax(unknown)), unknown.shape))
        stamp, count = int(stamps[n, granule]), int(unknown.any(1).sum())
        verb = {"use": "operation on the mbarrier", "init": "mbarrier"}.get(verb, f"{verb} of shared memory")
        self._fail(
            DataRace,
            access,
            n,
            stamp,
            f"{verb} at {self._where(access, n, granule, unit)}, "
            f"{access.places.nbytes} bytes, races with its {earlier} by "
            f"{self._who(access, n, stamp)}, {self._instruction(stamp)}: {self._missing(access, n, stamp)} "
            f"({count} {'access' if count == 1 else 'accesses'} in all)",
        )

    def fence(self, access: Access, unknown: Array, stamps: Array, unit: int, *, barrier: bool) -> NoReturn:
        """The async proxy may not see these writes, or initialisations of mbarriers."""
        n, number = (int(x) for x in np.unravel_index(int(np.argmax(unknown)), unknown.shape))
        stamp = int(stamps[n, number])
        what = "reports to the mbarrier" if barrier else "accesses shared memory"
        fence = "fence.mbarrier_init (or fence.proxy.async)" if barrier else "fence.proxy.async"
        self._fail(
            MissingProxyFence,
            access,
            n,
            stamp,
            f"the async proxy {what} at {self._where(access, n, number, unit)}, which "
            f"{self._who(access, n, stamp)} wrote through the generic proxy by {self._instruction(stamp)}; no "
            f"{fence} lies between",
        )

    def _fail(
        self, error: type[DataRace | MissingProxyFence], access: Access, n: int, stamp: int, what: str
    ) -> NoReturn:
        position = int(np.searchsorted(access.group.lane_numbers, access.lanes[n]))
        position = min(position, access.group.size - 1)
        try:
            access.group.fail(error, access.index, position, what)
        except error as finding:
            finding.other = self.wave.kernel.instructions[stamp & INSTRUCTION].text
            raise

    def _instruction(self, stamp: int) -> str:
        return self.wave.kernel.instructions[stamp & INSTRUCTION].place

    def _where(self, access: Access, n: int, number: int, unit: int) -> str:
        """The place of the unit of that number, or of the access where that begins within."""
        stride = self.wave.shared.stride
        places = access.places
        byte = max(places.granules(unit).element(n, number) * unit, int(places.first[n]) * places.nbytes)
        return f"offset {byte % stride:#x} of CTA {self._cta(byte // stride)}"

    def _cta(self, cta: int) -> tuple[int, int, int]:
        return self.wave.locate(cta * self.wave.cta_lanes)[0]

    def _owner(self, access: Access, n: int, stamp: int) -> tuple[str, int, int]:
        """(kind, CTA of the wave, warp of the CTA or column of the mbarrier) of the stamp's agent."""
        kind, rank, number = self.agents.identify(stamp >> AGENT_SHIFT)
        cluster = int(self.agents.cluster_of_warp[access.warps[n]])
        return kind, cluster * self.agents.cluster_size + rank, number

    def _who(self, access: Access, n: int, stamp: int) -> str:
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

    def _missing(self, access: Access, n: int, stamp: int) -> str:
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
