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

    Row r = 2·m + hi of the fragment is query row + 8·r, and sees 8·r·limit_step keys more than row 0: one register
    serves all rows, and every score costs one comparison with a constant and one selection. Where there is no such step
    each row has a register.

    limits:     first token, counted from the lane's own first token of the tile, that row 0, or each row, does not see
    limit_step: as in SequenceBounds
    tokens:     (column, n8 tile) of the accumulator -> token of the tile; a lane's columns are 2·(lane%4) + e
    """

    limits: tuple[Int32, ...]
    limit_step: cutlass.Constexpr[int | None]
    tokens: cutlass.Constexpr[StaticLayout]

    @staticmethod
    def create(bounds: SequenceBounds, row: Int32, rows: int, quad_lane: Int32, tokens: StaticLayout) -> ScoreMask:
        """The mask of a tile at position 0. row: query of the fragment's row 0, of ``rows``; quad_lane: lane % 4."""
        apart = rows if bounds.limit_step is None else 1
        limits = tuple(bounds.key_limit(row + 8 * r) - quad_lane * tokens(2, 0) for r in range(apart))
        return ScoreMask(limits, bounds.limit_step, tokens)

    def at(self, tile_begin: Int32) -> ScoreMask:
        """The mask of the tile whose first key has position ``tile_begin``."""
        return ScoreMask(tuple(limit - tile_begin for limit in self.limits), self.limit_step, self.tokens)

    @cute.jit
    def apply(
        self, score: Float32, r: cutlass.Constexpr[int], e: cutlass.Constexpr[int], n: cutlass.Constexpr[int]
    ) -> Float32:
        """``score``, or -inf if row ``r`` does not see the key of column e in n8 tile ``n``."""
        limit, further = self._limit(r)
        return score if limit > self.tokens(e, n) - further else -Float32.inf

    def _limit(self, r: int) -> tuple[Int32, int]:
        """The register that serves row ``r``, and how many keys further the row sees."""
        return (self.limits[r], 0) if self.limit_step is None else (self.limits[0], 8 * r * self.limit_step)
