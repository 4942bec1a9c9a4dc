"""Figures of operands in shared memory as wgmma sees them: cores of eight rows, and what a descriptor says of them."""

from __future__ import annotations

from cute_attn.kernels.swizzled_tile import SwizzledTile

from ..svg import CARD, FAINT, INK, PALE, ROWS, Svg
from .cores import CORE_ROWS, Operand, operands
from .kernels import kernel_of

__all__ = ["draw_blocks", "draw_planes"]

_CHUNK = 16
_W, _H = 74, 26


def _named(name: str) -> Operand:
    return next(operand for operand in operands() if operand.name == name)


def draw_planes() -> Svg:
    """A plane of 32-byte rows of K: eight rows are a core of 256 bytes; the next eight follow; then the next plane."""
    k = _named("`int8_fp8` K")
    left, top = 92, 112
    wide = 8 * _W
    svg = Svg(left + wide + 330, top + 6 * _H + 26 + 110, "Planes of 32-byte rows as wgmma reads them")
    svg.heading(
        24,
        28,
        "K's planes are wgmma's K-major layout with the 32-byte swizzle",
        "lines: 128 bytes of shared memory, four banks a cell; r.c: 16-byte chunk c of row r; colours: row of its core",
    )
    for group in range(8):
        svg.text(left + (group + 0.5) * _W, top - 10, f"banks {4 * group}–{4 * group + 3}", size=9, fill=FAINT)
    y = top
    rows, _ = k.layout.extents()
    where = {k.layout(row, byte): (row, byte // _CHUNK) for row in range(rows) for byte in range(0, 64, _CHUNK)}
    for title, first, lines in (
        (f"rows 0–15 of plane 0: byte 0, and {k.stride} further", 0, 4),
        (f"rows 0–7 of plane 1: {k.starts[1]} further", k.starts[1], 2),
    ):
        for line in range(lines):
            begin = first + line * 8 * _CHUNK
            for column in range(8):
                row, chunk = where[begin + column * _CHUNK]
                at = left + column * _W, y + line * _H
                svg.rect(*at, _W, _H, ROWS[row % CORE_ROWS], stroke=CARD)
                svg.text(at[0] + _W / 2, at[1] + _H / 2, f"{row}.{chunk}", size=10.5)
            svg.text(left - 6, y + (line + 0.5) * _H, begin, size=9, fill=FAINT, anchor="end")
        for core in range(lines // 2):
            svg.rect(left, y + core * 2 * _H, wide, 2 * _H, stroke=INK, line=2)
        svg.text(left + wide + 14, y + lines * _H / 2, title, anchor="start", size=10.5)
        y += lines * _H + 26
    facts = (
        "descriptor: K-major, 32-byte swizzle (mode 3)",
        f"stride {k.stride} B: from eight rows to the next eight",
        "leading: not used, one core covers an instruction's k",
        f"next k step: {k.starts[1]} B further, {len(k.starts)} instructions",
    )
    for i, fact in enumerate(facts):
        svg.text(left, y + 20 * i - 4, fact, anchor="start", size=10.5, fill=FAINT)
    return svg


def draw_blocks() -> Svg:
    """A core of a block of 64 channels: K of 16-bit floats K-major, V MN-major, of the same bytes."""
    tile = kernel_of("bf16").image
    assert isinstance(tile, SwizzledTile)
    k, v = _named("`bf16` K"), _named("`bf16` V")
    left, top = 92, 128
    panels = (
        ("K: K-major", "marked: k of the first instruction, 16 dims of every token", k, k.contiguous_bytes, "dims"),
        ("V: MN-major", "marked: half of the k of the first instruction, 8 tokens", v, 128, "channels"),
    )
    wide = 8 * _W
    svg = Svg(left + 2 * wide + 110, top + 8 * _H + 70, "128-byte swizzled blocks of 16-bit floats")
    svg.heading(
        24,
        28,
        "A block of 64 channels as TMA brings it: eight tokens of 128 bytes are one core of 1024 bytes",
        "lines: 128 bytes of shared memory, a token each; cells: four banks, 8 elements; t.c: 16-byte chunk c of token "
        "t; colours: chunk",
    )
    for i, (title, note, operand, marked, axis) in enumerate(panels):
        x = left + i * (wide + 60)
        svg.heading(x, top - 46, title, note)
        where = {operand.layout(row, byte): (row, byte // _CHUNK) for row in range(8) for byte in range(0, 128, _CHUNK)}
        for row in range(8):
            for column in range(8):
                token, chunk = where[row * 128 + column * _CHUNK]
                inside = chunk * _CHUNK < marked
                at = x + column * _W, top + row * _H
                svg.rect(*at, _W, _H, ROWS[chunk] if inside else PALE, stroke=CARD)
                svg.text(at[0] + _W / 2, at[1] + _H / 2, f"{token}.{chunk}", size=10.5,
                         fill=INK if inside else FAINT, bold=inside)  # fmt: skip
            svg.text(x - 6, top + (row + 0.5) * _H, row * 128, size=9, fill=FAINT, anchor="end")
        step = operand.starts[1] - operand.starts[0]
        leading = f"leading {operand.leading} B: from 64 {axis} to the next 64" if operand.leading else "leading unused"
        for j, fact in enumerate((
            f"stride {operand.stride} B: from eight tokens to the next eight; {leading}",
            f"next k step: {step} B further"
            + (f", the next 64 {axis} {operand.starts[4]} B" if operand is k else ": the next 16 tokens"),
        )):  # fmt: skip
            svg.text(x, top + 8 * _H + 24 + 20 * j, fact, anchor="start", size=10.5, fill=FAINT)
    return svg
