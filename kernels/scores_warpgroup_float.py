"""S = Q·Kᵀ by warpgroup MMAs from 16-bit floats, accumulated in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr, range_constexpr
from cutlass.cute.nvgpu import warpgroup

from .operand_planes import PLANE_BYTES_PER_ROW
from .swizzled_tile import SwizzledTile
from .warpgroup_mma import ROWS, block_operand, issue_scores, plane_operand, warpgroup_mma

__all__ = ["WarpgroupFloatScores"]


@dataclass(frozen=True)
class WarpgroupFloatScores:
    """Scores of a warpgroup's 64 rows with one KV tile: y = q·k, x = y·row_scale. Lane 4·g + t of warp w has rows
    16·w + g + 8·r, r = 0 and 1, and of every 8 tokens 2·t and 2·t + 1.

    queries, keys: fragments of the MMA: descriptors of Q's planes, and of K's blocks with the stage last
    row_scale: float32 (2,): softmax_scale · log2(e), > 0
    """

    mma: cute.TiledMma
    queries: cute.Tensor
    keys: cute.Tensor
    row_scale: cute.Tensor
    tile: cutlass.Constexpr[SwizzledTile]

    @staticmethod
    def create(
        queries: cute.Pointer,
        stages: cute.Pointer,
        count: int,
        stage_bytes: int,
        row_scale: cute.Tensor,
        tile: SwizzledTile,
        tokens_share_scale: bool,
    ) -> WarpgroupFloatScores:
        """queries: planes of the warpgroup's 64 rows (shared); stages: the ring's."""
        mma = warpgroup_mma(tile.element, tile.element, tile.tokens)
        thread = mma.get_slice(0)
        q = plane_operand(queries, tile.element, ROWS, ROWS, tile.key_bytes // PLANE_BYTES_PER_ROW)
        k = block_operand(stages, tile.element, tile.rows, count, stage_bytes)
        return WarpgroupFloatScores(
            mma,
            thread.make_fragment_A(thread.partition_A(q)),
            thread.make_fragment_B(thread.partition_B(k)),
            row_scale,
            tile,
        )

    def multiply(self, stage: Int32) -> cute.Tensor:
        """The sums of Q·Kᵀ, float32 ((2,2), n8 tile), for K in ``stage``."""
        sums = self.issue(stage)
        warpgroup.wait_group(0)
        return sums

    def issue(self, stage: Int32, registers: cute.Tensor | None = None) -> cute.Tensor:
        """As `multiply`, but the sums are not there before the next `warpgroup.wait_group`; see `issue_scores`."""
        return issue_scores(self.mma, self.queries, self.keys, stage, self.tile.tokens, registers)

    @cute.jit
    def dequantise(self, sums: cute.Tensor, stage: Int32, mask: Any) -> Any:
        """Scores y, float32 ((2,2), n8 tile), this lane's largest in each row, and each row's factor to base 2.

        mask: AnyMask, or None where every key counts
        """
        scores = cute.make_rmem_tensor(sums.shape, Float32)
        largest = [None, None]
        for n in range_constexpr(self.tile.tokens // 8):
            for i in range_constexpr(4):
                e, r = i % 2, i // 2
                y = sums[(e, r), n]
                if const_expr(mask is not None):
                    y = mask.apply(y, r, e, n)
                scores[(e, r), n] = y
                largest[r] = y if const_expr(largest[r] is None) else cute.arch.fmax(largest[r], y)
        return scores, largest, [self.row_scale[r] for r in range(2)]
