"""Online softmax of a warpgroup's rows with V from an ordinary tensor, which has no rows of ones: sums by additions."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode

from .ptx import unpack_bf16x2, unpack_f16x2
from .running_max import UNSEEN
from .softmax_warpgroup import WarpgroupSoftmax
from .swizzled_tile import BLOCK_CHANNELS, SwizzledTile
from .warpgroup_mma import block_operand, warpgroup_mma

__all__ = ["WarpgroupFloatSoftmax"]


@dataclass(frozen=True)
class WarpgroupFloatSoftmax(WarpgroupSoftmax):
    """State of a warpgroup's rows as in `WarpgroupSoftmax`, with V in float16 or bfloat16.

    Row sums are of the rounded P, too, which takes two instructions a score: the tensor pipe, 16 cycles per 32 scores
    at head dim 128, has the time. They cost bfloat16 nothing in accuracy: with sums of the unrounded P the weights of
    a row would add up to 1 only within 2^-9.

    sums: float32 (2,): this lane's part of its rows' sums, after `finish` all of them
    """

    sums: cute.Tensor

    @staticmethod
    def create(
        stages: cute.Pointer, count: int, stage_bytes: int, tile: SwizzledTile, registers: int, fma_eighths: int
    ) -> WarpgroupFloatSoftmax:
        """Empty state. stages: the ring's, ``count`` of them; registers: of a consumer thread; fma_eighths: 0."""
        # Descriptors know whole blocks and no N, so that the instruction may have N = D of them.
        whole = warpgroup_mma(
            tile.element, tile.element, tile.blocks * BLOCK_CHANNELS, a_in_registers=True, b_major=OperandMajorMode.MN
        )
        thread = whole.get_slice(0)
        v = block_operand(stages, tile.element, tile.columns, count, stage_bytes)
        mma = warpgroup_mma(
            tile.element, tile.element, tile.value_rows, a_in_registers=True, b_major=OperandMajorMode.MN
        )
        output = cute.make_rmem_tensor(((2, 2), 1, tile.value_rows // 8), Float32)
        bias, sums = (cute.make_rmem_tensor((2,), Float32) for _ in range(2))
        output.fill(0.0)
        bias.fill(UNSEEN)
        sums.fill(0.0)
        values: tuple = ((mma, thread.make_fragment_B(thread.partition_B(v))),)
        return WarpgroupFloatSoftmax(values, output, bias, tile, (tile.value_rows,), fma_eighths, sums)

    def _scale(self, r: int, count: Int32, bias: Float32) -> None:
        super()._scale(r, count, bias)
        self.sums[r] = self.sums[r] * ((127 - count) << 23).bitcast(Float32)

    def probabilities(self, scores: cute.Tensor, factors: list[Float32] | None) -> cute.Tensor:
        """As of `WarpgroupSoftmax`; row sums grow by P."""
        p = super().probabilities(scores, factors)
        packed = cute.recast_tensor(p, Int32)
        unpack = unpack_f16x2 if const_expr(self.image.values == "float16") else unpack_bf16x2
        for k in range(self.image.tokens // 16):
            for half in range(2):
                for r in range(2):
                    a, b = unpack(packed[(0, r, half), 0, k])
                    self.sums[r] = self.sums[r] + (a + b)
        return p

    def finish(self) -> None:
        for r in range(2):
            total = self.sums[r]
            for lanes in (1, 2):
                total = total + cute.arch.shuffle_sync_bfly(total, lanes)
            self.sums[r] = total

    def _row_sum(self, r: int) -> Float32:
        return self.sums[r]
