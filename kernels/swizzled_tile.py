"""128 keys and values in 16-bit floats as TMA brings them from ordinary tensors to the warpgroup MMAs of sm_90a."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cutlass import BFloat16, Float16

from .tile_image import StaticLayout

__all__ = ["BLOCK_CHANNELS", "SwizzledTile"]

BLOCK_CHANNELS = 64
"""Channels of a row of 128 bytes, the widest swizzle."""

_ELEMENTS = {"float16": Float16, "bfloat16": BFloat16}


@dataclass(frozen=True)
class SwizzledTile:
    """Layout of one KV tile: K, then V, both as blocks of 64 channels, [⌈D/64⌉][128 tokens][128 B], Swizzle<3,4,3>.

    Tokens and channels are in natural order. In the words of the PTX ISA ("Asynchronous warpgroup level matrix shared
    memory layout") K lies K-major and V MN-major with the 128-byte swizzle: eight tokens of a block are one core of
    1024 bytes. What lies behind D in the last block is zeros, which no instruction reads but up to whole 16 channels
    of K.

    head_dim: D, a multiple of 8. values: "float16" or "bfloat16", the format of all operands. K and V are 1024-byte
    aligned.
    """

    head_dim: int
    values: str
    tokens: int = 128

    @property
    def element(self) -> Any:
        """Type of Q, K and V."""
        return _ELEMENTS[self.values]

    @property
    def blocks(self) -> int:
        """Blocks of K, and of V."""
        return -(-self.head_dim // BLOCK_CHANNELS)

    @property
    def key_dims(self) -> int:
        """D rounded up to whole steps of 16 of the MMA's k."""
        return -(-self.head_dim // 16) * 16

    @property
    def key_bytes(self) -> int:
        """Bytes of a row of Q in its planes (`operand_planes`)."""
        return 2 * self.key_dims

    @property
    def value_channels(self) -> int:
        """D: N of the MMA is any multiple of 8."""
        return self.head_dim

    value_rows = value_channels
    sum_rows = 0
    output_run = 2
    """Neighbouring channels of the output that a lane holds."""

    @property
    def operand_bytes(self) -> int:
        """Bytes of K, and of V."""
        return self.blocks * self.tokens * BLOCK_CHANNELS * 2

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return 2 * self.operand_bytes

    @property
    def block(self) -> StaticLayout:
        """(token, channel) of a block -> element: what one TMA copy writes."""
        return StaticLayout((self.tokens, BLOCK_CHANNELS), (BLOCK_CHANNELS, 1), (3, 4, 3))

    @property
    def rows(self) -> StaticLayout:
        """(token, channel) -> element of all blocks, before the swizzle: K as B operand of Q·Kᵀ."""
        width = BLOCK_CHANNELS
        return StaticLayout(
            ((8, self.tokens // 8), (width, self.blocks)), ((width, 8 * width), (1, self.tokens * width))
        )

    @property
    def columns(self) -> StaticLayout:
        """(channel, token) -> element: V as B operand of P·V."""
        rows = self.rows
        return StaticLayout(rows.shape[::-1], rows.stride[::-1])

    @property
    def score_tokens(self) -> StaticLayout:
        """(column, n8 tile) of the Q·Kᵀ accumulator -> token."""
        return StaticLayout((8, self.tokens // 8), (1, 8))

    @property
    def output_channels(self) -> StaticLayout:
        """(column, n8 tile) of the P·V accumulator -> channel."""
        return StaticLayout((8, self.value_channels // 8), (1, 8))
