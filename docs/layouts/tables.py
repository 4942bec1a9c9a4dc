"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["merged", "table"]


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(map(str, head))]
    lines.append(["---"] * len(lines[0]))
    lines += [list(map(str, row)) for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def merged(rows: Iterable[Iterable[object]], column: int = 0) -> list[list[str]]:
    """Rows that differ in one column only as one row, its values there listed; in the order of the first."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        cells = [str(cell) for cell in row]
        key = (*cells[:column], *cells[column + 1 :])
        found.setdefault(key, []).append(cells[column])
    return [[*key[:column], ", ".join(values), *key[column:]] for key, values in found.items()]
