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
    group: query heads whose rows are packed: row p is token p // group. None: a row is a token

    The query at token i sees the keys below its `key_limit`: all of them, or if `causal` those up to i + seq_k - seq_q,
    so that the last query sees the last key. Tiles are visited from `tiles() - 1` down to 0; those from `full_tiles()`
    on need a mask, the others are seen whole by every row of the CTA.
    """

    seq_q: Int32
    seq_k: Int32
    row_begin: Int32
    rows: cutlass.Constexpr[int]
    tile_tokens: cutlass.Constexpr[int]
    causal: cutlass.Constexpr[bool]
    group: Int32 | None = None

    @property
    def all_rows(self) -> Int32:
        """Query rows of the head, or of the heads that are packed."""
        return self.seq_q if self.group is None else self.seq_q * self.group

    @property
    def limit_step(self) -> int | None:
        """How much further a row sees than the one before it; None if that depends on the row."""
        if not self.causal:
            return 0
        return 1 if self.group is None else None

    def key_limit(self, row: Int32) -> Int32:
        """Keys [0, limit) are visible to query ``row`` < `all_rows`; may be negative: none."""
        token = row if self.group is None else row // self.group
        return token + 1 + (self.seq_k - self.seq_q) if self.causal else self.seq_k

    def tiles(self) -> Int32:
        """KV tiles of which some row of the CTA sees some key."""
        last_row = cutlass.min(self.row_begin + self.rows, self.all_rows) - 1
        keys = cutlass.max(self.key_limit(last_row), 0)
        return (keys + (self.tile_tokens - 1)) // self.tile_tokens

    def full_tiles(self) -> Int32:
        """KV tiles of which every row of the CTA sees every key."""
        return cutlass.max(self.key_limit(self.row_begin), 0) // self.tile_tokens
