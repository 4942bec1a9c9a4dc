"""Figure of a KV tile's bytes: the whole tile, one plane of K, rows of it."""

from __future__ import annotations

from cute_attn.kernels.attention_sm80 import AttentionSm80
from cute_attn.kernels.tile_image import TILE_TOKENS, TileImage

from .svg import CARD, FAINT, INK, LANES, ROWS, Svg
from .tiles import HEAD_DIM, NAMES, config_of, parts

__all__ = ["draw_tiles"]

_COLOURS = {"K": LANES[0], "V": LANES[1], "Vᵀ": LANES[1], "c": LANES[2], "−M·c": LANES[3], "Δ": ROWS[4]}
_ROW, _SHOWN = 32, 16


def draw_tiles() -> Svg:
    """Byte maps to one scale, and a plane of K looked into."""
    kernels = {name: AttentionSm80(config_of(name)) for name in NAMES}
    left, wide, top = 130, 820, 88
    svg = Svg(left + wide + 70, 332 + 66 * len(NAMES), "The bytes of a KV tile")
    svg.heading(
        24,
        28,
        f"A KV tile of {TILE_TOKENS} tokens, head dim {HEAD_DIM}, byte by byte",
        "the same in global memory (quantised recipes) and in one stage of shared memory; only stages have Δ, delta; "
        "ticks part the planes",
    )
    unit = wide / max(kernel.stage_bytes for kernel in kernels.values())
    for i, (name, kernel) in enumerate(kernels.items()):
        _bar(svg, name, kernel, left, top + 66 * i, unit)
    image = kernels["int8"].image
    y = top + 66 * len(kernels) - 22
    svg.rect(left, top, TILE_TOKENS * _ROW * unit, 30, stroke=INK, line=2)
    _plane(svg, image, left, y + 40)
    return svg


def _bar(svg: Svg, name: str, kernel: AttentionSm80, x: float, y: float, unit: float) -> None:
    image, last = kernel.image, parts(kernel)[-1]
    svg.text(24, y + 15, name, anchor="start", bold=True)
    for part in parts(kernel):
        begin, width = x + part.begin * unit, (part.end - part.begin) * unit
        svg.rect(begin, y, width, 30, _COLOURS[part.name], stroke=CARD)
        plane = TILE_TOKENS * _ROW if part.name in ("K", "V") else image.value_channels * _ROW
        for edge in range(part.begin + plane, part.end, plane):
            svg.path(f"M{x + edge * unit:g} {y + 1}v5m0 18v5", CARD, 1.5)
        if width > 30:
            svg.text(begin + width / 2, y + 15, part.what, size=11)
            svg.text(begin, y + 40, part.begin, size=9, fill=FAINT, anchor="start")
        elif part.name == "c":
            svg.text(
                begin,
                y + 40,
                f"{part.begin}: c, −M·c{', Δ' if last.name == 'Δ' else ''}",
                size=9,
                fill=FAINT,
                anchor="start",
            )
    svg.text(x + kernel.stage_bytes * unit + 6, y + 15, f"{kernel.stage_bytes} B", size=10, anchor="start", fill=FAINT)


def _plane(svg: Svg, image: TileImage, x: float, y: float) -> None:
    """The first rows of K's first plane, four to a line of shared memory."""
    chunk, line = 16, 4 * _ROW
    cell = 98
    svg.heading(
        x,
        y,
        f"The outlined plane of K: {TILE_TOKENS} rows of {_ROW} bytes, the first {_SHOWN}",
        "cells are 16 bytes: token, dims; coloured by the lane that gets the token's scores",
    )
    content = {image.k(token, dim): (token, dim) for token in range(TILE_TOKENS) for dim in range(0, _ROW, chunk)}
    y += 52
    for group in range(line // chunk):
        svg.text(x + (group + 0.5) * cell, y - 9, f"banks {4 * group}–{4 * group + 3}", size=9, fill=FAINT)
    for offset in range(0, _SHOWN * _ROW, chunk):
        token, dim = content[offset]
        row, column = divmod(offset, line)
        place = x + column // chunk * cell, y + row * 36, cell, 36
        svg.rect(*place, LANES[token % 16 // 4], stroke=CARD)
        svg.text(place[0] + cell / 2, place[1] + 12, f"token {token}", size=10.5)
        svg.text(place[0] + cell / 2, place[1] + 26, f"dims {dim}–{dim + chunk - 1}", size=9, fill=INK)
        if column == 0:
            svg.text(x - 8, place[1] + 18, f"{offset}", size=9, fill=FAINT, anchor="end")
    y += _SHOWN * _ROW // line * 36
    for offset in range(_ROW, line, _ROW):
        svg.path(
            f"M{x + offset // chunk * cell:g} {y - _SHOWN * _ROW // line * 36:g}v{_SHOWN * _ROW // line * 36}",
            INK,
            0.75,
        )
