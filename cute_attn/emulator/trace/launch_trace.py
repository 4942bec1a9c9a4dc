"""One launch of a trace: what its warps did, and what is known of its program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .costs import units
from .roles import Roles, name_roles
from .slices import Operation, Track
from .source import Function, function_at
from .stretches import Stretch, stretches
from .wave_trace import WaveTrace
from .work import work

if TYPE_CHECKING:
    from ..program import Program
    from ..wave import Wave


def short_name(kernel: str, most: int = 60) -> str:
    """A kernel's name without what the DSL puts before every one."""
    name = kernel.removeprefix("kernel_cutlass_")
    return name if len(name) <= most else f"{name[: most - 1]}…"


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
