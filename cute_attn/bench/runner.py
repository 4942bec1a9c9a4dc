"""One run: every contender on every problem."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cute_attn.bench.accuracy import Sample
from cute_attn.bench.contender import Contender, Prepared
from cute_attn.bench.provenance import Clocks, Provenance
from cute_attn.bench.results import Results, Row
from cute_attn.bench.timing import Pace, Timer, Timing, measure, said
from cute_attn.commands.check import random_inputs
from cute_attn.dispatch import Support
from cute_attn.problem import Problem
from cute_attn.reference import Errors

__all__ = ["Machine", "Progress", "Settings", "run"]


@dataclass(frozen=True)
class Machine:
    """Where a run happens. A test brings another device and another clock.

    device:     where tensors live
    capability: compute capability, which decides what the peers can do
    arch:       the target that ours is compiled for
    clocks:     the chip's clocks while it does, again and again, what it is given
    """

    device: torch.device
    capability: tuple[int, int]
    arch: str
    timer: Timer
    provenance: Provenance
    clocks: Callable[[Callable[[], Any]], Clocks | None]


@dataclass(frozen=True)
class Settings:
    """inputs: a key of `cute_attn.commands.check.INPUTS`; seed: of the random inputs, the same of all contenders."""

    inputs: str = "normal"
    seed: int = 0
    pace: Pace = field(default_factory=Pace)


class Progress:
    """Told what happens; does nothing with it."""

    def problem(self, problem: Problem) -> None: ...
    def step(self, what: str) -> None: ...
    def rows(self, results: Results) -> None:
        """After each problem, everything so far."""


@torch.no_grad()
def run(
    problems: Sequence[Problem],
    contenders: Sequence[Contender],
    machine: Machine,
    settings: Settings,
    progress: Progress | None = None,
) -> Results:
    """Measure. A contender that fails has a row that says why; nothing that it raises ends the run."""
    progress = progress or Progress()
    absent = {c.name: reason for c in contenders if (reason := _why_not(c.available))}
    there = [c for c in contenders if c.name not in absent]
    rows: list[Row] = []
    results = Results(machine.provenance, asdict(settings), absent, ())
    for problem in problems:
        progress.problem(problem)
        rows += _measured(problem, there, machine, settings, progress)
        results = Results(machine.provenance, asdict(settings), absent, tuple(rows))
        progress.rows(results)
        gc.collect()
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def _why_not(asked: Callable[[], Support]) -> str | None:
    """The reason that a contender gives, or what it raises when it is asked: a broken installation does."""
    try:
        return asked().reason
    except Exception as error:
        return said(error)


@dataclass
class _Entry:
    """What is known of one contender on one problem so far."""

    contender: Contender
    reasons: list[str]
    errors: Errors | None = None
    timings: dict[str, Timing | None] | None = None


def _measured(
    problem: Problem, contenders: Sequence[Contender], machine: Machine, settings: Settings, progress: Progress
) -> list[Row]:
    entries = {c.name: _Entry(c, []) for c in contenders}
    calls: dict[str, tuple[Callable[[], Any], bool]] = {}
    try:
        q, k, v = random_inputs(problem, settings.inputs, settings.seed, machine.device)
        sample = Sample(q, k, v, problem)
    except torch.OutOfMemoryError as error:
        for entry in entries.values():
            entry.reasons.append(f"the inputs do not fit: {said(error)}")
        return [_row(problem, entry, None) for entry in entries.values()]
    for name, entry in entries.items():
        progress.step(name)
        if reason := _why_not(functools.partial(entry.contender.supports, problem)):
            entry.reasons.append(reason)
            continue
        try:
            prepared = entry.contender.prepare(q, k, v, problem)
            entry.errors = _errors(prepared, sample)
        except Exception as error:
            entry.reasons.append(said(error))
            continue
        for mode, call in (("attention", prepared.attention), ("whole", prepared.whole)):
            if call is not None:
                calls[f"{name}/{mode}"] = (call, entry.contender.capturable)
    progress.step("timing")
    measured = measure(calls, machine.timer, settings.pace, lambda: progress.step("timing"))
    timed = [key for key, found in measured.items() if isinstance(found, Timing)]
    for key, found in measured.items():
        name, _, mode = key.rpartition("/")
        entry = entries[name]
        entry.timings = entry.timings or {}
        if isinstance(found, Timing):
            entry.timings[mode] = found
        else:
            entry.reasons.append(f"{mode}: {found}")
    seen = machine.clocks(calls[timed[0]][0]) if timed else None
    return [_row(problem, entry, seen) for entry in entries.values()]


def _errors(prepared: Prepared, sample: Sample) -> Errors:
    """Of the output; both calls should have the same, the larger counts. NaN counts as larger than anything."""
    calls = [call for call in (prepared.attention, prepared.whole) if call is not None]
    found = [sample.errors(prepared.output(call())) for call in calls]
    return max(found, key=lambda errors: (math.isnan(errors.rel_l2), errors.rel_l2))


def _row(problem: Problem, entry: _Entry, clocks: Clocks | None) -> Row:
    timings = entry.timings or {}
    return Row(
        problem,
        entry.contender.name,
        entry.contender.ours,
        entry.contender.quantises,
        entry.contender.formats(problem),
        timings.get("attention"),
        timings.get("whole"),
        entry.errors,
        "; ".join(entry.reasons) or None,
        clocks,
    )
