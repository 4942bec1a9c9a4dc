"""Operands of wgmma in shared memory: the canonical layouts of the PTX ISA, and ours in their words."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cute_attn.kernels.operand_planes import PLANE_BYTES_PER_ROW, operand_planes
from cute_attn.kernels.swizzled_tile import SwizzledTile
from cute_attn.kernels.tile_image import VALUE_BYTES, StaticLayout
from cute_attn.kernels.warpgroup_mma import ROWS

from ..banks import conflict_ways
from .kernels import image_of, kernel_of

__all__ = ["CORE_ROWS", "Operand", "canonical", "conflicts", "core_phases", "operands"]

CORE_ROWS = 8
"""Rows of a core matrix, each 16 bytes."""

_CHUNK = 16


def canonical(operand: Operand) -> StaticLayout:
    """(row, byte along the contiguous axis) of one instruction's operand -> byte, as the PTX ISA has it.

    "Asynchronous warpgroup level matrix shared memory layout", strides in bytes: with a swizzle of W bytes, eight rows
    of W bytes follow one another, groups of eight are `stride` apart, and blocks of W bytes along a row `leading`.
    Rows are m or n, and the contiguous axis k, if K-major; the other way round if MN-major.
    """
    width = operand.swizzle_bytes
    blocks = -(-operand.contiguous_bytes // width)
    inside = min(width, operand.contiguous_bytes)
    bits = {32: 1, 128: 3}[width]
    return StaticLayout(
        ((CORE_ROWS, operand.rows // CORE_ROWS), (inside, blocks)),
        ((width, operand.stride), (1, operand.leading)),
        (bits, 4, 3),
    )


@dataclass(frozen=True)
class Operand:
    """An operand of one wgmma in shared memory.

    layout: (row, byte along the contiguous axis) -> byte from the operand's start, of all instructions' steps of k;
            rows and the contiguous axis as in `canonical`
    rows, contiguous_bytes: of one instruction
    stride, leading: bytes, of a descriptor; leading 0: not used
    starts: first byte of each instruction's operand, before the swizzle, from the start of the operand
    """

    name: str
    major: str
    swizzle_bytes: int
    layout: StaticLayout
    rows: int
    contiguous_bytes: int
    stride: int
    leading: int
    starts: tuple[int, ...]


def bytes_of(layout: StaticLayout, size: int) -> StaticLayout:
    """(row, element) -> element of ``size`` bytes, as (row, byte) -> byte. The swizzle is on bytes already."""

    def scaled(stride: int | tuple, by: int) -> int | tuple:
        return tuple(scaled(s, by) for s in stride) if isinstance(stride, tuple) else stride * by

    (rows, along), (row_strides, along_strides) = layout.shape, layout.stride
    assert isinstance(along, tuple) and isinstance(along_strides, tuple) and along_strides[0] == 1
    return StaticLayout(
        (rows, (along[0] * size, *along[1:])),
        (scaled(row_strides, size), (1, *(scaled(s, size) for s in along_strides[1:]))),
        layout.swizzle,
    )


def _plane_operand(name: str, rows: int, count: int) -> Operand:
    """In planes of 32 bytes a row: a plane is one instruction's k."""
    layout = operand_planes(rows, count * PLANE_BYTES_PER_ROW)
    flat = replace(layout, swizzle=None)
    starts = tuple(flat(0, i * PLANE_BYTES_PER_ROW) for i in range(count))
    return Operand(name, "K", PLANE_BYTES_PER_ROW, layout, rows, PLANE_BYTES_PER_ROW, flat(8, 0), 0, starts)


def operands() -> tuple[Operand, ...]:
    """Of the recipes with passports; Q of both lies in planes."""
    image, kernel = image_of("int8_fp8"), kernel_of("bf16")
    tile = kernel.image
    assert isinstance(tile, SwizzledTile)
    planes = image.tokens * VALUE_BYTES[image.values] // PLANE_BYTES_PER_ROW
    rows, columns = bytes_of(tile.rows, 2), replace(tile.columns, swizzle=None)
    swizzle = tile.block.swizzle
    # V's rows are tokens, k, and its contiguous axis channels, n: the layout with its modes exchanged.
    v = bytes_of(StaticLayout(columns.shape[::-1], columns.stride[::-1]), 2)
    return (
        _plane_operand("`int8_fp8` Q", ROWS, image.key_bytes // PLANE_BYTES_PER_ROW),
        _plane_operand("`int8_fp8` K", image.tokens, image.key_bytes // PLANE_BYTES_PER_ROW),
        _plane_operand("`int8_fp8` Vᵀ and ones", image.value_rows, planes),
        _plane_operand("`bf16` Q", ROWS, tile.key_bytes // PLANE_BYTES_PER_ROW),
        Operand("`bf16` K", "K", 128, replace(rows, swizzle=swizzle), tile.tokens, 32, rows(8, 0), 0,
                tuple(rows(0, byte) for byte in range(0, 2 * tile.head_dim, 32))),
        Operand("`bf16` V", "MN", 128, replace(v, swizzle=swizzle), 16, 2 * tile.value_channels, v(8, 0), v(0, 128),
                tuple(v(token, 0) for token in range(0, tile.tokens, 16))),
    )  # fmt: skip


def core_phases(operand: Operand) -> list[list[int]]:
    """Offsets of the eight 16-byte rows of every core matrix."""
    rows, along = operand.layout.extents()
    return [
        [operand.layout(first + i, byte) for i in range(CORE_ROWS)]
        for first in range(0, rows, CORE_ROWS)
        for byte in range(0, along, _CHUNK)
    ]


def conflicts(operand: Operand) -> int:
    """Most rows of a core matrix that share four banks."""
    return max(conflict_ways(phase) for phase in core_phases(operand))
