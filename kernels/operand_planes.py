"""Q, K and V in shared memory: planes of 32 bytes per row, as ldmatrix reads them into the 8-bit MMA's fragments."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32

from .tile_image import StaticLayout

__all__ = [
    "PLANE_BYTES_PER_ROW",
    "a_fragment_row",
    "b_fragment_offset",
    "b_fragment_row",
    "lane_index",
    "operand_planes",
    "transposed_b_fragment_offset",
]

PLANE_BYTES_PER_ROW = 32
"""One k step of mma.m16n8k32 in 8-bit elements."""


def lane_index() -> Int32:
    """Lane of a thread in a one-dimensional CTA."""
    return cute.arch.thread_idx()[0] % 32


def operand_planes(rows: int, row_bytes: int) -> StaticLayout:
    """(row, byte of the row) -> byte: [row_bytes/32][rows][32], the 16-byte halves of a row swapped where row & 4.

    Stepping by 8 rows or by a plane moves every byte by the same distance, so that one register per operand and lane,
    plus immediates, addresses all of its fragments. The eight rows of an ldmatrix phase lie in eight different groups
    of four banks. K and V in a tile image are in this layout already, rows permuted (`TileImage.k`, `TileImage.v`).
    """
    row = PLANE_BYTES_PER_ROW
    return StaticLayout((rows, (row, row_bytes // row)), (row, (1, rows * row)), (1, 4, 3))


def a_fragment_row(lane: Int32) -> tuple[Int32, Int32]:
    """(row, byte) of the 16 bytes whose address this lane gives to ldmatrix.x4 for a 16 by 32-byte A fragment."""
    return lane % 16, lane // 16 * 16


def b_fragment_row(lane: Int32) -> tuple[Int32, Int32]:
    """The same for two neighbouring 8 by 32-byte B fragments, the first in registers 0 and 1, the second in 2 and 3."""
    return lane % 8 + lane // 16 * 8, lane // 8 % 2 * 16


def b_fragment_offset() -> Int32:
    """Byte, in planes of any number of rows, of what this lane addresses for two B fragments."""
    row, byte = b_fragment_row(lane_index())
    return cute.assume(operand_planes(16, PLANE_BYTES_PER_ROW).cute()((row, byte)), divby=16)


def transposed_b_fragment_offset() -> Int32:
    """The same where a plane's row is one k with 16 columns, for ldmatrix.x4.trans: k of 16 bits each."""
    row, byte = a_fragment_row(lane_index())
    return cute.assume(operand_planes(16, PLANE_BYTES_PER_ROW).cute()((row, byte)), divby=16)
