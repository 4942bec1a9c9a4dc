"""A launch of a trace as a table: what the warps of each role did, and for what they waited."""

from __future__ import annotations

from collections import Counter

from .launch_trace import LaunchTrace, short_name
from .slices import Track


def summary_lines(launch: LaunchTrace) -> list[str]:
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
