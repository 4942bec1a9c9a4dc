"""A run as text, one table per problem."""

from __future__ import annotations

from collections.abc import Sequence

from cute_attn.bench.comparison import MODES, best_peer, of_peak, timing, tops
from cute_attn.bench.problems import label
from cute_attn.bench.results import Results, Row

__all__ = ["LEGEND", "problem_table", "text"]

LEGEND = """\
TOPS: 4·B·H·Sq·Sk·D operations, half when causal, over the median time; ±: half the distance of the quartiles; peak:
share of the tensor cores' peak in these formats at the boost clock; ratio: times as fast as the fastest peer that is
as accurate or less; of all: as the fastest peer whatever its error; cos, rel L2: against float64 attention. A * marks
calls that no CUDA graph could capture: they are timed as they are launched."""

_HEADER = (
    f"{'':34s} attention alone{'':37s}with quantisation\n"
    f"{'':34s}  TOPS    ±   peak  ratio (to){'':14s} of all   TOPS    ±  ratio (to){'':14s}      cos   rel L2"
)


def text(results: Results) -> str:
    """All of a run."""
    found = results.provenance
    parts = [f"{found.gpu}, driver {found.driver}, CUDA {found.cuda}, torch {found.packages.get('torch')}"]
    rows: dict[object, list[Row]] = {}
    for row in results.rows:
        rows.setdefault(row.problem, []).append(row)
    parts += [problem_table(group, found.gpu) for group in rows.values()]
    if results.absent:
        parts.append("not there\n" + "\n".join(f"  {name}: {reason}" for name, reason in results.absent.items()))
    return "\n\n".join([*parts, LEGEND])


def problem_table(rows: Sequence[Row], device_name: str) -> str:
    """The rows of one problem, the fastest first; those without a time last, with the reason."""
    problem, clocks = rows[0].problem, rows[0].clocks
    at = "" if clocks is None else f", SM at {clocks.sm_mhz:.0f} MHz, {clocks.watts:.0f} W, {clocks.celsius:.0f} °C"
    lines = [f"{label(problem)}, {problem.dtype}{at}", _HEADER]
    measured = [row for row in rows if row.attention or row.whole]
    for row in sorted(measured, key=_seconds):
        lines.append(_line(row, rows, device_name))
        if row.reason:
            lines.append(f"{'':6s}{row.reason}")
    lines += [f"  {row.contender:32s} not measured: {row.reason}" for row in rows if row not in measured]
    return "\n".join(lines)


def _seconds(row: Row) -> float:
    first = row.attention or row.whole
    assert first is not None
    return first.median


def _line(row: Row, rows: Sequence[Row], device_name: str) -> str:
    alone, whole = (_cells(row, rows, mode) for mode in MODES)
    share = of_peak(row, "attention", device_name)
    peak = "unknown" if share is None else f"{100 * share:5.1f} %"
    every = best_peer(row, rows, "attention", any_accuracy=True) if row.ours else None
    of_all = f"{every[0]:6.2f}" if every else f"{'–':>6s}"
    errors = "" if row.errors is None else f" {row.errors.cos:9.6f} {row.errors.rel_l2:8.5f}"
    name = ("> " if row.ours else "  ") + row.contender
    return f"{name:34s}{alone[0]} {peak:>7s} {alone[1]} {of_all}{whole[0]} {whole[1]}{errors}"


def _cells(row: Row, rows: Sequence[Row], mode: str) -> tuple[str, str]:
    """TOPS with their spread, and the ratio."""
    found, rate = timing(row, mode), tops(row, mode)
    if found is None or rate is None:
        return f"{'–':>7s} {'':4s}", f"{'':24s}"
    peer = best_peer(row, rows, mode) if row.ours else None
    ratio = "" if peer is None else f"{peer[0]:5.2f} ({peer[1]})"
    mark = "*" if found.launch == "stream" else " "
    return f"{rate:6.0f}{mark} {100 * found.spread:3.0f}%", f"{ratio:24s}"
