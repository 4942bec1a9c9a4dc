"""Vector clocks: what each warp of a wave knows of what the agents of its cluster have done.

An *agent* is something that accesses shared memory in an order of its own: a warp, and what works for it while it goes
on, which is its cp.async copies, its bulk copies, its wgmma, and the copies that report to one mbarrier. Each agent has
an *epoch*, which grows whenever somebody may learn what it has done so far: for a warp when it releases, for groups of
copies when the group is closed, for an mbarrier when a phase completes. An access is stamped with agent and epoch, and
it happens before what a warp does if the warp's clock holds that epoch of that agent, or a later one.

A stamp and an entry of a clock are one number: agent, epoch and, in the lowest bits, the instruction that made the
access. These bits are all ones in a clock, so that "known" is one comparison of two numbers of the same agent.

A clock has three planes: what happens before, what of it an async proxy sees as well, because a fence.proxy.async
lies between, and the same for the initialisation of mbarriers, for which fence.mbarrier_init does too (PTX ISA,
"Memory Consistency Model: Proxy-preserved base causality order").
"""

from __future__ import annotations

import numpy as np

from .errors import EmulatorError
from .memory import Array
from .wave import Wave

EPOCH_SHIFT = 20
AGENT_SHIFT = 52
INSTRUCTION = (1 << EPOCH_SHIFT) - 1
"""Mask of a stamp's instruction: 2^20 instructions, 2^32 epochs, 2^12 agents."""
TICK = np.uint64(1 << EPOCH_SHIFT)
MAX_AGENTS = 1 << 12
HAPPENS_BEFORE, ASYNC_PROXY, BARRIER_INIT = 0, 1, 2
ENGINES = ("cp.async", "bulk", "wgmma")
GENERIC = ("warp", "strong", "cp.async")
"""Agents of the generic proxy; the others are of the async proxy."""
KINDS = (*GENERIC, "bulk", "wgmma")
"""The agents that a warp may have. "strong" stands for its atomic and its relaxed accesses, which race with no others
of their kind."""
REMEMBERED_GROUPS = 64
WARPGROUP = 4


class Agents:
    """The numbering of agents within a cluster: CTA by CTA the fastest, so that mbarriers found later get new numbers.

    kinds: those that the kernel has, in the order of KINDS. wgmma belongs to warpgroups: their four warps share the
    first one's agent. `generic`: numbers below it are those of the generic proxy.
    """

    def __init__(self, wave: Wave, kinds: tuple[str, ...]) -> None:
        self.kinds = kinds
        self.cluster_size = wave.cluster_size
        self.warps = wave.cta_lanes // 32
        self.fixed = self.warps * len(kinds)
        self.generic = self.warps * len({*GENERIC}.intersection(kinds)) * self.cluster_size
        warp = np.arange(wave.lanes // 32, dtype=np.int64)
        self.rank_of_warp = warp // self.warps % self.cluster_size
        self.cluster_of_warp = warp // self.warps // self.cluster_size
        first = warp % self.warps
        group = first // WARPGROUP * WARPGROUP
        self.of_warp = {kind: self.number(kind, group if kind == "wgmma" else first) for kind in kinds}

    def number(self, kind: str, local: Array) -> Array:
        return (self.kinds.index(kind) * self.warps + local) * self.cluster_size + self.rank_of_warp

    def of_barrier(self, column: Array, rank: Array) -> Array:
        """The copies that report to the barrier of a column (see `MbarrierClocks`) in the CTA of that rank."""
        return (self.fixed + column) * self.cluster_size + rank

    def identify(self, agent: int) -> tuple[str, int, int]:
        """(kind, rank of the CTA, number of the warp or column of the mbarrier)."""
        local, rank = divmod(agent, self.cluster_size)
        if local >= self.fixed:
            return "mbarrier", rank, local - self.fixed
        return self.kinds[local // self.warps], rank, local % self.warps


class Clocks:
    """`known` [planes, warps of the wave, agents of a cluster]; `stamps` [warps]: of what their agents do now, by kind.

    `version` counts the changes of both.
    """

    def __init__(self, wave: Wave, kinds: tuple[str, ...], barriers: int) -> None:
        self.wave = wave
        self.agents = Agents(wave, kinds)
        self.own = tuple(kind for kind in ("warp", "strong") if kind in kinds)
        # Without an async proxy there is nothing to be told apart.
        self.planes = 3 if {"bulk", "wgmma"}.intersection(kinds) or barriers else 1
        self.count = self.version = 0
        warps = wave.lanes // 32
        self.known = np.zeros((self.planes, warps, 0), np.uint64)
        self.fenced: Array | None = None
        self.heard: Array | None = None
        self.objects: list[ObjectClocks] = []
        self.widen((self.agents.fixed + barriers) * self.agents.cluster_size)
        self.stamps = {
            kind: (agents.astype(np.uint64) << np.uint64(AGENT_SHIFT)) + TICK
            for kind, agents in self.agents.of_warp.items()
        }
        self._know_oneself(np.arange(warps))
        self._closed = {kind: np.zeros((warps, REMEMBERED_GROUPS), np.uint64) for kind in kinds}
        self._closings = {kind: np.zeros(warps, np.int64) for kind in kinds}

    def widen(self, agents: int) -> None:
        """Makes room for more agents."""
        if agents > MAX_AGENTS:
            raise EmulatorError(f"the race detector counts up to {MAX_AGENTS} agents in a cluster: set races=False")
        new = np.arange(self.count, agents, dtype=np.uint64) << np.uint64(AGENT_SHIFT) | np.uint64(INSTRUCTION)
        self.known = np.concatenate([self.known, np.broadcast_to(new, (*self.known.shape[:2], new.size))], axis=2)
        self.count = agents
        self.version += 1
        for other in self.objects:
            other.widen(agents)
        self.fenced, self.heard = _widened(self.fenced, agents), _widened(self.heard, agents)

    # ---- stamps

    def tick(self, warps: Array) -> None:
        """What these warps do from now on is not known to those who learn of them what they have done so far."""
        for kind in self.own:
            self.stamps[kind][warps] += TICK
        self._know_oneself(warps)

    def _know_oneself(self, warps: Array) -> None:
        for kind in self.own:
            own = self.stamps[kind][warps] | np.uint64(INSTRUCTION)
            self.known[HAPPENS_BEFORE, warps, self.agents.of_warp[kind][warps]] = own
        self.version += 1

    def advance(self, kind: str, warps: Array) -> None:
        """What these warps' engines are given from now on is told apart from what they were given before."""
        self.stamps[kind][warps] += TICK
        self.version += 1

    def learn(self, warps: Array, rows: Array) -> None:
        """These warps, no one twice, know from now on what the clocks [planes, warps, agents] say."""
        self.known[:, warps] = np.maximum(self.known[:, warps], rows)
        self.version += 1

    # ---- groups of asynchronous operations

    def close(self, kind: str, warps: Array) -> None:
        """These warps close a group."""
        number = self._closings[kind][warps]
        self._closed[kind][warps, number % REMEMBERED_GROUPS] = self.stamps[kind][warps]
        self._closings[kind][warps] = number + 1
        self.advance(kind, warps)

    def await_groups(self, kind: str, warps: Array, newest: int) -> None:
        """All groups but the newest ones of these warps are complete, and they know it.

        Where more groups may be in flight than are remembered, the oldest remembered one counts as complete.
        """
        newest = min(newest, REMEMBERED_GROUPS - 1)
        warps = warps[self._closings[kind][warps] > newest]
        slot = (self._closings[kind][warps] - newest - 1) % REMEMBERED_GROUPS
        self._learn_engine(kind, warps, self._closed[kind][warps, slot])

    def await_all(self, kind: str, warps: Array) -> None:
        """Everything issued so far is complete, in closed groups or not."""
        self._learn_engine(kind, warps, self.stamps[kind][warps])
        self.advance(kind, warps)

    def _learn_engine(self, kind: str, warps: Array, stamps: Array) -> None:
        agents = self.agents.of_warp[kind][warps]
        for plane in self.planes_of(kind):
            rows = self.known[plane, warps, agents]
            self.known[plane, warps, agents] = np.maximum(rows, stamps | np.uint64(INSTRUCTION))
        self.version += 1

    def planes_of(self, kind: str) -> range:
        """Where those who have waited for an engine know it: its accesses by the generic proxy need a fence as well."""
        return range(1 if kind in GENERIC else self.planes)

    # ---- fences

    def fence(self, warps: Array) -> None:
        """A fence that makes a later relaxed arrival release, and earlier relaxed waits acquire."""
        if self.heard is not None:
            self.learn(warps, self.heard[:, warps])
        if self.fenced is None:
            self.fenced = np.zeros_like(self.known)
        self.fenced[:, warps] = self.known[:, warps]
        self.tick(warps)

    def fence_proxy(self, warps: Array, *, barriers_only: bool) -> None:
        """What is known to these warps becomes visible to the async proxy."""
        for plane in (BARRIER_INIT if barriers_only else ASYNC_PROXY, BARRIER_INIT) if self.planes > 1 else ():
            self.known[plane, warps] = self.known[HAPPENS_BEFORE, warps]
        self.tick(warps)

    def hear(self, warps: Array, rows: Array) -> None:
        """What a relaxed wait saw: known after the next fence."""
        if self.heard is None:
            self.heard = np.zeros_like(self.known)
        self.heard[:, warps] = np.maximum(self.heard[:, warps], rows)


def _widened(array: Array | None, agents: int) -> Array | None:
    """Zeros, which is nothing known, for new agents."""
    if array is None:
        return None
    return np.concatenate([array, np.zeros((*array.shape[:2], agents - array.shape[2]), np.uint64)], axis=2)


class ObjectClocks:
    """The clocks of objects at which warps release and acquire: [planes, objects, agents]."""

    def __init__(self, clocks: Clocks, count: int) -> None:
        self.clocks = clocks
        self.rows = np.zeros((clocks.planes, count, clocks.count), np.uint64)
        clocks.objects.append(self)

    def widen(self, agents: int) -> None:
        widened = _widened(self.rows, agents)
        assert widened is not None
        self.rows = widened

    def release(self, lanes: Array, objects: Array, *, relaxed: bool = False) -> None:
        """The warps of these lanes pass on what they know to an object each; `relaxed`: what they knew at a fence."""
        warps, objects = distinct(lanes, objects)
        known = self.clocks.fenced if relaxed else self.clocks.known
        if known is None or not warps.size:
            return
        passed_on, unique = known[:, warps], objects
        if not (objects[1:] > objects[:-1]).all():
            order = np.argsort(objects, kind="stable")
            objects = objects[order]
            starts = np.flatnonzero(np.concatenate([[True], objects[1:] != objects[:-1]]))
            passed_on, unique = np.maximum.reduceat(passed_on[:, order], starts, axis=1), objects[starts]
        self.rows[:, unique] = np.maximum(self.rows[:, unique], passed_on)
        if not relaxed:
            self.clocks.tick(warps)

    def acquire(self, lanes: Array, objects: Array, *, relaxed: bool = False) -> None:
        """The warps of these lanes learn what has been passed on to an object each."""
        warps, objects = distinct(lanes, objects)
        while warps.size:
            # a warp whose lanes wait at several objects learns from one of them at a time
            now = np.concatenate([[True], warps[1:] != warps[:-1]])
            rows = self.rows[:, objects[now]]
            if relaxed:
                self.clocks.hear(warps[now], rows)
            else:
                self.clocks.learn(warps[now], rows)
            warps, objects = warps[~now], objects[~now]

    def reset(self, objects: Array) -> None:
        """A new generation starts without what the last one passed on."""
        self.rows[:, objects] = 0


def distinct(lanes: Array, objects: Array) -> tuple[Array, Array]:
    """(warp, object) of every pair that occurs, warps ascending."""
    warps = lanes >> 5
    if lanes.size % 32 == 0 and lanes.size:
        table = objects.reshape(-1, 32)
        if (table == table[:, :1]).all() and (lanes.reshape(-1, 32)[:, 31] - lanes.reshape(-1, 32)[:, 0] == 31).all():
            return warps[::32], objects[::32]
    width = int(objects.max(initial=0)) + 1
    pairs = np.unique(warps * width + objects)
    return pairs // width, pairs % width


class MbarrierClocks:
    """The clocks of mbarriers, by key (see `mbarriers`): what the phase in progress has been given, and the last one.

    A barrier's *column* is the number of its slot among the slots that ever held one, the same in all CTAs.
    """

    def __init__(self, clocks: Clocks, slots: int, columns: int) -> None:
        self.clocks = clocks
        self.slots = slots
        self.ctas = len(clocks.wave.ctas)
        self.columns = 0
        self._capacity = columns
        self.column_of_slot = np.full(slots, -1, np.int64)
        self.slot_of_column: list[int] = []
        self.pending = ObjectClocks(clocks, columns * self.ctas)
        self.complete = ObjectClocks(clocks, columns * self.ctas)
        self.epoch = np.ones(columns * self.ctas, np.uint64)

    def initialize(self, keys: Array) -> None:
        for slot in np.unique(keys % self.slots).tolist():
            if self.column_of_slot[slot] < 0:
                self.column_of_slot[slot] = self.columns
                self.slot_of_column.append(slot)
                self.columns += 1
        if self.columns > self._capacity:
            self._enlarge(2 * self.columns)
        objects = self.objects(keys)
        self.pending.reset(objects)
        self.complete.reset(objects)
        self.epoch[objects] += np.uint64(1)

    def _enlarge(self, columns: int) -> None:
        agents = self.clocks.agents
        self.clocks.widen((agents.fixed + columns) * agents.cluster_size)
        more = (columns - self._capacity) * self.ctas
        nothing = np.zeros((self.clocks.planes, more, self.clocks.count), np.uint64)
        for clocks in (self.pending, self.complete):
            clocks.rows = np.concatenate([clocks.rows, nothing], axis=1)
        self.epoch = np.concatenate([self.epoch, np.ones(more, np.uint64)])
        self._capacity = columns

    def objects(self, keys: Array) -> Array:
        return self.column_of_slot[keys % self.slots] * self.ctas + keys // self.slots

    def _agents(self, objects: Array) -> Array:
        agents = self.clocks.agents
        return agents.of_barrier(objects // self.ctas, objects % self.ctas % agents.cluster_size)

    def completed(self, keys: Array) -> None:
        """The phases in progress of these barriers complete, and the copies that reported to them with them."""
        objects = self.objects(keys)
        agents = self._agents(objects)
        done = agents.astype(np.uint64) << np.uint64(AGENT_SHIFT) | self.epoch[objects] << np.uint64(EPOCH_SHIFT)
        self.pending.rows[:, objects, agents] = done | np.uint64(INSTRUCTION)
        self.complete.rows[:, objects] = self.pending.rows[:, objects]
        self.epoch[objects] += np.uint64(1)

    def stamps(self, keys: Array) -> Array:
        """What marks the accesses of copies that report to these barriers."""
        objects = self.objects(keys)
        agents = self._agents(objects).astype(np.uint64)
        return agents << np.uint64(AGENT_SHIFT) | self.epoch[objects] << np.uint64(EPOCH_SHIFT)

    def await_engine(self, kind: str, lanes: Array, keys: Array) -> None:
        """The phases in progress complete after what these lanes' warps have issued to their `kind` so far."""
        warps, objects = distinct(lanes, self.objects(keys))
        agents = self.clocks.agents.of_warp[kind][warps]
        stamps = self.clocks.stamps[kind][warps] | np.uint64(INSTRUCTION)
        for plane in self.clocks.planes_of(kind):
            np.maximum.at(self.pending.rows[plane], (objects, agents), stamps)
        self.clocks.advance(kind, np.unique(warps))
