"""S = Q·Kᵀ from 16-bit floats, or from E4M3 with scales, accumulated in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float32, Int32, const_expr, range_constexpr

from .atoms import ldmatrix_atom, mma_float_op
from .operand_planes import PLANE_BYTES_PER_ROW, a_fragment_row, b_fragment_offset, lane_index
from .row_tile import RowTile
from .tile_image import TILE_TOKENS, StaticLayout, TileImage

__all__ = ["FloatScores"]


@dataclass(frozen=True)
class FloatScores:
    """Scores of one warp's rows with one KV tile: y = q·k; of E4M3 y = c·(q·k), K's scale applied, Q's not yet.

    A k step takes the 32 bytes of a plane: 16 dims of 16 bits, 32 of E4M3.

    queries: the 16 bytes of Q that this lane addresses for ldmatrix, m tile 0 and first k step (shared)
    key_row: the same for K, in bytes from the start of the tile's K
    image:   a tile of rows, or, of E4M3, a tile image, whose scales are in the order that `IntegerScores` finds them in
    element: type of Q and K
    """

    queries: cute.Pointer
    key_row: Int32
    image: cutlass.Constexpr[RowTile | TileImage]
    m_tiles: cutlass.Constexpr[int]
    plane_bytes: cutlass.Constexpr[int]
    element: cutlass.Constexpr[Any]

    @staticmethod
    def create(
        queries: cute.Pointer,
        planes: StaticLayout,
        warp_row: Int32,
        opaque_zero: Int32,
        image: RowTile | TileImage,
        m_tiles: int,
        element: Any,
    ) -> FloatScores:
        """queries: Q's planes (shared); warp_row: first row of the warp in them; element: type of Q and K."""
        row, byte = a_fragment_row(lane_index())
        offset = cute.assume(planes.cute()((warp_row + row, byte)), divby=16)
        plane_bytes = planes.extents()[0] * PLANE_BYTES_PER_ROW
        queries = cute.recast_ptr(queries + offset, dtype=element)
        return FloatScores(queries, b_fragment_offset(), image, m_tiles, plane_bytes, element)

    @cute.jit
    def multiply(self, stage: cute.Pointer) -> cute.Tensor:
        """Accumulators of Q·Kᵀ, float32 ((2,2), m tiles, 8 n8 tiles), for the tile at ``stage`` (shared)."""
        size, word = self.element.width // 8, 32 // self.element.width
        row_elements = PLANE_BYTES_PER_ROW // size
        keys = cute.recast_ptr(stage + self.key_row, dtype=self.element) + self.image.k_offset // size
        mma = cute.make_mma_atom(mma_float_op(self.element, Float32))
        load = ldmatrix_atom(self.element)
        accumulators = cute.make_rmem_tensor(((2, 2), self.m_tiles, TILE_TOKENS // 8), Float32)
        accumulators.fill(0.0)
        fragment = cute.make_layout(4 * word)
        for k in range_constexpr(self.image.key_bytes // PLANE_BYTES_PER_ROW):
            q = cute.make_rmem_tensor(((word, 2, 2), self.m_tiles), self.element)
            for m in range_constexpr(self.m_tiles):
                row = cute.make_tensor(
                    self.queries + (m * 16 * row_elements + k * (self.plane_bytes // size)), fragment
                )
                cute.copy(load, row, cute.make_tensor(q[None, m].iterator, fragment))
            for n in range_constexpr(TILE_TOKENS // 16):
                b = cute.make_rmem_tensor(((word, 2), 2), self.element)
                row = cute.make_tensor(keys + (n * 16 + k * TILE_TOKENS) * row_elements, fragment)
                cute.copy(load, row, cute.make_tensor(b.iterator, fragment))
                for m in range_constexpr(self.m_tiles):
                    for t in range_constexpr(2):
                        acc = accumulators[None, m, 2 * n + t]
                        cute.mma_atom_call(mma, acc, q[None, m], b[None, t], acc)
        return accumulators

    @cute.jit
    def dequantise(self, accumulators: cute.Tensor, stage: cute.Pointer, mask: Any) -> Any:
        """Scores y, float32 like ``accumulators``, and this lane's largest in each of its rows.

        stage: the tile image (shared), of which E4M3 needs the scales; mask: ScoreMask, or None where every key counts
        """
        scores = cute.make_rmem_tensor(accumulators.shape, Float32)
        maxima = [None] * (2 * self.m_tiles)
        for n in range_constexpr(TILE_TOKENS // 8):
            if const_expr(self.element is Float8E4M3FN and n % 2 == 0):
                c = self._scales(stage, n // 2)
            for m in range_constexpr(self.m_tiles):
                for i in range_constexpr(4):
                    e, hi, r = i % 2, i // 2, 2 * m + i // 2
                    y = accumulators[(e, hi), m, n]
                    if const_expr(self.element is Float8E4M3FN):
                        y = y * c[n % 2 * 2 + e]
                    if const_expr(mask is not None):
                        y = mask.apply(y, r, e, n)
                    scores[(e, hi), m, n] = y
                    maxima[r] = y if const_expr(maxima[r] is None) else cute.arch.fmax(maxima[r], y)
        return scores, maxima

    def _scales(self, stage: cute.Pointer, group: int) -> cute.TensorSSA:
        """K's scales of this lane's four tokens of 16: element 2·t + e is that of column e in n8 tile t."""
        offset = cute.assume(self.image.scale_offset + lane_index() % 4 * 16, divby=16)
        scales = cute.recast_ptr(stage + offset, dtype=Float32)
        return cute.make_tensor(scales + 16 * group, cute.make_layout(4)).load()
