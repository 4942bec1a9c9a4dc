"""Which warp did what, and waited where: launches as a trace in Chrome's format, for ui.perfetto.dev.

`with emulator.trace("out.json"):` records the launches inside it. A CTA is a process; its tracks are its warps, each
with its role, and what works asynchronously for it: copies into its shared memory, groups of wgmma, of cp.async and of
bulk stores. An arrow leads from what ended a wait, an arrival or a completed operation, to the end of that wait.

**The time is logical**, a picture of what depends on what and not a measurement:

* Every warp has a clock of its own, which starts at 0 and which each instruction that the warp issues moves on: by one
  unit, and by more for `mma`, special functions, shuffles and shared memory (`trace_roles.units`). Warps do not
  compete for an issue slot or a pipe, and a load from global memory costs no more than its issue.
* A copy takes `LATENCY` units and one for every `BYTES_PER_UNIT` bytes. A warpgroup's wgmma follow one another, each as
  long as the tensor cores take for it, and cost the warps one unit.
* A warp that has waited goes on at the time of what released it, if its own is earlier.

The order in which the emulator steps warps does not enter, but where it decides what the program does.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import Array
from .trace_roles import (
    Activity,
    Function,
    Roles,
    Stretch,
    function_at,
    name_roles,
    stretches,
    units,
    wgmma_units,
    work,
)

if TYPE_CHECKING:
    from .async_work import Transfers
    from .launch_size import LaunchSize
    from .program import Program
    from .wave import Group, Wave

LATENCY = 500
"""Units until an asynchronous copy has gone to memory and back: in the range reported for A100 and H100, assumed."""
BYTES_PER_UNIT = 32
"""Bytes that one copy moves per unit: some of the 64 per clock that an SM has to its L2, assumed."""
TIME = f"logical, not measured: 1 µs is 1 unit, the cost of a plain warp instruction; a copy takes {LATENCY} and more"
_GROUPS_REMEMBERED = 32
_GAP = 1000
"""Units between two launches."""
_ENGINE_TIDS = 1000


@dataclass
class Operation:
    """Asynchronous work of a CTA from its issue to its end; `engine` is its track. Issues of a group are one."""

    cta: int
    engine: str
    start: int
    end: int
    name: str
    nbytes: int = 0
    issues: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)
    lane: int = 0  # among the tracks of its engine, where operations overlap

    def join(self, other: Operation) -> None:
        """Adds another issue of the same group."""
        self.start, self.end = min(self.start, other.start), max(self.end, other.end)
        self.nbytes, self.issues = self.nbytes + other.nbytes, self.issues + other.issues


Cause = Operation | int | None
"""What ended a wait: an operation, or a warp by its number in the wave."""


@dataclass
class Slice:
    """A stretch of a warp's time: work, up to the instruction before `stop`, or a wait for `what`."""

    start: int
    end: int
    name: str
    what: str = ""
    cause: Operation | Track | None = None
    work: str = ""
    count: int = 0
    stop: int = 0


@dataclass(eq=False)
class Track:
    """What one warp did."""

    cta: int
    warp: int
    slices: list[Slice] = field(default_factory=list)
    activity: Activity = field(default_factory=lambda: Activity(Counter(), set()))
    role: str = ""

    @property
    def end(self) -> int:
        return self.slices[-1].end if self.slices else 0

    def add_work(self, start: int, stretch: Stretch) -> None:
        """Appends work. It goes on with the slice before it only forwards in the program, so that loops show."""
        last = self.slices[-1] if self.slices else None
        end = start + stretch.units
        same = last is not None and not last.what and stretch.name in (last.name, "")
        if last is not None and same and last.end == start and last.stop <= stretch.first:
            last.end, last.count, last.stop = end, last.count + stretch.count, stretch.end
        else:
            name = stretch.name or "control"
            self.slices.append(Slice(start, end, name, work=stretch.work, count=stretch.count, stop=stretch.end))


@dataclass
class _Part:
    """Instructions of a block that run without an event between them."""

    units: int
    stretches: list[Stretch]
    functions: Counter[Function]
    works: set[str]


class LaunchTrace:
    """One launch: the tracks of the warps of some of its CTAs, and their asynchronous operations."""

    def __init__(self, program: Program, wanted: Callable[[int], bool], facts: dict[str, Any]) -> None:
        self.program = program
        self.wanted = wanted
        self.facts = facts
        self.tracks: dict[tuple[int, int], Track] = {}
        self.operations: dict[int, list[Operation]] = {}
        self.places: dict[int, tuple[int, int, int]] = {}
        self._parts: dict[tuple[int, int, int], _Part] = {}

    def attach(self, wave: Wave) -> None:
        """Follows a wave, if it has CTAs that are wanted."""
        if any(self.wanted(cta) for cta in wave.ctas.tolist()):
            wave.trace = WaveTrace(self, wave)

    def part(self, block: int, start: int, stop: int) -> _Part:
        """The instructions `start` to `stop` of a block, counted from its first."""
        key = (block, start, stop)
        if key not in self._parts:
            target = self.program.kernel.target
            instructions = self.program.blocks[block][start:stop]
            functions: Counter[Function] = Counter()
            for i in instructions:
                if (function := function_at(i.source)) is not None:
                    functions[function] += units(i.opcode, target)
            cut = stretches(instructions, target)
            # Copies and groups count for the warps that issue them, and not for those whose lanes are all masked.
            works = {name for i in instructions if (name := work(i.opcode)).startswith("mma")}
            self._parts[key] = _Part(sum(s.units for s in cut), cut, functions, works)
        return self._parts[key]

    def finish(self, roles: Roles | None) -> None:
        for cta in self.places:
            warps = {warp: track for (c, warp), track in self.tracks.items() if c == cta}
            names = name_roles({w: t.activity for w, t in warps.items()}, self.program.kernel, roles)
            for warp, track in warps.items():
                track.role = names[warp]


class WaveTrace:
    """The clocks of a wave's warps. The scheduler brackets every block with `enter` and `leave`.

    at: the index of the instruction that runs, set by the block as it goes.
    """

    def __init__(self, launch: LaunchTrace, wave: Wave) -> None:
        self.launch = launch
        self.wave = wave
        self.at = 0
        self.clock = np.zeros(wave.lanes // 32, np.int64)
        self.tracks: dict[int, Track] = {}
        per_cta = wave.cta_lanes // 32
        for position, cta in enumerate(wave.ctas.tolist()):
            if launch.wanted(cta):
                launch.places[cta] = wave.locate(position * wave.cta_lanes)[0]
                launch.operations[cta] = []
                for warp in range(per_cta):
                    track = launch.tracks[cta, warp] = Track(cta, warp)
                    self.tracks[position * per_cta + warp] = track
        self._shown = np.isin(np.arange(wave.lanes // 32), list(self.tracks))
        self._block = self._done = self._size = self._first = 0
        self._warps = np.zeros(0, np.int64)
        self._meetings: dict[str, _Meetings] = {}
        self._groups: dict[str, _Groups] = {}
        self._group_operations: dict[tuple[str, int, int], Operation] = {}

    # ---- instructions

    def enter(self, group: Group, block: int) -> None:
        """A group begins a block."""
        instructions = self.launch.program.blocks[block]
        self._block, self._done, self._size, self._first = block, 0, len(instructions), instructions[0].index
        self.at = self._first - 1
        self._warps = np.unique(group.lane_numbers >> 5)

    def leave(self) -> None:
        """The block has run."""
        self._advance(self._size)

    def _now(self, lanes: Array) -> Array:
        """The times of lanes, after the instruction that they execute."""
        self._advance(self.at - self._first + 1)
        times: Array = self.clock[lanes >> 5]
        return times

    def _advance(self, stop: int) -> None:
        if stop <= self._done:
            return
        part = self.launch.part(self._block, self._done, stop)
        for warp in self._warps[self._shown[self._warps]].tolist():
            track, now = self.tracks[warp], int(self.clock[warp])
            for stretch in part.stretches:
                track.add_work(now, stretch)
                now += stretch.units
            track.activity.functions.update(part.functions)
            track.activity.works |= part.works
        self.clock[self._warps] += part.units
        self._done = stop

    def _hold(
        self, lanes: Array, until: Array, name: Callable[[int], tuple[str, str]], cause: Callable[[int], Cause]
    ) -> None:
        """Lets warps wait. name(position): (name of the slice, what is waited for) of a lane; so `cause`."""
        warps = lanes >> 5
        later = self.clock.copy()
        np.maximum.at(later, warps, until)
        for warp in np.flatnonzero((later > self.clock) & self._shown).tolist():
            position = int(np.argmax(np.where(warps == warp, until, -1)))
            by = cause(position)
            source = self.tracks.get(by) if isinstance(by, int) else by
            self.tracks[warp].slices.append(
                Slice(int(self.clock[warp]), int(later[warp]), *name(position), cause=source)
            )
        self.clock = later

    # ---- barriers

    def _meeting(self, place: str, size: int) -> _Meetings:
        if place not in self._meetings:
            self._meetings[place] = _Meetings(size)
        return self._meetings[place]

    def arrive(self, place: str, size: int, keys: Array, lanes: Array) -> None:
        """Lanes arrive at barriers `keys` of one kind, of which the wave has `size`."""
        self._meeting(place, size).arrive(keys, self._now(lanes), lanes >> 5)

    def release(self, place: str, keys: Array, lanes: Array, name: str) -> None:
        """Barriers let these waiting lanes go."""
        meeting = self._meetings[place]
        self._hold(
            lanes,
            meeting.time[keys],
            lambda n: (name, name),
            lambda n: int(meeting.by[keys[n]]),
        )

    def complete(self, size: int, keys: Array) -> None:
        """mbarriers complete a phase."""
        self._meeting("mbarrier", size).complete(keys)

    def passed(self, size: int, keys: Array, lanes: Array, offsets: Array, phases: Array) -> None:
        """Lanes have seen that these phases of mbarriers are complete."""
        meeting = self._meeting("mbarrier", size)

        def name(n: int) -> tuple[str, str]:
            what = f"mbarrier {int(offsets[n]):#x}"
            return f"wait {what} phase {int(phases[n])}", what

        def cause(n: int) -> Cause:
            return meeting.done_operation.get(int(keys[n]), int(meeting.done_by[keys[n]]))

        self._hold(lanes, meeting.done[keys], name, cause)

    # ---- asynchronous work

    def copies(self, size: int, keys: Array, transfers: Transfers) -> None:
        """Copies are issued that report to mbarriers."""
        now = self._now(transfers.lane)
        meeting = self._meeting("mbarrier", size)
        if transfers.arrivals:
            copies = self._groups.get("cp.async")
            meeting.arrive(keys, now if copies is None else copies.ready[transfers.lane], transfers.lane >> 5)
            return
        end = now + LATENCY + -(-transfers.nbytes // BYTES_PER_UNIT)
        meeting.arrive(keys, end, transfers.lane >> 5)
        what = self._work()
        self._took_part(transfers.lane, what)
        last = meeting.time[keys] == end
        for row in np.flatnonzero(np.isin(self.wave.ctas[transfers.cta], list(self.launch.operations))).tolist():
            nbytes, warp = int(transfers.nbytes[row]), int(self.wave.thread_of_lane[transfers.lane[row]]) >> 5
            arguments = {"mbarrier": f"{int(transfers.offset[row]):#x}", "warp": warp}
            operation = Operation(
                int(self.wave.ctas[transfers.cta[row]]),
                "copies into this CTA",
                int(now[row]),
                int(end[row]),
                what,
                nbytes,
                arguments=arguments,
            )
            self.launch.operations[operation.cta].append(operation)
            if last[row]:
                meeting.operation[int(keys[row])] = operation

    def issue(self, kind: str, lanes: Array, groups: Array, nbytes: Any) -> None:
        """Operations are issued into commit groups of these numbers; `nbytes` is what each lane's moves."""
        state = self._groups.setdefault(kind, _Groups(self.wave.lanes))
        if kind == "wgmma":
            warps = lanes[:, None] + 32 * np.arange(4)
            start = self._now(warps.reshape(-1)).reshape(-1, 4).max(1)
            opcode = self.wave.kernel.instructions[self.at].opcode
            end = np.maximum(state.ready[lanes], start) + wgmma_units(opcode, self.wave.kernel.target)
        else:
            warps = lanes[:, None]
            start = self._now(lanes)
            end = np.maximum(state.ready[lanes], start + LATENCY + -(-np.asarray(nbytes) // BYTES_PER_UNIT))
        state.ready[lanes] = end
        what = self._work()
        self._took_part(warps.reshape(-1), what)
        shown = np.flatnonzero(self._shown[lanes >> 5])
        keys = np.stack([self._unit(kind, lanes[shown]), groups[shown]])
        moved = np.broadcast_to(nbytes, lanes.shape)
        for unit, group in np.unique(keys, axis=1).T.tolist():
            rows = shown[(keys[0] == unit) & (keys[1] == group)]
            part = Operation(
                int(self.wave.ctas[self.wave.cta_of_lane[lanes[rows[0]]]]),
                self._engine(kind, int(lanes[rows[0]])),
                int(start[rows].min()),
                int(end[rows].max()),
                what,
                int(moved[rows].sum()),
                np.unique(lanes[rows] >> 5).size,
                {"group": group},
            )
            if (whole := self._group_operations.setdefault((kind, unit, group), part)) is not part:
                whole.join(part)
            else:
                self.launch.operations[part.cta].append(part)

    def _engine(self, kind: str, lane: int) -> str:
        warp = int(self.wave.thread_of_lane[lane]) >> 5
        if kind == "wgmma":
            return f"wgmma of warps {warp} to {warp + 3}"
        return "groups of cp.async" if kind == "cp.async" else f"{kind} groups of warp {warp}"

    def _unit(self, kind: str, lanes: Array) -> Array:
        """Who shares a track: the CTA's cp.async of one group number are one operation, others are per warp."""
        return self.wave.cta_of_lane[lanes] if kind == "cp.async" else lanes >> 5

    def commit(self, kind: str, lanes: Array, groups: Array) -> None:
        """The lanes close the groups of these numbers."""
        state = self._groups.setdefault(kind, _Groups(self.wave.lanes))
        state.closed[groups % _GROUPS_REMEMBERED, lanes] = state.ready[lanes]

    def wait(self, kind: str, lanes: Array, groups: Array, *, everything: bool = False) -> None:
        """The lanes wait for their groups of these numbers (below 0: for none), or for all that they have issued."""
        if kind not in self._groups or not lanes.size:
            return
        state = self._groups[kind]
        until = state.ready[lanes] if everything else state.closed[groups % _GROUPS_REMEMBERED, lanes]
        until = np.where(groups < 0, 0, until)
        if kind == "wgmma":  # known by the first lanes of the warpgroups
            lanes = (lanes[:, None] + 32 * np.arange(4)).reshape(-1)
            until, groups = np.repeat(until, 4), np.repeat(groups, 4)
        self._now(lanes)
        units_of = self._unit(kind, lanes if kind != "wgmma" else lanes - (lanes % self.wave.cta_lanes & 96))

        def cause(n: int) -> Cause:
            """The newest group that has operations, of those waited for."""
            unit = int(units_of[n])
            return next((o for g in range(int(groups[n]), -1, -1) if (o := known.get((kind, unit, g)))), None)

        known = self._group_operations
        whole = " all" if everything else ""
        self._hold(lanes, until, lambda n: (f"wait {kind}{whole or f' group {int(groups[n])}'}", kind), cause)

    def _work(self) -> str:
        return work(self.wave.kernel.instructions[self.at].opcode)

    def _took_part(self, lanes: Array, what: str) -> None:
        warps = np.unique(lanes >> 5)
        for warp in warps[self._shown[warps]].tolist():
            self.tracks[warp].activity.works.add(what)


class _Meetings:
    """Barriers of one kind: the latest arrival so far and whose it was, and the same of the last complete phase.

    Phases follow one another, so the latest arrival of all is that of the current phase. `operation` holds the copies
    that arrived last, by key.
    """

    def __init__(self, size: int) -> None:
        self.time = np.zeros(size, np.int64)
        self.by = np.full(size, -1)
        self.done = np.zeros(size, np.int64)
        self.done_by = np.full(size, -1)
        self.operation: dict[int, Operation] = {}
        self.done_operation: dict[int, Operation] = {}

    def arrive(self, keys: Array, times: Array, warps: Array) -> None:
        before = self.time[keys]
        np.maximum.at(self.time, keys, times)
        last = (times == self.time[keys]) & (times > before)
        self.by[keys[last]] = warps[last]
        if self.operation:
            for key in keys[last].tolist():
                self.operation.pop(key, None)

    def complete(self, keys: Array) -> None:
        self.done[keys], self.done_by[keys] = self.time[keys], self.by[keys]
        for key in keys.tolist():
            if key in self.operation:
                self.done_operation[key] = self.operation[key]
            else:
                self.done_operation.pop(key, None)


class _Groups:
    """Commit groups of one kind, per lane: when all is complete that was issued, and when each closed group is."""

    def __init__(self, lanes: int) -> None:
        self.ready = np.zeros(lanes, np.int64)
        self.closed = np.zeros((_GROUPS_REMEMBERED, lanes), np.int64)


class Recorder:
    """Records launches under `emulator.settings(trace=recorder)`.

    ctas:   how many CTAs of each launch, from number 0 on, or which
    kernel: record only kernels whose name has this in it
    roles:  names for warps, `{0: "load", (4, 12): "mma"}` or a function of the warp's number
    """

    def __init__(self, *, ctas: int | Collection[int] = 2, kernel: str = "", roles: Roles | None = None) -> None:
        self.ctas = ctas
        self.kernel = kernel
        self.roles = roles
        self.launches: list[LaunchTrace] = []

    def _wanted(self, cta: int) -> bool:
        return cta < self.ctas if isinstance(self.ctas, int) else cta in self.ctas

    def begin(self, program: Program, size: LaunchSize, seed: int | None) -> LaunchTrace | None:
        """A launch begins. None if it is not to be recorded."""
        if self.kernel not in program.kernel.name:
            return None
        facts = {"grid": size.grid, "cluster": size.cluster, "block": size.block, "seed": seed}
        launch = LaunchTrace(program, self._wanted, facts)
        self.launches.append(launch)
        return launch

    def write(self, path: str | Path) -> None:
        """Writes the trace as a file that chrome://tracing and ui.perfetto.dev open."""
        for launch in self.launches:
            launch.finish(self.roles)
        said = [{"kernel": t.program.kernel.name, **t.facts, "CTAs shown": sorted(t.places)} for t in self.launches]
        content = {
            "traceEvents": [*_events(self.launches)],
            "displayTimeUnit": "ns",
            "otherData": {"time": TIME, "launches": said},
        }
        Path(path).write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")

    def summary(self) -> str:
        """A table: what the warps of each role did, and for what they waited."""
        lines: list[str] = []
        for launch in self.launches:
            launch.finish(self.roles)
            lines += _summary(launch)
        return "\n".join(lines)


@contextlib.contextmanager
def trace(path: str | Path, **options: Any) -> Iterator[Recorder]:
    """A period whose launches are written to a trace file, even if one of them fails. Options: see `Recorder`."""
    from .settings import settings

    recorder = Recorder(**options)
    try:
        with settings(trace=recorder):
            yield recorder
    finally:
        recorder.write(path)


# ---- the file


def _events(launches: list[LaunchTrace]) -> Iterator[dict[str, Any]]:
    """Events in the Trace Event Format: M names, X slices, s and f the two ends of an arrow."""
    offset, pid, arrows = 0, 0, 0
    for launch in launches:
        end = max((t.end for t in launch.tracks.values()), default=0)
        pids = {cta: pid + 1 + n for n, cta in enumerate(sorted(launch.places))}
        pid += len(pids)
        rows = {cta: _rows(launch.operations[cta]) for cta in pids}
        for cta, number in pids.items():
            end = max([end, *(o.end for o in launch.operations[cta])])
            name = f"{short_name(launch.program.kernel.name)} CTA {launch.places[cta]}"
            yield from _name("process", number, 0, name, number)
            for (engine, lane), tid in rows[cta].items():
                yield from _name("thread", number, tid, f"{engine} ({lane + 1})" if lane else engine, tid)
            for o in launch.operations[cta]:
                arguments = {**o.arguments, "bytes": o.nbytes} if o.nbytes else {**o.arguments}
                if o.issues > 1:
                    arguments["instructions"] = o.issues
                at = {"pid": number, "tid": rows[cta][o.engine, o.lane], "ts": offset + o.start}
                yield {"ph": "X", "name": o.name, "cat": "async", "dur": o.end - o.start, **at, "args": arguments}
        for (cta, warp), track in launch.tracks.items():
            yield from _name("thread", pids[cta], warp, f"warp {warp}: {track.role}", warp)
            for s in track.slices:
                at = {"pid": pids[cta], "tid": warp, "ts": offset + s.start}
                arguments = {} if s.what else {"instructions": s.count, **({"work": s.work} if s.work else {})}
                category = "wait" if s.what else "work"
                yield {"ph": "X", "name": s.name, "cat": category, "dur": s.end - s.start, **at, "args": arguments}
                if s.cause is None:
                    continue
                if isinstance(s.cause, Track):
                    tail = {"pid": pids[s.cause.cta], "tid": s.cause.warp, "ts": offset + s.end - 1}
                else:
                    o = s.cause
                    tid = rows[o.cta][o.engine, o.lane]
                    tail = {"pid": pids[o.cta], "tid": tid, "ts": offset + min(o.end, s.end) - 1}
                arrows += 1
                common = {"name": "released", "cat": "release", "id": arrows}
                yield {"ph": "s", **common, **tail}
                yield {"ph": "f", "bp": "e", **common, **at, "ts": offset + s.end - 1}
        offset += end + _GAP


def _name(kind: str, pid: int, tid: int, name: str, order: int) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": f"{kind}_name", "pid": pid, "tid": tid, "args": {"name": name}}
    yield {"ph": "M", "name": f"{kind}_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": order}}


def _rows(operations: list[Operation]) -> dict[tuple[str, int], int]:
    """Tracks (engine, number) and their ids; spreads operations that overlap over several tracks of their engine."""
    busy: dict[tuple[str, int], int] = {}
    for o in sorted(operations, key=lambda o: (o.engine, o.start, o.end)):
        o.lane = 0
        while busy.get((o.engine, o.lane), 0) > o.start:
            o.lane += 1
        busy[o.engine, o.lane] = o.end
    return {row: _ENGINE_TIDS + n for n, row in enumerate(sorted(busy))}


def short_name(kernel: str, most: int = 60) -> str:
    """A kernel's name without what the DSL puts before every one."""
    name = kernel.removeprefix("kernel_cutlass_")
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _summary(launch: LaunchTrace) -> list[str]:
    by_role: dict[str, list[Track]] = {}
    for track in launch.tracks.values():
        by_role.setdefault(track.role, []).append(track)
    shown = f"{len(launch.places)} of its CTAs"
    lines = [f"{short_name(launch.program.kernel.name)}, {launch.program.kernel.target}, {shown}"]
    width = max([4, *map(len, by_role)])
    lines.append(f"  {'role':{width}}  warps  instructions     units  waiting  for")
    for role, tracks in by_role.items():
        waits: Counter[str] = Counter()
        for s in (s for t in tracks for s in t.slices if s.what):
            waits[s.what] += s.end - s.start
        total = sum(t.end for t in tracks)
        count = sum(s.count for t in tracks for s in t.slices)
        reasons = ", ".join(f"{what} {spent / total:.0%}" for what, spent in waits.most_common(3))
        share = sum(waits.values()) / total if total else 0.0
        row = f"  {role:{width}}  {len(tracks):5d}  {count:12d}  {total // len(tracks):8d}  {share:7.0%}"
        lines.append(f"{row}  {reasons or '-'}")
    return lines
