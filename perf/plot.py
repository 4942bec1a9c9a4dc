"""Figures of a benchmark's results: speed by sequence length, and speed against error.

python perf/plot.py RESULTS.json [RESULTS.json ...] [-o DIRECTORY]

Writes NAME_speed.svg and NAME_error.svg for NAME.json; the second only if there is the problem that it is about.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.hashsalt": "cute-attn", "svg.fonttype": "none", "font.size": 9})

from matplotlib.figure import Figure  # noqa: E402

from cute_attn.bench.comparison import tops  # noqa: E402
from cute_attn.bench.problems import label  # noqa: E402
from cute_attn.bench.results import Results, Row, load  # noqa: E402

PROBLEM_OF_THE_ERRORS = "b4_h32_s8192_d128"

Panel = tuple[int, int, int, int, bool]
"""batch, heads, kv_heads, head_dim, causal: what the problems of one panel share."""


def panels(results: Results) -> dict[Panel, list[Row]]:
    """The measured rows of self-attention by panel, those panels alone that have several lengths."""
    found: dict[Panel, list[Row]] = {}
    for row in results.rows:
        p = row.problem
        if p.seq_q == p.seq_k and (row.attention or row.whole):
            found.setdefault((p.batch, p.heads, p.kv_heads, p.head_dim, p.causal), []).append(row)
    return {panel: rows for panel, rows in found.items() if len({row.problem.seq_q for row in rows}) > 1}


def styles(results: Results) -> dict[str, dict[str, Any]]:
    """A line's look by contender: ours solid with dots, peers dashed; the same in every panel."""
    names = dict.fromkeys((row.contender, row.ours) for row in results.rows)
    return {
        name: {
            "color": f"C{i % 10}",
            "linestyle": "-" if ours else "--",
            "marker": ("osD^v" if ours else "x+*12")[i % 5],
        }
        for i, (name, ours) in enumerate(names)
    }


def shown_tops(row: Row) -> float | None:
    """Of attention alone; of all of it, where that cannot be called alone."""
    alone = tops(row, "attention")
    return tops(row, "whole") if alone is None else alone


def speed(results: Results) -> Figure:
    """TOPS by tokens, a panel for each kind of problem that was measured at several lengths.

    Raises ValueError where there is none.
    """
    found, looks = panels(results), styles(results)
    if not found:
        raise ValueError("no kind of problem was measured at several lengths; there is no curve to draw")
    columns = min(len(found), 2)
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_visible(False)
    for axis, ((batch, heads, kv_heads, head_dim, causal), rows) in zip(axes, found.items(), strict=False):
        axis.set_visible(True)
        for name in dict.fromkeys(row.contender for row in rows):
            points = sorted((row.problem.seq_q, shown_tops(row)) for row in rows if row.contender == name)
            axis.plot([x for x, _ in points], [y for _, y in points], label=name, markersize=4, **looks[name])
        shared = "" if kv_heads == heads else f" Hkv{kv_heads}"
        axis.set_title(f"B{batch} H{heads}{shared} D{head_dim}{', causal' if causal else ''}")
        lengths = sorted({row.problem.seq_q for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
        axis.set_ylim(bottom=0)
        axis.set_ylabel("TOPS")
        axis.grid(alpha=0.3)
    _legend(figure, results)
    return figure


def error(results: Results) -> Figure | None:
    """TOPS against relative L2 error of one problem, None if it was not measured."""
    rows = [row for row in results.rows if label(row.problem) == PROBLEM_OF_THE_ERRORS and row.errors is not None]
    points = [(row, rate) for row in rows if (rate := shown_tops(row)) is not None]
    if not points:
        return None
    figure, looks = Figure(figsize=(6.2, 4), layout="constrained"), styles(results)
    axis = figure.subplots()
    for row, rate in points:
        assert row.errors is not None
        look = {key: value for key, value in looks[row.contender].items() if key != "linestyle"}
        axis.plot([row.errors.rel_l2], [rate], linestyle="none", label=row.contender, **look)
        axis.annotate(row.contender, (row.errors.rel_l2, rate), textcoords="offset points", xytext=(5, 3))
    axis.set_xscale("log")
    axis.set_xlabel("relative L2 error against float64")
    axis.set_ylabel("TOPS")
    axis.margins(0.15)
    axis.set_ylim(bottom=0)
    axis.set_title(f"{PROBLEM_OF_THE_ERRORS}, {results.provenance.gpu}: up and to the left is better")
    axis.grid(alpha=0.3)
    return figure


def _legend(figure: Figure, results: Results) -> None:
    """One for all panels."""
    lines = {str(line.get_label()): line for axis in figure.axes for line in axis.get_lines()}
    figure.suptitle(f"{results.provenance.gpu}, attention alone")
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=5, frameon=False)


def write(file: Path, directory: Path) -> list[Path]:
    """The figures of one result file. Raises what `load` raises, and ValueError if there is nothing to draw."""
    results = load(file)
    figures = {"speed": speed(results) if panels(results) else None, "error": error(results)}
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    if not drawn:
        raise ValueError(f"{file} has neither several lengths of one problem nor {PROBLEM_OF_THE_ERRORS}: no figure")
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in drawn.items():
        written.append(directory / f"{file.stem}_{name}.svg")
        figure.savefig(written[-1], metadata={"Date": None})
    return written


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("-o", "--output", type=Path, default=Path(), metavar="DIRECTORY", help="default: here")
    arguments = parser.parse_args(None if argv is None else list(argv))
    for file in arguments.files:
        for path in write(file, arguments.output):
            print(path)


if __name__ == "__main__":
    main()
