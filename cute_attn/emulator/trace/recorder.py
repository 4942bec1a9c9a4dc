"""Records launches: which ones, and what becomes of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..settings import settings
from .chrome_events import events
from .costs import TIME
from .launch_trace import LaunchTrace
from .roles import Roles
from .summary import summary_lines

if TYPE_CHECKING:
    from ..launch_size import LaunchSize
    from ..program import Program


class Recorder:
    """Records launches under `emulator.settings(trace=recorder)`.

    ctas:   how many CTAs of each launch, from number 0 on, or which
    kernel: record only kernels whose name has this in it
    roles:  names for warps, `{0: "load", (4, 12): "mma"}` or a function of the warp's number
    """

    def __init__(self, *, ctas: int | Collection[int] = 2, kernel: str = "", roles: Roles | None = None) -> None:
        if isinstance(ctas, int) and ctas < 1:
            raise ValueError(f"ctas={ctas}: at least one CTA, or a collection of their numbers")
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
            "traceEvents": [*events(self.launches)],
            "displayTimeUnit": "ns",
            "otherData": {"time": TIME, "launches": said},
        }
        Path(path).write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")

    def summary(self) -> str:
        """A table: what the warps of each role did, and for what they waited."""
        lines: list[str] = []
        for launch in self.launches:
            launch.finish(self.roles)
            lines += summary_lines(launch)
        return "\n".join(lines)


@contextlib.contextmanager
def trace(path: str | Path, **options: Any) -> Iterator[Recorder]:
    """A period whose launches are written to a trace file, even if one of them fails. Options: see `Recorder`."""
    recorder = Recorder(**options)
    with Path(path).open("a", encoding="utf-8"):
        pass  # a path that cannot be written is found now, and not after the run
    try:
        with settings(trace=recorder):
            yield recorder
    finally:
        recorder.write(path)
