"""Figures of registers: S's accumulator as P's A operand, and the row sums in the last n8 tile of P·V."""

from __future__ import annotations

from ..permutations import QUAD
from ..svg import CARD, FAINT, INK, LANES, ROWS, Svg
from .fragments import p_operand, s_accumulator, score_element, sums_accumulator, v_tokens
from .kernels import image_of

__all__ = ["draw_sums", "draw_tokens"]

_H = 28


def draw_tokens(name: str) -> Svg:
    """The tokens of one instruction of P·V: as columns of S, and as k of the A operand."""
    p = p_operand(name)
    count = p.shape[1]
    wide, left, gap = 32, 212, 108
    svg = Svg(left + count * wide + 40, 4 * _H + 2 * gap + 170, "S's accumulator is the A operand of P·V")
    svg.heading(
        24,
        28,
        "S's accumulator is the A operand of P·V, register by register",
        f"{name}, row g of a warp: {count} of a tile's tokens, one instruction's k; cells name the token, colours the "
        "lane of the quad (t) that holds it",
    )
    columns = [_token_at(name, column) for column in range(count)]
    order = v_tokens(name)[:count]
    held = {}
    for t in range(QUAD):
        for value in range(s_accumulator(name).values):
            row, token = score_element(name, t, value)
            if row == 0 and token < count:
                held[token] = t, value
    owners = p.owners()
    natural = sorted(columns)
    top = 96
    strips = (
        ("tokens of the sequence", "", natural),
        ("columns of S's n8 tiles", "= rows of K in the image", columns),
        ("k of P's A operand", "= V's order in the image", order),
    )
    y = top
    for i, (title, note, tokens) in enumerate(strips):
        for j, token in enumerate(tokens):
            svg.rect(left + j * wide, y, wide, _H, LANES[held[token][0]], stroke=CARD)
            svg.text(left + (j + 0.5) * wide, y + _H / 2, token, size=10.5)
        svg.text(24, y + (8 if note else _H / 2), title, anchor="start", prose=True, bold=True)
        svg.text(24, y + 23, note, anchor="start", prose=True, fill=FAINT)
        if i:
            above = y - gap + (34 if i > 1 else 0)
            for j, token in enumerate(strips[i - 1][2]):
                k = tokens.index(token)
                svg.curve(left + (j + 0.5) * wide, above, left + (k + 0.5) * wide, y - 2,
                          LANES[held[token][0]], 2)  # fmt: skip
        if i == 1:
            for j, token in enumerate(tokens):
                svg.text(left + (j + 0.5) * wide, y + _H + 9, f"s{held[token][1]}", size=8.5, fill=FAINT)
            for tile in range(count // 8):
                _bracket(svg, left + 8 * tile * wide, y + _H + 15, 8 * wide, f"n8 tile {tile}")
        if i == 2:
            for k in range(0, count, p.packed):
                thread, value = owners[0, k]
                _bracket(svg, left + k * wide, y + _H + 4, p.packed * wide, f"t{thread % QUAD} a{value // p.packed}")
        y += _H + gap
    svg.text(left, y - gap + 52, "s, a: number of the register in the accumulator of S and in the A operand; rows "
             "g + 8 have s + 2 and a + 1", anchor="start", fill=FAINT, prose=True)  # fmt: skip
    return svg


def _token_at(name: str, column: int) -> int:
    image = image_of(name)
    return image.score_tokens(column % 8, column // 8)


def draw_sums(name: str) -> Svg:
    """A row of a warp's accumulator of P·V and P·1: channels, and the sums that every lane of the quad gets."""
    image, c = image_of(name), sums_accumulator(name)
    wide, left = 30, 196
    owners = c.owners()
    tiles = [0, 1, 2, 3, image.value_channels // 8 - 1, image.value_channels // 8]
    svg = Svg(left + len(tiles) * (8 * wide // 2 + 34) + 20, 232, "The row sums of P in the last n8 tile")
    svg.heading(
        24,
        28,
        f"P·V and P·1 in one product: N = {image.value_rows}, the last n8 tile is the row's sum",
        f"{name}, row g of a warp; cells: channel of O, colours: lane of the quad (t), below: its register",
    )
    y = 104
    for i, tile in enumerate(tiles):
        x = left + i * (4 * wide + 34)
        sums = tile == tiles[-1]
        label = f"n8 tile {tile}" if not sums else f"n8 tile {tile}: Σ P"
        svg.text(x + 2 * wide, y - 14, label, size=10, bold=sums)
        for column in range(8):
            thread, value = owners[0, 8 * tile + column]
            at = x + column % 4 * wide, y + column // 4 * (_H + 16)
            svg.rect(*at, wide, _H, ROWS[5] if sums else LANES[thread % QUAD], stroke=CARD)
            text = "Σ" if sums else image.output_channels(column, tile)
            svg.text(at[0] + wide / 2, at[1] + _H / 2, text, size=10.5)
            svg.text(at[0] + wide / 2, at[1] + _H + 8, f"t{thread % QUAD} {value}", size=8, fill=FAINT)
        if i == 3:
            svg.text(x + 4 * wide + 17, y + _H, "…", size=14, fill=FAINT)
    svg.text(24, y + 8, "accumulator, row g", anchor="start", prose=True, bold=True)
    svg.text(24, y + 23, "columns 0–3 above 4–7", anchor="start", prose=True, fill=FAINT)
    return svg


def _bracket(svg: Svg, x: float, y: float, wide: float, text: str) -> None:
    svg.path(f"M{x + 3:g} {y:g}v5h{wide - 6:g}v-5", INK, 1)
    svg.text(x + wide / 2, y + 14, text, size=10)
