"""Figure of one ldmatrix phase in shared memory, before and after planes and swizzle."""

from __future__ import annotations

from .banks import BANK_GROUPS, CHUNK, PHASE_ROWS, Placement, conflict_ways, phases, placements
from .svg import CARD, FAINT, INK, PALE, ROWS, Svg

__all__ = ["draw_banks"]

_W, _H, _LINES = 38, 24, 8
_LINE = BANK_GROUPS * CHUNK


def draw_banks(row_bytes: int) -> Svg:
    """``row_bytes``: of a row of the operand."""
    panels = placements(row_bytes)
    width, left, top = BANK_GROUPS * _W + 58, 62, 134
    svg = Svg(left + len(panels) * width - 20, top + _LINES * _H + 50, "Shared memory before and after the swizzle")
    svg.heading(
        24,
        28,
        "One ldmatrix phase: rows 0 to 7, their first 16 bytes",
        "lines: 128 bytes of shared memory; columns: four banks; r.c: 16-byte chunk c of row r; coloured: the phase",
    )
    for i, panel in enumerate(panels):
        _draw(svg, panel, left + i * width, top)
    return svg


def _draw(svg: Svg, panel: Placement, x: float, y: float) -> None:
    phase = phases(panel.layout)[0]
    ways = conflict_ways(phase)
    svg.heading(x, y - 50, panel.name, panel.note)
    for group in range(BANK_GROUPS):
        svg.text(x + (group + 0.5) * _W, y - 9, f"{4 * group}–{4 * group + 3}", size=9, fill=FAINT)
    for (row, chunk), (line, group) in _chunks(panel).items():
        read = panel.layout(row, chunk * CHUNK) in phase
        cell = x + group * _W, y + line * _H, _W, _H
        svg.rect(*cell, ROWS[row % PHASE_ROWS] if read else PALE, stroke=CARD)
        label = f"{row}.{chunk}"
        svg.text(cell[0] + _W / 2, cell[1] + _H / 2, label, size=10.5, fill=INK if read else FAINT, bold=read)
    for line in range(_LINES):
        svg.text(x - 6, y + (line + 0.5) * _H, f"{line * _LINE}", size=9, fill=FAINT, anchor="end")
    verdict = "no conflict: one pass" if ways == 1 else f"{ways} rows share a bank: {ways} passes"
    svg.text(x, y + _LINES * _H + 22, verdict, anchor="start", bold=True, prose=True)


def _chunks(panel: Placement) -> dict[tuple[int, int], tuple[int, int]]:
    """(row, chunk) -> (line, bank group), for the lines that are drawn."""
    rows, row_bytes = panel.layout.extents()
    found = {}
    for row in range(rows):
        for chunk in range(row_bytes // CHUNK):
            line, inside = divmod(panel.layout(row, chunk * CHUNK), _LINE)
            if line < _LINES:
                found[row, chunk] = line, inside // CHUNK
    return found
