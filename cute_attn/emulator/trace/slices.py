"""What a trace shows: the slices of a warp's time, and operations that work on for a CTA asynchronously."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .roles import Activity
from .stretches import Stretch


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
