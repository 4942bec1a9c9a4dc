"""Figures of the KV pipelines: which tile lies in which stage, and when it was asked for."""

from __future__ import annotations

from .ring import record, record_split
from .svg import CARD, FAINT, INK, LANES, PALE, Svg

__all__ = ["draw_ring", "draw_split"]

_W, _H, _TILES = 112, 34, 6


def draw_ring(stage_counts: tuple[int, ...]) -> Svg:
    """One panel per number of stages."""
    left, top = 130, 92
    height = top + sum(stages * _H + 76 for stages in stage_counts)
    svg = Svg(left + (_TILES + 1) * _W + 30, height, "The ring of KV stages")
    svg.heading(
        24,
        28,
        f"The ring: {_TILES} KV tiles through {' and '.join(map(str, stage_counts))} stages",
        "pale: cp.async on its way; full colour: the tile is computed with; recorded from KvPipeline on the emulator",
    )
    y = top
    for stages in stage_counts:
        _draw(svg, stages, left, y)
        y += stages * _H + 76
    return svg


def _draw(svg: Svg, stages: int, x: float, y: float) -> None:
    svg.text(24, y, f"{stages} stages", anchor="start", bold=True, prose=True, size=13)
    stays = record(stages, _TILES)
    for column in range(_TILES + 1):
        label = "start" if column == 0 else f"tile {_TILES - column}"
        svg.text(x + (column + 0.5) * _W, y, label, size=10.5, fill=FAINT)
    y += 16
    for stage in range(stages):
        svg.text(x - 12, y + (stage + 0.5) * _H, f"stage {stage}", anchor="end", fill=FAINT)
        svg.rect(x, y + stage * _H, (_TILES + 1) * _W, _H, PALE, stroke=CARD, line=2)
    for column in range(1, _TILES + 1):
        svg.path(f"M{x + column * _W:g} {y - 4}v{stages * _H + 8}", INK, 1)
    for stay in stays:
        top, colour = y + stay.stage * _H + 4, LANES[stay.tile % len(LANES)]
        begin, use = x + (stay.requested + 1) * _W, x + (stay.used + 1) * _W
        svg.rect(begin + 6, top, use - begin - 6, _H - 8, colour, stroke="none", line=0, radius=4, opacity=0.35)
        svg.text(begin + _W / 2, top + _H / 2 - 4, f"{stay.tile} on its way", size=10.5)
        svg.rect(use, top, _W - 2, _H - 8, colour, stroke=INK, line=1, radius=4)
        svg.text(use + _W / 2, top + _H / 2 - 4, f"S, P, O of {stay.tile}", size=10.5, bold=True)
    svg.text(x + _W, y + stages * _H + 16, "wait + barrier", size=9.5, fill=FAINT)


def draw_split() -> Svg:
    """One stage: K and V by halves of a tile's time."""
    left, top, tiles = 130, 92, 3
    columns = 2 * tiles + 1
    svg = Svg(left + columns * _W + 30, top + 16 + 2 * _H + 40, "One stage: K and V apart")
    svg.heading(
        24,
        28,
        f"One stage: {tiles} KV tiles, K and V apart",
        "pale: cp.async on its way; full colour: the operand is computed with; recorded from SplitPipeline on the "
        "emulator",
    )
    for column in range(columns):
        step = ("S, P of tile", "O of tile")[(column - 1) % 2] + f" {tiles - 1 - (column - 1) // 2}"
        svg.text(left + (column + 0.5) * _W, top, step if column else "start", size=10.5, fill=FAINT)
    y = top + 16
    for row, operand in enumerate("KV"):
        svg.text(left - 12, y + (row + 0.5) * _H, operand, anchor="end", fill=FAINT)
        svg.rect(left, y + row * _H, columns * _W, _H, PALE, stroke=CARD, line=2)
    for column in range(1, columns):
        svg.path(f"M{left + column * _W:g} {y - 4}v{2 * _H + 8}", INK, 1)
    for stay in record_split(tiles):
        at, colour = y + "KV".index(stay.operand) * _H + 4, LANES[stay.tile % len(LANES)]
        begin, use = left + (stay.requested + 1) * _W, left + (stay.used + 1) * _W
        svg.rect(begin + 6, at, use - begin - 6, _H - 8, colour, stroke="none", line=0, radius=4, opacity=0.35)
        svg.text((begin + use) / 2, at + _H / 2 - 4, "on its way", size=10.5)
        svg.rect(use, at, _W - 2, _H - 8, colour, stroke=INK, line=1, radius=4)
        svg.text(use + _W / 2, at + _H / 2 - 4, f"{stay.operand} of {stay.tile}", size=10.5, bold=True)
    svg.text(left + _W, y + 2 * _H + 16, "wait + barrier", size=9.5, fill=FAINT)
    return svg
