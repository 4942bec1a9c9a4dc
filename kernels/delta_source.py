"""What smoothing Q took off the scores, on its way to shared memory with the KV tiles that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8

from .atoms import cp_async_atom
from .kv_sources import ImageSource
from .quantize_query import BLOCK_TOKENS
from .tile_image import TILE_TOKENS

__all__ = ["DELTA_BYTES", "DeltaSource"]

DELTA_BYTES = 4 * TILE_TOKENS
"""Of a tile's part of a row of delta, float32."""

_CHUNK = 16


@dataclass(frozen=True)
class DeltaSource:
    """Tile images, and behind each one the tile's part of the CTA's rows of delta: [blocks][64] float32.

    Thread i < 16·blocks moves one more 16-byte chunk a tile than without.

    address: one int64 register: this thread's chunk of the next tile to request
    """

    images: ImageSource
    address: cute.Tensor
    blocks: cutlass.Constexpr[int]

    @staticmethod
    def create(
        images: ImageSource, delta: cute.Tensor, head: Int32, row_begin: Int32, blocks: int, tiles: Int32
    ) -> DeltaSource:
        """delta: float32 [B, Hq, Q blocks, T·64], compact; head: batch·Hq + query head; row_begin: the CTA's first row;
        blocks: rows of delta that it reads; tiles: how many it visits."""
        thread = cute.arch.thread_idx()[0]
        chunks = DELTA_BYTES // _CHUNK
        # The second half of a CTA that ends in the first half's block reads that one again.
        block = cutlass.min(row_begin // BLOCK_TOKENS + thread // chunks, delta.shape[2] - 1)
        row = Int64(head) * delta.shape[2] + block
        first = (delta.iterator + (row * delta.shape[3] + (tiles - 1) * TILE_TOKENS)).toint()
        address = cute.make_rmem_tensor((1,), Int64)
        address[0] = first + thread % chunks * _CHUNK
        return DeltaSource(images, address, blocks)

    def copy(self, ring: cute.Pointer, stage: Int32) -> None:
        """Request the next tile for byte ``stage`` of the ``ring`` (shared), and step to the one before it."""
        self.images.copy(ring, stage)
        self._copy_delta(ring, stage)

    def copy_keys(self, buffer: cute.Pointer) -> None:
        """Request K of the next tile, and delta, for the ``buffer`` (shared)."""
        self.images.copy_keys(buffer)
        self._copy_delta(buffer, Int32(0))

    def copy_values(self, buffer: cute.Pointer) -> None:
        """Request the same tile's V, and step to the one before it."""
        self.images.copy_values(buffer)

    @cute.jit
    def _copy_delta(self, ring: cute.Pointer, stage: Int32) -> None:
        if self.images.thread < self.blocks * (DELTA_BYTES // _CHUNK):
            chunk = cute.make_layout(_CHUNK)
            source = cute.make_ptr(Uint8, self.address[0], cute.AddressSpace.gmem, assumed_align=_CHUNK)
            place = cute.assume(stage + self.images.thread * _CHUNK, divby=_CHUNK) + self.images.tile.nbytes
            cute.copy(cp_async_atom(), cute.make_tensor(source, chunk), cute.make_tensor(ring + place, chunk))
        self.address[0] = self.address[0] - DELTA_BYTES
