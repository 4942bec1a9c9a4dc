"""The clocks of a wave's warps, which write slices as they go."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..memory import Array
from .completions import Groups, Meetings
from .costs import copy_units, wgmma_units
from .slices import Operation, Slice, Track
from .work import work

if TYPE_CHECKING:
    from ..async_work import Transfers
    from ..wave import Group, Wave
    from .launch_trace import LaunchTrace

Cause = Operation | int | None
"""What ended a wait: an operation, or a warp by its number in the wave."""


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
        self._meetings: dict[str, Meetings] = {}
        self._groups: dict[str, Groups] = {}
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

    def _meeting(self, place: str, size: int) -> Meetings:
        if place not in self._meetings:
            self._meetings[place] = Meetings(size)
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
        end = now + copy_units(transfers.nbytes)
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
        state = self._groups.setdefault(kind, Groups(self.wave.lanes))
        if kind == "wgmma":
            warps = lanes[:, None] + 32 * np.arange(4)
            start = self._now(warps.reshape(-1)).reshape(-1, 4).max(1)
            opcode = self.wave.kernel.instructions[self.at].opcode
            end = np.maximum(state.ready[lanes], start) + wgmma_units(opcode, self.wave.kernel.target)
        else:
            warps = lanes[:, None]
            start = self._now(lanes)
            end = np.maximum(state.ready[lanes], start + copy_units(np.asarray(nbytes)))
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
        self._groups.setdefault(kind, Groups(self.wave.lanes)).close(lanes, groups)

    def wait(self, kind: str, lanes: Array, groups: Array, *, everything: bool = False) -> None:
        """The lanes wait for their groups of these numbers (below 0: for none), or for all that they have issued."""
        if kind not in self._groups or not lanes.size:
            return
        state = self._groups[kind]
        until = state.ready[lanes] if everything else state.end(lanes, groups)
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
