"""Which keys a block of query rows sees: the one place that knows lengths and the shape of the causal boundary."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import Int32

__all__ = ["SequenceBounds"]


@dataclass(frozen=True)
class SequenceBounds:
    """Lengths of one sequence, in tokens, and the query rows [row_begin, row_begin + rows) of one CTA.

    rows, tile_tokens: query rows of the CTA, keys of a KV tile

    Query i sees the keys below `key_limit(i)`: all of them, or if `causal` those up to i + seq_k - seq_q, so that the
    last query sees the last key. Tiles are visited from `tiles() - 1` down to 0; those from `full_tiles()` on need a
    mask, the others are seen whole by every row of the CTA.
    """

    seq_q: Int32
    seq_k: Int32
    row_begin: Int32
    rows: cutlass.Constexpr[int]
    tile_tokens: cutlass.Constexpr[int]
    causal: cutlass.Constexpr[bool]

    @property
    def limit_step(self) -> int:
        """How much further a query sees than the one before it."""
        return 1 if self.causal else 0

    def key_limit(self, row: Int32) -> Int32:
        """Keys [0, limit) are visible to query ``row`` < seq_q; may be negative: none."""
        return row + 1 + (self.seq_k - self.seq_q) if self.causal else self.seq_k

    def tiles(self) -> Int32:
        """KV tiles of which some row of the CTA sees some key."""
        last_row = cutlass.min(self.row_begin + self.rows, self.seq_q) - 1
        keys = cutlass.max(self.key_limit(last_row), 0)
        return (keys + (self.tile_tokens - 1)) // self.tile_tokens

    def full_tiles(self) -> Int32:
        """KV tiles of which every row of the CTA sees every key."""
        return cutlass.max(self.key_limit(self.row_begin), 0) // self.tile_tokens
