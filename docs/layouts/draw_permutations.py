"""Figures of the two permutations: tokens of K on their way from memory into P, channels of V on theirs to memory."""

from __future__ import annotations

from cute_attn.kernels.tile_image import TileImage

from .fragments import fragments
from .permutations import P_MMAS, QUAD, lane_channels, output_owner, score_element, values_token_of_k
from .svg import CARD, FAINT, INK, LANES, Svg

__all__ = ["draw_channels", "draw_tokens"]

_H = 28
_TOKENS = 16


def draw_tokens(head_dim: int) -> Svg:
    """16 tokens: in the sequence, as columns of S, as k of P's A operand."""
    image, wide = TileImage(head_dim), 46
    left, gap = 232, 92
    svg = Svg(left + _TOKENS * wide + 40, 520, "K's tokens: the accumulator of S is the A operand of P·V")
    svg.heading(
        24,
        28,
        "K's tokens: the accumulator of S is P's A operand, register by register",
        "16 of a tile's 64 tokens; cells name the token, colours the lane of the quad (t) that holds it",
    )
    # (n8 tile, accumulator column) of every token, by the atom's C fragment.
    held = {
        score_element(image, t, n, e)[1]: (t, n, fragments(P_MMAS["int8"])["C"].place(t, e)[1])
        for t in range(QUAD)
        for n in range(2)
        for e in range(2)
    }
    rows = {image.k(token, 0) // 32: token for token in range(_TOKENS)}
    natural, columns = list(range(_TOKENS)), [rows[i] for i in range(_TOKENS)]
    integers, floats = values_token_of_k(image)[:_TOKENS], values_token_of_k(TileImage(head_dim, "float16"))[:_TOKENS]
    strips = [
        ("tokens of the sequence", "", natural),
        ("rows of K in the image", "= columns of S's n8 tiles", columns),
        ("k of P's A operand, u8", "V's tokens as they come", integers),
    ]
    y = 92
    for i, (name, note, tokens) in enumerate(strips):
        _strip(svg, left, y, wide, tokens, [held[token][0] for token in tokens])
        svg.text(24, y + (8 if note else _H / 2), name, anchor="start", prose=True, bold=True)
        svg.text(24, y + 23, note, anchor="start", prose=True, fill=FAINT)
        if i:
            below_brackets = 26 if i > 1 else 0
            _connect(svg, left, y - gap - _H + below_brackets, y, wide, strips[i - 1][2], tokens, held)
        y += gap + _H
    for tile in range(2):
        _bracket(svg, left + 8 * tile * wide, 92 + gap + 2 * _H + 3, 8 * wide, f"n8 tile {tile}, columns 0–7")
    for t in range(QUAD):
        _bracket(svg, left + QUAD * t * wide, 92 + 2 * gap + 3 * _H + 3, QUAD * wide, f"lane 4g+{t}: one register")
    y = 92 + 2 * gap + 3 * _H + 74
    svg.text(24, y + 8, "k of P's A operand, f16", anchor="start", prose=True, bold=True)
    svg.text(24, y + 23, "V's tokens in S's column order", anchor="start", prose=True, fill=FAINT)
    _strip(svg, left, y, wide, floats, [held[token][0] for token in floats])
    for pair in range(_TOKENS // 2):
        _bracket(svg, left + 2 * pair * wide, y + _H + 3, 2 * wide, f"4g+{pair % QUAD}")
    return svg


def draw_channels(head_dim: int) -> Svg:
    """32 channels: columns of four n8 tiles of O, and a row of the output in memory."""
    image, wide = TileImage(head_dim), 26
    count = QUAD * image.output_run
    left = 190
    svg = Svg(left + count * wide + 40, 312, "V's channels: a lane stores 16 bytes of output")
    svg.heading(
        24,
        28,
        f"V's channels: a lane holds {image.output_run} neighbours, one 16-byte store",
        "32 channels of O; cells name the channel, colours the lane of the quad (t) that holds it",
    )
    columns = [image.output_channels(column, n) for n in range(4) for column in range(8)]
    owner = output_owner(image, count)
    y, gap = 112, 90
    _strip(svg, left, y, wide, columns, [owner[channel] for channel in columns])
    _strip(svg, left, y + gap + _H, wide, list(range(count)), owner)
    held = {channel: (owner[channel],) for channel in range(count)}
    _connect(svg, left, y, y + gap + _H, wide, columns, list(range(count)), held)
    svg.text(24, y + 8, "columns of O's n8 tiles", anchor="start", prose=True, bold=True)
    svg.text(24, y + 23, "= rows of V in the image", anchor="start", prose=True, fill=FAINT)
    svg.text(24, y + gap + _H + 8, "channels of the output", anchor="start", prose=True, bold=True)
    svg.text(24, y + gap + _H + 23, "one row, in memory", anchor="start", prose=True, fill=FAINT)
    for n in range(4):
        _bracket(svg, left + 8 * n * wide, y - 5, 8 * wide, f"n8 tile {n}", above=True)
    for t in range(QUAD):
        first = lane_channels(image, t, 0)[0]
        _bracket(svg, left + first * wide, y + gap + 2 * _H + 3, image.output_run * wide, f"lane 4g+{t}: st.global.v4")
    return svg


def _strip(svg: Svg, x: float, y: float, wide: float, labels: list[int], lanes: list[int]) -> None:
    for i, (label, t) in enumerate(zip(labels, lanes, strict=True)):
        svg.rect(x + i * wide, y, wide, _H, LANES[t], stroke=CARD)
        svg.text(x + (i + 0.5) * wide, y + _H / 2, label, size=11)


def _connect(
    svg: Svg, x: float, above: float, below: float, wide: float, before: list[int], after: list[int], held: dict
) -> None:
    """A curve from each element of one strip to the same element of the next."""
    for i, label in enumerate(before):
        j = after.index(label)
        start, end = x + (i + 0.5) * wide, x + (j + 0.5) * wide
        svg.curve(start, above + _H + 2, end, below - 2, LANES[held[label][0]], 2.5)


def _bracket(svg: Svg, x: float, y: float, wide: float, text: str, *, above: bool = False) -> None:
    down = -5 if above else 5
    svg.path(f"M{x + 3:g} {y:g}v{down}h{wide - 6:g}v{-down}", INK, 1)
    svg.text(x + wide / 2, y + (-15 if above else 15), text, size=10)
