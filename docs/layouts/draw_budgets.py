"""Figure of a lane's registers by tensor."""

from __future__ import annotations

from .budgets import LARGEST, registers
from .svg import CARD, FAINT, INK, LANES, ROWS, Svg
from .tiles import HEAD_DIMS, NAMES, config_of

__all__ = ["draw_registers"]

_COLOURS = {"O": LANES[0], "sums": ROWS[4], "softmax state": ROWS[5], "S": LANES[1]}
_WIDE, _H = 800, 30


def draw_registers() -> Svg:
    """What is alive between S and P, the fullest point of the loop, against what ptxas used."""
    rows = [(name, head_dim) for name in NAMES for head_dim in HEAD_DIMS]
    left, top = 190, 96
    svg = Svg(left + _WIDE + 60, top + len(rows) * (_H + 10) + 70, "Registers of a lane between S and P")
    svg.heading(
        24,
        28,
        "Registers of a lane between S and P, the fullest point of the loop",
        "by tensor; the black mark is what ptxas used (sm_80): addresses, fragments and temporaries are the rest",
    )
    unit = _WIDE / 256
    for i, (name, head_dim) in enumerate(rows):
        config, y = config_of(name, head_dim), top + i * (_H + 10)
        budget = registers(config)
        svg.text(24, y + _H / 2, name, anchor="start", bold=True)
        svg.text(left - 12, y + _H / 2, f"D {head_dim}", anchor="end", fill=FAINT)
        x = float(left)
        for part, colour in _COLOURS.items():
            wide = budget.parts[part] * unit
            svg.rect(x, y, wide, _H, colour, stroke=CARD)
            label = f"{part} {budget.parts[part]}" if wide > 90 else f"{budget.parts[part]}" if wide > 22 else ""
            svg.text(x + wide / 2, y + _H / 2, label, size=10.5)
            x += wide
        mark = left + budget.used * unit
        svg.path(f"M{mark:g} {y - 3}v{_H + 6}", INK, 2.5)
        svg.text(mark + 6, y + _H / 2, budget.used, anchor="start", size=10.5, bold=True)
    y = top + len(rows) * (_H + 10) + 14
    for count in range(0, 257, 32):
        at = min(count, LARGEST)
        svg.path(f"M{left + at * unit:g} {y - 8}v6", FAINT, 1)
        svg.text(left + at * unit, y + 6, at, size=9.5, fill=FAINT)
    x = left
    for part, colour in _COLOURS.items():
        svg.rect(x, y + 24, 12, 12, colour, line=0, radius=2)
        svg.text(x + 18, y + 30, part, anchor="start", fill=FAINT)
        x += 50 + 7 * len(part)
    return svg
