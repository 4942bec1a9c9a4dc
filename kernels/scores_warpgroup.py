"""S = Q·Kᵀ by warpgroup MMAs from operands in INT8 or E4M3, and what turns it into scores in base 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float32, Int8, Int32, const_expr, range_constexpr
from cutlass.cute.nvgpu import warpgroup

from .operand_planes import PLANE_BYTES_PER_ROW, lane_index
from .ptx import opaque
from .row_scales import SMALLEST_FACTOR
from .tile_image import TileImage
from .warpgroup_mma import ROWS, issue_scores, plane_operand, warpgroup_mma

__all__ = ["WarpgroupScores"]

_ELEMENTS = {"int8": Int8, "e4m3": Float8E4M3FN}


@dataclass(frozen=True)
class WarpgroupScores:
    """Scores of a warpgroup's 64 rows with one KV tile. Lane 4·g + t of warp w has rows 16·w + g + 8·r, r = 0 and 1,
    and of every 16 tokens the four 4·t ….

    Scores in base 2 are x = y·factor. With one scale of K for these tokens of a lane, `tokens_share_scale`, y is the
    product q·k as a float and the factor has K's scale and Q's: no multiplication a score. Otherwise y = c·(q·k).

    The int32 sums are converted by I2FP, which sm_90a issues at full rate. With `keeps_integers` they are left as they
    are where nothing but the factor is to be done to them: one scale a lane, and no mask.

    queries, keys: fragments of the MMA: descriptors of Q's planes, and of K's with the stage last
    scales:    shared float32: this lane's first scale of the tile in stage 0
    row_scale: float32 (2,): Q's scale · softmax_scale · log2(e) of this lane's rows, > 0
    """

    mma: cute.TiledMma
    queries: cute.Tensor
    keys: cute.Tensor
    scales: cute.Pointer
    row_scale: cute.Tensor
    image: cutlass.Constexpr[TileImage]
    stage_bytes: cutlass.Constexpr[int]
    tokens_share_scale: cutlass.Constexpr[bool]
    keeps_integers: cutlass.Constexpr[bool]

    @staticmethod
    def create(
        queries: cute.Pointer,
        tiles: cute.Pointer,
        stages: int,
        stage_bytes: int,
        row_scale: cute.Tensor,
        image: TileImage,
        tokens_share_scale: bool,
        keeps_integers: bool = False,
    ) -> WarpgroupScores:
        """queries: planes of the warpgroup's 64 rows (shared); tiles: the ring's stages."""
        element = _ELEMENTS[image.keys]
        mma = warpgroup_mma(element, element, image.tokens)
        thread = mma.get_slice(0)
        count = image.key_bytes // PLANE_BYTES_PER_ROW
        q = plane_operand(queries, element, ROWS, ROWS, count)
        k = plane_operand(tiles + image.k_offset, element, image.tokens, image.tokens, count, stages, stage_bytes)
        place = opaque(lane_index() % 4 * 16)  # in a register: ptxas would spill another one to make it again
        scales = tiles + (image.scale_offset + cute.assume(place, divby=16))
        return WarpgroupScores(
            mma,
            thread.make_fragment_A(thread.partition_A(q)),
            thread.make_fragment_B(thread.partition_B(k)),
            cute.recast_ptr(scales, dtype=Float32),
            row_scale,
            image,
            stage_bytes,
            tokens_share_scale,
            keeps_integers,
        )

    def multiply(self, stage: Int32) -> cute.Tensor:
        """The sums of Q·Kᵀ, int32 or float32 ((2,2), n8 tile), for the tile in ``stage``."""
        sums = self.issue(stage)
        warpgroup.wait_group(0)
        return sums

    def issue(self, stage: Int32, registers: cute.Tensor | None = None) -> cute.Tensor:
        """As `multiply`, but the sums are not there before the next `warpgroup.wait_group`; see `issue_scores`."""
        return issue_scores(self.mma, self.queries, self.keys, stage, self.image.tokens, registers)

    @cute.jit
    def dequantise(self, sums: cute.Tensor, stage: Int32, mask: Any) -> Any:
        """Scores y, float32 ((2,2), n8 tile), this lane's largest in each row, and each row's factor to base 2.

        With `keeps_integers` y are int32 where they can be.

        mask: AnyMask, or None where every key counts
        """
        scales = self.scales + cute.assume(stage * (self.stage_bytes // 4), divby=64)
        if const_expr(self.tokens_share_scale):
            c = scales[0]
            factors = [cute.arch.fmax(self.row_scale[r] * c, Float32(SMALLEST_FACTOR)) for r in range(2)]
        else:
            factors = [self.row_scale[r] for r in range(2)]
        integers = const_expr(self.image.keys == "int8" and self.tokens_share_scale and mask is None)
        largest = [self._largest_integer(sums, r) for r in range(2)] if integers else [None, None]
        element = Int32 if const_expr(integers and self.keeps_integers) else Float32
        scores = cute.make_rmem_tensor(sums.shape, element)
        for group in range_constexpr(self.image.tokens // 16):
            if const_expr(not self.tokens_share_scale):
                c = cute.make_tensor(scales + 16 * group, cute.make_layout(4)).load()
            for t in range_constexpr(2):
                for i in range_constexpr(4):
                    e, r, n = i % 2, i // 2, 2 * group + t
                    y = sums[(e, r), n].to(element)
                    if const_expr(not self.tokens_share_scale):
                        y = y * c[2 * t + e]
                    if const_expr(mask is not None):
                        # Opaque, or LLVM would make every score twice, once for the maximum.
                        y = opaque(mask.apply(y, r, e, n).bitcast(Int32)).bitcast(Float32)
                    scores[(e, r), n] = y
                    if const_expr(not integers):
                        largest[r] = y if const_expr(largest[r] is None) else cute.arch.fmax(largest[r], y)
        return scores, largest, factors

    def _largest_integer(self, sums: cute.Tensor, r: int) -> Float32:
        """The largest of row ``r``: of integers, sm_90a compares three at a time."""
        largest = sums[(0, r), 0]
        for n in range(self.image.tokens // 8):
            for e in range(2):
                largest = cutlass.max(largest, sums[(e, r), n])
        return largest.to(Float32)
