"""A trace as events of Chrome's Trace Event Format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .launch_trace import LaunchTrace, short_name
from .slices import Operation, Track

_GAP = 1000
"""Units between two launches."""
_ENGINE_TIDS = 1000


def events(launches: list[LaunchTrace]) -> Iterator[dict[str, Any]]:
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
