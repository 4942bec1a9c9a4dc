"""Figures of an MMA's fragments: A at the left, B above, C where they meet."""

from __future__ import annotations

from .fragments import Fragment, Mma, fragments
from .svg import CARD, FAINT, GRID, INK, LANES, Svg

__all__ = ["draw_mma"]

_CELL_W, _CELL_H = 38, 21
_MARKED = 5
"""The lane that is outlined: g = 1, t = 1."""


def draw_mma(mma: Mma) -> Svg:
    """Every register of the warp, by lane and number; columns of A and rows of B are grouped by register."""
    parts = fragments(mma)
    a, b, c = parts["A"], parts["B"], parts["C"]
    k_cells = a.shape[1] // a.packed
    left, top = 62, 104
    c_x, c_y = left + k_cells * _CELL_W + 74, top + k_cells * _CELL_H + 62
    svg = Svg(c_x + 8 * _CELL_W + 40, c_y + 16 * _CELL_H + 52, f"Fragments of {mma.title}")
    svg.heading(24, 28, mma.title, f"lane.register; lane = 4·g + t, coloured by t; lane {_MARKED} outlined")
    _legend(svg, 24, 68)
    _draw(svg, a, left, c_y, f"A  {a.shape[0]} × {a.shape[1]}", "m", "k")
    _draw(svg, b, c_x, top, f"B  {b.shape[1]} × {b.shape[0]}", "k", "n", turned=True)
    _draw(svg, c, c_x, c_y, f"C  {c.shape[0]} × {c.shape[1]}", "m", "n")
    origin = "(lane, value) → index, from the atom" + (" of s8, two k in a byte:" if mma.bits == 4 else ":")
    for i, fragment in enumerate((a, b, c)):
        note = f"{fragment.operand}: {fragment.registers} registers a lane, {_plural(fragment)} each"
        svg.text(left, top + 20 + 22 * i, note, anchor="start", fill=FAINT)
    for i, fragment in enumerate((a, b, c)):
        tv = f"{fragment.operand}  {_layout(fragment)}"
        svg.text(left, top + 104 + 22 * i, tv, anchor="start", fill=INK, size=10.5)
    svg.text(left, top + 84, origin, anchor="start", fill=FAINT, prose=True)
    return svg


def _layout(fragment: Fragment) -> str:
    return f"{fragment.layout.shape}:{fragment.layout.stride}".replace(" ", "")


def _plural(fragment: Fragment) -> str:
    return f"{fragment.packed} × {fragment.bits} bits" if fragment.packed > 1 else f"{fragment.bits} bits"


def _legend(svg: Svg, x: float, y: float) -> None:
    for t, colour in enumerate(LANES):
        svg.rect(x + 66 * t, y - 7, 14, 14, colour, stroke=GRID, radius=3)
        svg.text(x + 66 * t + 20, y, f"t = {t}", anchor="start", fill=FAINT)


def _draw(
    svg: Svg, fragment: Fragment, x: float, y: float, title: str, row: str, column: str, *, turned: bool = False
) -> None:
    """One operand; ``turned``: B, whose k runs down."""
    packed = fragment.packed if fragment.operand != "C" else 1
    cells: dict[tuple[int, int], tuple[int, int]] = {}
    for (first, second), (lane, value) in fragment.owners().items():
        cells[first, second // packed] = lane, value // packed
    rows, columns = 1 + max(r for r, _ in cells), 1 + max(c for _, c in cells)
    marked = []
    for (first, second), (lane, register) in cells.items():
        across, down = (first, second) if turned else (second, first)
        cell = x + across * _CELL_W, y + down * _CELL_H, _CELL_W, _CELL_H
        svg.rect(*cell, LANES[lane % 4], stroke=CARD)
        svg.text(cell[0] + _CELL_W / 2, cell[1] + _CELL_H / 2, f"{lane}.{register}", size=10.5)
        if lane == _MARKED:
            marked.append(cell)
    for cell in marked:
        svg.rect(*cell, stroke=INK, line=2)
    across, down = (rows, columns) if turned else (columns, rows)
    svg.text(x, y - 34, title, anchor="start", bold=True, size=12)
    wide, high = (1, packed) if turned else (packed, 1)
    for i in range(across):
        svg.text(x + (i + 0.5) * _CELL_W, y - 11, _span(i, wide), size=9, fill=FAINT)
    for i in range(down):
        svg.text(x - 6, y + (i + 0.5) * _CELL_H, _span(i, high), size=9, fill=FAINT, anchor="end")
    svg.text(x - 6, y - 11, f"{row} \\ {column}", size=9, fill=FAINT, anchor="end")


def _span(i: int, each: int) -> str:
    return str(i) if each == 1 else f"{i * each}–{i * each + each - 1}"
