"""64 keys and values in 16-bit floats as they lie in shared memory when they come from ordinary tensors."""

from __future__ import annotations

from dataclasses import dataclass

from .operand_planes import PLANE_BYTES_PER_ROW, operand_planes
from .tile_image import TILE_TOKENS, StaticLayout

__all__ = ["RowTile"]


@dataclass(frozen=True)
class RowTile:
    """Layout of one KV tile: K, then V, both as planes of 16 channels, [⌈D/16⌉][64 tokens][32 B] (`operand_planes`).

    Tokens and channels are in natural order. ldmatrix reads K's fragments as they lie and V's transposed. Where D is no
    multiple of 16, half of the last plane is zeros.

    head_dim: D, a multiple of 8. All offsets are bytes from the start of the tile, which is 256-byte aligned.
    """

    head_dim: int

    @property
    def value_channels(self) -> int:
        """D rounded up to whole planes."""
        return -(-self.head_dim // 16) * 16

    @property
    def key_dims(self) -> int:
        """The same of K."""
        return self.value_channels

    @property
    def key_bytes(self) -> int:
        """Bytes of a row of K in its planes."""
        return 2 * self.value_channels

    @property
    def k_offset(self) -> int:
        return 0

    @property
    def v_offset(self) -> int:
        return TILE_TOKENS * self.key_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of one tile: 256·D, D rounded up to 16."""
        return 2 * self.v_offset

    @property
    def planes(self) -> StaticLayout:
        """(token, byte of the row) -> byte from `k_offset` or `v_offset`."""
        return operand_planes(TILE_TOKENS, self.key_bytes)

    values_transposed = False
    output_run = 2
    """Neighbouring channels of the output that a lane holds."""

    def value_fragment(self, n: int, k: int) -> int:
        """Byte from `v_offset` of the first row of tokens 16·k …, in the plane of channels 16·n …."""
        return n * TILE_TOKENS * PLANE_BYTES_PER_ROW + k * 16 * PLANE_BYTES_PER_ROW

    @property
    def score_tokens(self) -> StaticLayout:
        """(column, n8 tile) of the Q·Kᵀ accumulator -> token."""
        return StaticLayout((8, TILE_TOKENS // 8), (1, 8))

    @property
    def output_channels(self) -> StaticLayout:
        """(column, n8 tile) of the P·V accumulator -> channel."""
        return StaticLayout((8, self.value_channels // 8), (1, 8))
