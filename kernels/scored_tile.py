"""Where a warpgroup keeps the scores of a tile from one visit to the next, if products overlap with the softmax."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Float32, Int32

__all__ = ["ScoredTile"]


@dataclass(frozen=True)
class ScoredTile:
    """The tile whose scores a lane has, and whose P and P·V are next.

    scores:  float32 ((2,2), n8 tile), masked; factors: float32 (2,), as of ``dequantise``
    stage:   int32 (1,), of the ring; -1 if there is no tile
    """

    scores: cute.Tensor
    factors: cute.Tensor
    stage: cute.Tensor

    @staticmethod
    def create(tokens: int) -> ScoredTile:
        """None yet."""
        scores = cute.make_rmem_tensor(((2, 2), tokens // 8), Float32)
        factors = cute.make_rmem_tensor((2,), Float32)
        stage = cute.make_rmem_tensor((1,), Int32)
        scores.fill(0.0)
        factors.fill(0.0)
        stage.fill(-1)
        return ScoredTile(scores, factors, stage)

    def set(self, scores: cute.Tensor, factors: list[Float32], stage: Int32) -> None:
        """The next one."""
        for i in range(cute.size(scores)):
            self.scores[i] = scores[i]
        for r in range(2):
            self.factors[r] = factors[r]
        self.stage[0] = stage

    def row_factors(self) -> list[Float32]:
        return [self.factors[r] for r in range(2)]
