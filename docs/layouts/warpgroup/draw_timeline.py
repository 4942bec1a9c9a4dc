"""Figure of the warp roles on a timeline: tiles in their stages, warpgroups, the producer."""

from __future__ import annotations

from ..svg import CARD, FAINT, INK, LANES, PALE, Svg
from .kernels import kernel_of
from .timeline import NAME, P_V, TILES, WAIT, S, Span, timeline

__all__ = ["draw_timeline"]

_COLOURS = {S: LANES[0], P_V: LANES[1], WAIT: "#d8d5cf"}
_WORK = LANES[2]
_WIDE, _H = 1060, 26


def draw_timeline() -> Svg:
    """From the trace of `timeline`: logical time runs to the right."""
    seen, kernel = timeline(), kernel_of(NAME)
    stages, groups = kernel.config.stages, kernel.config.warpgroups
    left, top = 150, 112
    height = top + (1 + stages) * (_H + 6) + groups * (_H + 14) + 76
    svg = Svg(left + _WIDE + 40, height, "Warp roles and stages on a timeline")
    svg.heading(
        24,
        28,
        f"One CTA of {NAME}, head dim {kernel.config.head_dim}: {groups} warpgroups, {TILES} KV tiles, {stages} stages",
        "traced on the emulator; the time is logical, no measurement: one unit is the issue of a warp instruction, and "
        "warps do not compete for pipes",
    )
    unit = _WIDE / seen.end
    _legend(svg, 24, 72)

    def bar(y: float, begin: int, end: int, colour: str, label: str = "", *, opacity: float = 1) -> None:
        x, wide = left + begin * unit, (end - begin) * unit
        svg.rect(round(x, 1), y, round(wide, 1), _H, colour, stroke=CARD, radius=3, opacity=opacity)
        if label and wide > 6 * len(label):
            svg.text(round(x + wide / 2, 1), y + _H / 2, label, size=10)

    y = top
    svg.text(left - 12, y + _H / 2, "producer", anchor="end", bold=True)
    svg.rect(left, y, _WIDE, _H, PALE, stroke=CARD)
    for begin, end in seen.producer:
        bar(y, begin, end, _COLOURS[WAIT], "waits for a free stage")
    for copy in seen.copies:
        x = left + copy.begin * unit
        svg.path(f"M{x:.1f} {y}v{_H}", INK, 1.5)
    first_stage = y + _H + 10
    for stage in range(stages):
        row = first_stage + stage * (_H + 6)
        svg.text(left - 12, row + _H / 2, f"stage {stage}", anchor="end", fill=FAINT)
        svg.rect(left, row, _WIDE, _H, PALE, stroke=CARD)
    for copy in seen.copies:
        row = first_stage + copy.stage * (_H + 6)
        used = [s for spans in seen.warpgroups for s in spans if s.tile == copy.tile and s.kind in (S, P_V)]
        colour = LANES[copy.tile % len(LANES)]
        bar(row, copy.begin, copy.end, colour, f"{copy.tile} comes", opacity=0.4)
        bar(row, copy.end, max(s.end for s in used), colour, f"tile {copy.tile}")
    y = first_stage + stages * (_H + 6) + 14
    for group, spans in enumerate(seen.warpgroups):
        row = y + group * (_H + 14)
        svg.text(left - 12, row + _H / 2, f"warpgroup {group}", anchor="end", bold=True)
        for span in spans:
            bar(row, span.begin, span.end, _COLOURS.get(span.kind, _WORK), _label(span))
    y += groups * (_H + 14)
    for time in range(0, seen.end, 1000):
        x = round(left + time * unit, 1)
        svg.path(f"M{x:g} {y}v6", FAINT, 1)
        svg.text(x, y + 14, time, size=9.5, fill=FAINT)
    svg.text(left, y + 36, "black marks: the producer requests a tile", anchor="start", fill=FAINT, prose=True)
    return svg


def _label(span: Span) -> str:
    if span.kind in (S, P_V):
        return f"{'S' if span.kind == S else 'PV'} {span.tile}"
    return "" if span.kind == WAIT or span.tile < 0 else f"{span.tile}"


def _legend(svg: Svg, x: float, y: float) -> None:
    kinds = {
        S: "S = Q·Kᵀ on the tensor cores",
        P_V: "P·V and P·1 on the tensor cores",
        "": "softmax, O += PV, epilogue",
        WAIT: "waits",
    }
    for kind, text in kinds.items():
        svg.rect(x, y - 6, 12, 12, _COLOURS.get(kind, _WORK), line=0, radius=2)
        svg.text(x + 18, y, text, anchor="start", fill=FAINT)
        x += 56 + 7 * len(text)
