"""S = Q·Kᵀ from INT8 or INT4 operands, dequantised without a conversion instruction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int8, Int32, const_expr, range_constexpr

from .atoms import MmaInt8Op, ldmatrix_atom
from .delta_source import DELTA_BYTES
from .operand_planes import PLANE_BYTES_PER_ROW, a_fragment_row, b_fragment_offset, lane_index
from .ptx import mma_int4
from .tile_image import TILE_TOKENS, StaticLayout, TileImage

__all__ = ["IntegerScores"]

_MAGIC_BITS = 0x4B400000


@dataclass(frozen=True)
class IntegerScores:
    """Scores of one warp's rows with one KV tile: y = c·(q·k), K's scale applied, Q's not yet; or, where Q was
    smoothed, y = row_scale·c·(q·k) + delta with both.

    The accumulators start at 0x4B400000 and are read as float32: 12582912 + S, exact while |S| < 2^22 (INT8 and head
    dim 256 need 127²·256 = 4129024). fma(y, c, -12582912·c) is then S·c rounded once, because c has two zero bits at
    its end: no I2F, which would cost as much of the XU pipe as the 2^x.

    A k step takes the 32 bytes of a plane: 32 dims in INT8; in INT4 64, in the same places of the same registers.

    queries: the 16 bytes of Q that this lane addresses for ldmatrix, m tile 0 and first k step (shared, int8)
    key_row: the same for K, in bytes from the start of the tile's K
    token:   first of the lane's four tokens in every 16
    row_scale: with delta only: float32 (2·m_tiles,), Q's scale of this lane's rows
    delta:   with delta only: this lane's first number of the row of delta, in bytes from the start of the stage
    start:   four int32 registers, all 0x4B400000 in a way the compiler cannot see. With a constant, ptxas keeps one
             register quad, makes D ≠ C and pays for it with moves
    """

    queries: cute.Pointer
    key_row: Int32
    token: Int32
    start: cute.Tensor
    image: cutlass.Constexpr[TileImage]
    m_tiles: cutlass.Constexpr[int]
    plane_bytes: cutlass.Constexpr[int]
    row_scale: cute.Tensor | None = None
    delta: Int32 | None = None

    @staticmethod
    def create(
        queries: cute.Pointer, planes: StaticLayout, warp_row: Int32, opaque_zero: Int32, image: TileImage, m_tiles: int
    ) -> IntegerScores:
        """queries: Q's planes (shared); warp_row: first row of the warp in them; opaque_zero: 0, known at run time."""
        lane = lane_index()
        row, byte = a_fragment_row(lane)
        offset = cute.assume(planes.cute()((warp_row + row, byte)), divby=16)
        start = cute.make_rmem_tensor((4,), Int32)
        for i in range(4):
            start[i] = Int32(_MAGIC_BITS) + opaque_zero * (i + 1)
        plane_bytes = planes.extents()[0] * PLANE_BYTES_PER_ROW
        queries = cute.recast_ptr(queries + offset, dtype=Int8)
        return IntegerScores(queries, b_fragment_offset(), lane % 4 * 4, start, image, m_tiles, plane_bytes)

    def with_delta(self, row_scale: cute.Tensor, block: Int32) -> IntegerScores:
        """These scores with what lies behind the tile image in its stage; ``block``: of the rows of delta there."""
        delta = self.image.nbytes + block * DELTA_BYTES + self.token * 4
        return replace(self, row_scale=row_scale, delta=delta)

    @cute.jit
    def multiply(self, stage: cute.Pointer) -> cute.Tensor:
        """Accumulators of Q·Kᵀ, int32 ((2,2), m tiles, 8 n8 tiles), for the tile image at ``stage`` (shared).

        k outside, n inside: IMMAs that follow one another never wait for one another's accumulator.
        """
        keys = cute.recast_ptr(stage + self.key_row, dtype=Int8) + self.image.k_offset
        load = ldmatrix_atom()
        accumulators = cute.make_rmem_tensor(((2, 2), self.m_tiles, TILE_TOKENS // 8), Int32)
        fragment = cute.make_layout(16)
        for m in range_constexpr(self.m_tiles):
            for n in range_constexpr(TILE_TOKENS // 8):
                for i in range_constexpr(4):
                    accumulators[(i % 2, i // 2), m, n] = self.start[i]
        for k in range_constexpr(self.image.key_bytes // PLANE_BYTES_PER_ROW):
            q = cute.make_rmem_tensor(((4, 2, 2), self.m_tiles), Int8)
            for m in range_constexpr(self.m_tiles):
                row = cute.make_tensor(self.queries + (m * 16 * 32 + k * self.plane_bytes), fragment)
                cute.copy(load, row, cute.make_tensor(q[None, m].iterator, fragment))
            for n in range_constexpr(TILE_TOKENS // 16):
                b = cute.make_rmem_tensor(((4, 2), 2), Int8)
                row = cute.make_tensor(keys + (n * 16 * 32 + k * TILE_TOKENS * 32), fragment)
                cute.copy(load, row, cute.make_tensor(b.iterator, fragment))
                for m in range_constexpr(self.m_tiles):
                    for t in range_constexpr(2):
                        self._multiply(accumulators[None, m, 2 * n + t], q[None, m], b[None, t])
        return accumulators

    def _multiply(self, accumulator: cute.Tensor, q: cute.Tensor, k: cute.Tensor) -> None:
        """accumulator += q·kᵀ of one MMA, from 8 bytes of Q twice and of K once."""
        if const_expr(self.image.keys == "int8"):
            cute.mma_atom_call(cute.make_mma_atom(MmaInt8Op()), accumulator, q, k, accumulator)
            return
        a, b = (cute.recast_tensor(x, Int32) for x in (q, k))
        sums = mma_int4([accumulator[i] for i in range(4)], [a[i] for i in range(4)], [b[i] for i in range(2)])
        for i in range(4):
            accumulator[i] = sums[i]

    @cute.jit
    def dequantise(self, accumulators: cute.Tensor, stage: cute.Pointer, mask: Any) -> Any:
        """Scores y, float32 like ``accumulators``, and this lane's largest in each of its rows.

        stage: the tile image (shared); mask: ScoreMask, or None where every key counts
        """
        offset = cute.assume(self.image.scale_offset + self.token * 4, divby=16)
        scales = cute.recast_ptr(stage + offset, dtype=Float32)
        scores = cute.make_rmem_tensor(accumulators.shape, Float32)
        sums = cute.recast_tensor(accumulators, Float32)
        maxima = [None] * (2 * self.m_tiles)
        four = cute.make_layout(4)
        for group in range_constexpr(TILE_TOKENS // 16):
            c = cute.make_tensor(scales + 16 * group, four).load()
            shift = cute.make_tensor(scales + (16 * group + TILE_TOKENS), four).load()
            if const_expr(self.delta is not None):
                rows = cute.recast_ptr(stage + cute.assume(self.delta, divby=16), dtype=Float32)
                delta = cute.make_tensor(rows + 16 * group, four).load()
            for m in range_constexpr(self.m_tiles):
                for t in range_constexpr(2):
                    for i in range_constexpr(4):
                        e, hi, n, r = i % 2, i // 2, 2 * group + t, 2 * m + i // 2
                        y = cute.math.fma(sums[(e, hi), m, n], c[2 * t + e], shift[2 * t + e])
                        if const_expr(self.delta is not None):
                            y = cute.math.fma(y, self.row_scale[r], delta[2 * t + e])
                        if const_expr(mask is not None):
                            y = mask.apply(y, r, e, n)
                        scores[(e, hi), m, n] = y
                        maxima[r] = y if const_expr(maxima[r] is None) else cute.arch.fmax(maxima[r], y)
        return scores, maxima
