"""Rows of ordinary tensors on their way into operand planes: which 16-byte chunks each thread copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, const_expr, range_constexpr

from .operand_planes import PLANE_BYTES_PER_ROW
from .ptx import cp_async_zfill
from .tile_image import StaticLayout

__all__ = ["RowCopy", "row_addresses"]

_CHUNK = 16


def row_addresses(x: cute.Tensor, row: Int32, byte: Int32) -> Callable[[int, int], Int64]:
    """(rows, bytes) further than byte ``byte`` of row ``row`` of x [rows, D] -> address; D contiguous.

    Where rows are one mode they are equally far apart; those of packed heads are looked up one by one.
    """
    element_bytes = x.element_type.width // 8
    if isinstance(x.shape[0], tuple):
        rows = cute.make_layout(x.shape[0], stride=x.stride[0])
        return lambda r, b: x.iterator.toint() + Int64(rows(row + r)) * element_bytes + byte + b
    step = Int64(x.stride[0]) * element_bytes
    start = x.iterator.toint() + row * step + byte
    return lambda r, b: start + r * step + b


@dataclass(frozen=True)
class RowCopy:
    """A block of rows, copied by some threads into `operand_planes`; zeros where the tensor has nothing.

    Rows may be shorter than the planes are wide, in whole chunks. 8·T neighbouring threads copy 4 rows of T planes, T
    being 4 where that divides the planes, else 2: thread i has half i % 2 of row i/2 % 4 in plane (i/2 + i/8) % T. So

    * of each row that they touch they read 32·T neighbouring bytes, whole cache lines with T = 4, and
    * eight threads at a time write 4 rows of one plane, 128 neighbouring bytes: no bank conflicts.

    The other chunks of a thread are whole rows or T planes further. Where they are a multiple of 8 rows apart, a thread
    has one address in shared memory and immediates.

    row, byte: this thread's first chunk
    planes:    (row, byte of the row) -> byte in shared memory
    row_bytes: bytes of a row in the tensor
    """

    row: Int32
    byte: Int32
    planes: cutlass.Constexpr[StaticLayout]
    row_bytes: cutlass.Constexpr[int]
    threads: cutlass.Constexpr[int]

    @staticmethod
    def create(planes: StaticLayout, row_bytes: int, threads: int, thread: Int32 | None = None) -> RowCopy:
        """planes: of a power of two of rows, at least ``threads``/8; row_bytes: a multiple of 16.

        thread: of the ``threads`` that copy together, if they are not the whole CTA
        """
        thread = cute.arch.thread_idx()[0] if thread is None else thread
        together = _planes_together(planes)
        row = thread // 2 % 4 + thread // (8 * together) * 4
        plane = (thread // 2 + thread // 8) % together
        return RowCopy(row, plane * PLANE_BYTES_PER_ROW + thread % 2 * _CHUNK, planes, row_bytes, threads)

    @cute.jit
    def copy(self, target: cute.Pointer, address: Callable[[int, int], Int64], left: Int32) -> None:
        """Request everything for the planes at ``target`` (shared).

        address: (rows, bytes) from this thread's first chunk on -> where in the tensor; left: rows from `row` to the
        tensor's end, those past it are zeros
        """
        rows, plane_bytes = self.planes.extents()
        wide = _planes_together(self.planes) * PLANE_BYTES_PER_ROW
        at_once = self.threads * _CHUNK // wide
        for row in range_constexpr(0, rows, at_once):
            for byte in range_constexpr(0, plane_bytes, wide):
                valid = Int32(_CHUNK) if left > row else Int32(0)
                if const_expr(byte + wide > self.row_bytes):
                    valid = valid if self.byte < self.row_bytes - byte else Int32(0)
                source = cute.make_ptr(Uint8, address(row, byte), cute.AddressSpace.gmem, assumed_align=_CHUNK)
                place = target + (self._place(row, at_once) + byte * rows)
                if const_expr(byte + wide <= plane_bytes):
                    cp_async_zfill(place, source, valid)
                else:
                    if self.byte < plane_bytes - byte:
                        cp_async_zfill(place, source, valid)

    def _place(self, row: int, at_once: int) -> Int32:
        """Byte, in the planes, of this thread's chunk ``row`` rows after its first; ``at_once`` apart."""
        planes = self.planes.cute()
        if const_expr(at_once % 8 == 0):  # the swizzle repeats: one register and immediates
            return planes((self.row, self.byte)) + row * PLANE_BYTES_PER_ROW
        return planes((self.row + row, self.byte))


def _planes_together(planes: StaticLayout) -> int:
    return 2 if planes.extents()[1] // PLANE_BYTES_PER_ROW % 4 else 4
