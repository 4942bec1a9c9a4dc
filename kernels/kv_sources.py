"""Where a CTA's KV tiles come from: what a thread copies to shared memory for the next one."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, const_expr, range_constexpr

from .atoms import cp_async_atom
from .row_copy import RowCopy
from .row_tile import RowTile
from .tile_image import TILE_TOKENS, TileImage

__all__ = ["ImageSource", "RowSource"]

_CHUNK = 16


@dataclass(frozen=True)
class ImageSource:
    """Whole tile images, contiguous in global memory.

    Thread i moves the 16-byte chunks i, i + threads, …, to the same offsets they come from, so that a whole tile costs
    a thread one source address, one destination address and immediates.

    address: one int64 register: this thread's first chunk of the next tile to request
    """

    address: cute.Tensor
    thread: Int32
    tile: cutlass.Constexpr[TileImage]
    threads: cutlass.Constexpr[int]

    @staticmethod
    def create(
        image: cute.Tensor, v_scale: cute.Tensor, head: Int32, tiles: Int32, seq_k: Int32, tile: TileImage, threads: int
    ) -> ImageSource:
        """image: uint8 [B, Hkv, T, bytes], compact; head: batch·Hkv + KV head; tiles: how many the CTA visits."""
        thread = cute.arch.thread_idx()[0]
        address = cute.make_rmem_tensor((1,), Int64)
        last_tile = Int64(head) * image.shape[2] + (tiles - 1)
        address[0] = (image.iterator + last_tile * tile.nbytes).toint() + Int64(thread * _CHUNK)
        return ImageSource(address, thread, tile, threads)

    def copy(self, ring: cute.Pointer, stage: Int32) -> None:
        """Request the next tile for byte ``stage`` of the ``ring`` (shared), and step to the one before it."""
        self._copy_bytes(ring, stage, 0, self.tile.nbytes)
        self.address[0] = self.address[0] - self.tile.nbytes

    def copy_keys(self, buffer: cute.Pointer) -> None:
        """Request K and its scales of the next tile for the ``buffer`` (shared)."""
        self._copy_bytes(buffer, Int32(0), self.tile.k_offset, self.tile.v_offset)
        self._copy_bytes(buffer, Int32(0), self.tile.scale_offset, self.tile.nbytes)

    def copy_values(self, buffer: cute.Pointer) -> None:
        """Request the same tile's V, and step to the one before it."""
        self._copy_bytes(buffer, Int32(0), self.tile.v_offset, self.tile.scale_offset)
        self.address[0] = self.address[0] - self.tile.nbytes

    @cute.jit
    def _copy_bytes(self, ring: cute.Pointer, stage: Int32, begin: int, end: int) -> None:
        """Bytes [begin, end) of the tile to the same ones from byte ``stage`` of the ``ring`` on."""
        source = cute.make_ptr(Uint8, self.address[0], cute.AddressSpace.gmem, assumed_align=_CHUNK)
        target = ring + cute.assume(stage + self.thread * _CHUNK, divby=_CHUNK)
        atom = cp_async_atom()
        chunks = (end - begin) // _CHUNK
        rounds = chunks // self.threads
        for i in range_constexpr(rounds):
            self._copy_chunk(atom, source, target, begin + i * self.threads * _CHUNK)
        if const_expr(chunks % self.threads != 0):  # noqa: SIM102 (decided while tracing, the inner one is not)
            if self.thread < chunks % self.threads:
                self._copy_chunk(atom, source, target, begin + rounds * self.threads * _CHUNK)

    def _copy_chunk(self, atom: cute.CopyAtom, source: cute.Pointer, target: cute.Pointer, offset: int) -> None:
        chunk = cute.make_layout(_CHUNK)
        cute.copy(atom, cute.make_tensor(source + offset, chunk), cute.make_tensor(target + offset, chunk))


@dataclass(frozen=True)
class RowSource:
    """Rows of K and V in 16-bit floats from ordinary tensors, into the planes of a `RowTile`; zeros past the end.

    address: two int64 registers: this thread's first chunk of the next tile, in K and in V
    step:    two int64 registers: bytes from one token to the next, in K and in V
    left:    one int32 register: tokens from that chunk's to the end of the sequence
    """

    address: cute.Tensor
    step: cute.Tensor
    left: cute.Tensor
    rows: RowCopy
    tile: cutlass.Constexpr[RowTile]

    @staticmethod
    def create(
        k: cute.Tensor, v: cute.Tensor, head: Int32, tiles: Int32, seq_k: Int32, tile: RowTile, threads: int
    ) -> RowSource:
        """k, v: [B, Hkv, Sk, D], rows aligned to 16 bytes; head: batch·Hkv + KV head; tiles: that the CTA visits."""
        rows = RowCopy.create(tile.planes, 2 * tile.head_dim, threads)
        address, step = cute.make_rmem_tensor((2,), Int64), cute.make_rmem_tensor((2,), Int64)
        left = cute.make_rmem_tensor((1,), Int32)
        begin = (tiles - 1) * TILE_TOKENS
        for i, x in enumerate((k, v)):
            first = x[head // k.shape[1], head % k.shape[1], None, None]
            step[i] = Int64(first.stride[0]) * 2
            address[i] = first.iterator.toint() + (begin + rows.row) * step[i] + rows.byte
        left[0] = seq_k - begin - rows.row
        return RowSource(address, step, left, rows, tile)

    def copy(self, ring: cute.Pointer, stage: Int32) -> None:
        """Request the next tile for byte ``stage`` of the ``ring`` (shared), and step to the one before it."""
        self.copy_keys(ring + stage)
        self.copy_values(ring + stage)

    def copy_keys(self, buffer: cute.Pointer) -> None:
        """Request K of the next tile for the ``buffer`` (shared)."""
        self._copy_rows(buffer + self.tile.k_offset, 0)

    def copy_values(self, buffer: cute.Pointer) -> None:
        """Request the same tile's V, and step to the tile before it."""
        self._copy_rows(buffer + self.tile.v_offset, 1)
        self.left[0] = self.left[0] + TILE_TOKENS

    def _copy_rows(self, planes: cute.Pointer, i: int) -> None:
        first, step = self.address[i], self.step[i]
        self.rows.copy(planes, lambda row, byte: first + row * step + byte, self.left[0])
        self.address[i] = self.address[i] - TILE_TOKENS * self.step[i]
