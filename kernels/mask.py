"""Which scores of a KV tile count: hides keys beyond the end of the sequence or above the causal boundary."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from .sequence import SequenceBounds
from .tile_image import StaticLayout

__all__ = ["AnyMask", "PairMask", "ScoreMask"]

_ZERO = 1 << 14
"""What stands for a limit of 0 in 16 bits."""


@dataclass(frozen=True)
class ScoreMask:
    """Hides scores in one lane's accumulator fragment ((2,2), m tiles, n8 tiles) of one KV tile.

    Row r = 2·m + hi of the fragment is query row + 8·r, and sees 8·r·limit_step keys more than row 0: one register
    serves all rows, and every score costs one comparison with a constant and one selection.

    limit:      first token, counted from the lane's own first token of the tile, that row 0 does not see
    limit_step: as in SequenceBounds
    tokens:     (column, n8 tile) of the accumulator -> token of the tile; a lane's columns are 2·(lane%4) + e
    """

    limit: Int32
    limit_step: cutlass.Constexpr[int]
    tokens: cutlass.Constexpr[StaticLayout]

    @staticmethod
    def create(bounds: SequenceBounds, row: Int32, quad_lane: Int32, tokens: StaticLayout) -> ScoreMask:
        """The mask of a tile at position 0. row: query of the fragment's row 0; quad_lane: lane % 4."""
        return ScoreMask(bounds.key_limit(row) - quad_lane * tokens(2, 0), bounds.limit_step, tokens)

    def at(self, tile_begin: Int32) -> ScoreMask:
        """The mask of the tile whose first key has position ``tile_begin``."""
        return ScoreMask(self.limit - tile_begin, self.limit_step, self.tokens)

    def step(self, tokens: int) -> int:
        """What is added to `limit` for a tile that begins ``tokens`` earlier."""
        return tokens

    @cute.jit
    def apply(
        self, score: Float32, r: cutlass.Constexpr[int], e: cutlass.Constexpr[int], n: cutlass.Constexpr[int]
    ) -> Float32:
        """``score``, or -inf if row ``r`` does not see the key of column e in n8 tile ``n``."""
        return score if self.limit > self.tokens(e, n) - 8 * r * self.limit_step else -Float32.inf


@dataclass(frozen=True)
class PairMask:
    """The same for the two rows of a warpgroup's lane where each has a limit of its own: those of packed heads.

    Both are in one register, there is none left for another: 16 bits each, `_ZERO` for 0. They are counted from the
    tile, and never far from it: the limits of a warpgroup's rows lie within 64 tokens, and tiles that need a mask are
    those that hold them.

    limit, tokens: as in ScoreMask
    """

    limit: Int32
    tokens: cutlass.Constexpr[StaticLayout]

    @staticmethod
    def create(
        bounds: SequenceBounds, row: Int32, quad_lane: Int32, tokens: StaticLayout, tile_begin: Int32
    ) -> PairMask:
        """The mask of the tile whose first key has position ``tile_begin``; the others as of ScoreMask."""
        origin = tile_begin + quad_lane * tokens(2, 0) - _ZERO
        low, high = (cutlass.max(bounds.key_limit(row + 8 * r), 0) - origin for r in range(2))
        return PairMask(low | high << 16, tokens)

    def step(self, tokens: int) -> int:
        """What is added to `limit` for a tile that begins ``tokens`` earlier."""
        return tokens << 16 | tokens

    @cute.jit
    def apply(
        self, score: Float32, r: cutlass.Constexpr[int], e: cutlass.Constexpr[int], n: cutlass.Constexpr[int]
    ) -> Float32:
        """``score``, or -inf if row ``r`` does not see the key of column e in n8 tile ``n``."""
        limit = self.limit >> 16 if const_expr(r == 1) else self.limit & 0xFFFF
        return score if limit > self.tokens(e, n) + _ZERO else -Float32.inf


AnyMask = ScoreMask | PairMask
