"""Which scores of a KV tile count: hides keys beyond the end of the sequence or above the causal boundary."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from .sequence import SequenceBounds
from .tile_image import StaticLayout

__all__ = ["ScoreMask"]


@dataclass(frozen=True)
class ScoreMask:
    """Hides scores in one lane's accumulator fragment ((2,2), m tiles, n8 tiles) of one KV tile.

    limits: for row r = 2·m + hi of the fragment, the first token, relative to the lane's own first token in the tile,
            that the row does not see
    tokens: (column, n8 tile) of the accumulator -> token of the tile; a lane's columns are 2·(lane%4) + e
    """

    limits: list[Int32]
    tokens: cutlass.Constexpr[StaticLayout]

    @staticmethod
    def create(
        bounds: SequenceBounds, row: Int32, rows: int, quad_lane: Int32, tile_begin: Int32, tokens: StaticLayout
    ) -> ScoreMask:
        """row: query of the fragment's row 0; rows: rows per lane; tile_begin: position of the tile's first key."""
        first_token = tile_begin + quad_lane * tokens(2, 0)
        return ScoreMask([bounds.key_limit(row + 8 * r) - first_token for r in range(rows)], tokens)

    @cute.jit
    def apply(
        self, score: Float32, r: cutlass.Constexpr[int], e: cutlass.Constexpr[int], n: cutlass.Constexpr[int]
    ) -> Float32:
        """``score``, or -inf if row ``r`` does not see the key of column e in n8 tile ``n``."""
        return score if self.tokens(e, n) < self.limits[r] else -Float32.inf
