"""Figure of a KV tile of 128 tokens, byte by byte, and of a plane of V with its rows of ones."""

from __future__ import annotations

from cute_attn.kernels.attention_sm90 import AttentionSm90
from cute_attn.kernels.operand_planes import PLANE_BYTES_PER_ROW
from cute_attn.kernels.swizzled_tile import SwizzledTile
from cute_attn.kernels.tile_image import VALUE_BYTES, TileImage

from ..svg import CARD, FAINT, INK, LANES, ROWS, Svg
from ..tiles import Part
from .kernels import HEAD_DIM, image_of, kernel_of

__all__ = ["draw_tile", "tile_parts"]

_COLOURS = {"K": LANES[0], "Vᵀ": LANES[1], "V": LANES[1], "1": ROWS[5], "c": LANES[2]}
_DRAWN = ("int8_fp8", "fp8", "int8", "int8_fp16", "bf16")
_WIDE, _H = 820, 30


def tile_parts(kernel: AttentionSm90) -> tuple[Part, ...]:
    """A KV tile from its first to its last byte. The rows of ones close every plane of V."""
    image = kernel.image
    if isinstance(image, SwizzledTile):
        half = image.operand_bytes
        return Part("K", 0, half, "K, one stage"), Part("V", half, 2 * half, "V, the next stage")
    row = PLANE_BYTES_PER_ROW
    planes = image.tokens * VALUE_BYTES[image.values] // row
    plane = image.value_rows * row
    values = []
    for i in range(planes):
        first = image.v_offset + i * plane
        values += [
            Part("Vᵀ", first, first + image.value_channels * row, f"Vᵀ, {image.values}" if not i else ""),
            Part("1", first + image.value_channels * row, first + plane, ""),
        ]
    return (
        Part("K", image.k_offset, image.v_offset, f"K, {image.keys}"),
        *values,
        Part("c", image.scale_offset, image.nbytes, ""),
    )


def draw_tile() -> Svg:
    """Byte maps to one scale; below, where a plane's rows of channels and of ones lie."""
    kernels = {name: kernel_of(name) for name in _DRAWN}
    left, top = 130, 92
    svg = Svg(left + _WIDE + 80, top + 62 * len(kernels) + 256, "The bytes of a KV tile of 128 tokens")
    tokens = kernels[_DRAWN[0]].image.tokens
    svg.heading(
        24,
        28,
        f"A KV tile of {tokens} tokens, head dim {HEAD_DIM}, byte by byte",
        "in global memory and in a stage alike (quantised recipes); orange-red: rows of ones, 8 behind every plane of "
        "V; green: K's scales",
    )
    unit = _WIDE / max(kernel.image.nbytes for kernel in kernels.values())
    for i, (name, kernel) in enumerate(kernels.items()):
        _bar(svg, name, kernel, left, top + 62 * i, unit)
    _plane(svg, image_of("int8_fp8"), left, top + 62 * len(kernels) + 6)
    return svg


def _bar(svg: Svg, name: str, kernel: AttentionSm90, x: float, y: float, unit: float) -> None:
    svg.text(24, y + _H / 2, name, anchor="start", bold=True)
    image = kernel.image
    for part in tile_parts(kernel):
        begin, wide = round(x + part.begin * unit, 1), round((part.end - part.begin) * unit, 1)
        svg.rect(begin, y, wide, _H, _COLOURS[part.name], stroke=CARD, line=0.5 if part.name == "1" else 1)
    for part in tile_parts(kernel):
        if part.what:
            begin = round(x + part.begin * unit, 1)
            operand, _, what = part.what.partition(", ")
            svg.text(begin + 8, y + _H / 2, operand, size=11, anchor="start", bold=True)
            svg.text(begin, y + _H + 10, f"{part.begin}: {what}", size=9, fill=FAINT, anchor="start")
    step = image.tokens * (PLANE_BYTES_PER_ROW if isinstance(image, TileImage) else 128)
    end_of_k = next(part.end for part in tile_parts(kernel) if part.name == "K")
    for edge in range(step, end_of_k, step):
        svg.path(f"M{round(x + edge * unit, 1):g} {y + 1}v5m0 18v5", CARD, 1.5)
    end = x + image.nbytes * unit
    svg.text(round(end + 6, 1), y + _H / 2, f"{image.nbytes} B", size=10, anchor="start", fill=FAINT)


def _plane(svg: Svg, image: TileImage, x: float, y: float) -> None:
    """The last rows of V's first plane: channels in the order of the MMA's columns, then ones."""
    svg.heading(
        x,
        y,
        f"The end of V's first plane: {image.value_rows} rows of {PLANE_BYTES_PER_ROW} bytes, tokens 0–31",
        "cells are 16 bytes and what they hold; coloured by the lane (t) whose accumulator of O it becomes",
    )
    row_bytes, chunk, cell, high = PLANE_BYTES_PER_ROW, 16, 98, 30
    content: dict[int, tuple[str, str, str]] = {}
    for channel in range(image.value_channels):
        for token in range(0, row_bytes, chunk):
            offset = image.v(channel, token)
            column = offset // row_bytes % 8
            content[offset] = f"channel {channel}", f"tokens {token}–{token + chunk - 1}", LANES[column // 2]
    ones = image.ones_offset - image.v_offset
    for byte in range(0, image.sum_rows * row_bytes, chunk):
        content[ones + image.ones(byte, 0)] = "1 1 1 1 …", "", ROWS[5]
    last = image.value_rows * row_bytes
    line = 4 * row_bytes
    first = last - 6 * line
    y += 54
    for group in range(line // chunk):
        svg.text(x + (group + 0.5) * cell, y - 9, f"banks {4 * group}–{4 * group + 3}", size=9, fill=FAINT)
    for offset in range(first, last, chunk):
        what, which, colour = content[offset]
        row, column = divmod(offset - first, line)
        at = x + column // chunk * cell, y + row * high
        svg.rect(*at, cell, high, colour, stroke=CARD)
        svg.text(at[0] + cell / 2, at[1] + (10 if which else high / 2), what, size=10)
        if which:
            svg.text(at[0] + cell / 2, at[1] + 22, which, size=8.5)
        if column == 0:
            svg.text(x - 8, at[1] + high / 2, image.v_offset + offset, size=9, fill=FAINT, anchor="end")
    for offset in range(row_bytes, line, row_bytes):
        svg.path(f"M{x + offset // chunk * cell:g} {y:g}v{6 * high}", INK, 0.75)
