"""Where a `KvRing`'s tiles come from: what the producer warp requests for the next stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int16, Int32, Int64, Uint8, const_expr, range_constexpr
from cutlass.cute.nvgpu import cpasync

from .operand_planes import lane_index
from .swizzled_tile import BLOCK_CHANNELS, SwizzledTile
from .tile_image import TileImage

__all__ = ["TensorTiles", "TileImages", "tensor_maps"]

_CHUNK = 16
_CORE = 1024
"""Bytes after which the 128-byte swizzle starts over."""


@dataclass(frozen=True)
class TileImages:
    """Whole tile images, contiguous in global memory, each brought by one bulk copy; in a `cluster` each CTA brings a
    part of it to all of them.

    images: the first one of the head (global, 16-byte aligned)
    """

    images: cute.Pointer
    image: cutlass.Constexpr[TileImage]
    cluster: cutlass.Constexpr[int]

    @staticmethod
    def create(
        keys: cute.Tensor, maps: None, head: Int32, seq_k: Int32, image: TileImage, own: tuple, varlen: bool,
        cluster: int,
    ) -> TileImages:  # fmt: skip
        """keys: uint8 [B, Hkv, T, bytes], compact; head: batch·Hkv + KV head."""
        return TileImages(keys.iterator + Int64(head) * keys.shape[2] * image.nbytes, image, cluster)

    @cute.jit
    def bring(self, tile: Int32, turn: cutlass.Constexpr[int], target: cute.Pointer, full: cute.Pointer) -> None:
        """Request image ``tile`` for the stage ``target`` (shared), whose barrier ``full`` is told when it is there."""
        if lane_index() == 0:
            nbytes = self.image.nbytes
            part = nbytes // self.cluster
            copy, others = cpasync.CopyBulkG2SOp(), {}
            source, place = self.images + cute.assume(Int64(tile) * nbytes, divby=_CHUNK), target
            if const_expr(self.cluster > 1):
                copy, others = cpasync.CopyBulkG2SMulticastOp(), {"mcast_mask": Int16((1 << self.cluster) - 1)}
                mine = cute.assume(cute.arch.block_idx_in_cluster() * part, divby=_CHUNK)
                source, place = source + mine, target + mine
            atom = cute.make_copy_atom(copy, Uint8, num_bits_per_copy=8 * part)
            layout = cute.make_layout(part)
            cute.arch.mbarrier_arrive_and_expect_tx(full, nbytes)
            cute.copy(atom, cute.make_tensor(source, layout), cute.make_tensor(place, layout), mbar_ptr=full, **others)


def tensor_maps(keys: cute.Tensor, values: cute.Tensor, seq_k: Int32, tile: SwizzledTile, cluster: int) -> tuple:
    """Of K and of V [B, Hkv, Sk, D], a TMA copy of one block of a tile, and its coordinates [Sk, D, Hkv, B]. In a
    cluster each CTA copies a block of its share of the tokens.

    Strides are multiples of 16 bytes, but for that of D, which is 1. What lies outside of ``seq_k`` tokens and D
    channels arrives as zeros.
    """
    maps, share = [], _share(tile, cluster)
    for x in (keys, values):
        batch, heads, _, head_dim = x.shape
        b, h, s, d = x.stride
        tokens = cutlass.max(seq_k, 1)  # a tensor map has no empty tensors
        tensor = cute.make_tensor(x.iterator, cute.make_layout((tokens, head_dim, heads, batch), stride=(s, d, h, b)))
        load = cpasync.CopyBulkTensorTileG2SOp() if cluster == 1 else cpasync.CopyBulkTensorTileG2SMulticastOp()
        maps.extend(cpasync.make_tiled_tma_atom(load, tensor, share.block.cute(), (share.tokens, BLOCK_CHANNELS)))
    return tuple(maps)


def _share(tile: SwizzledTile, cluster: int) -> SwizzledTile:
    """What one CTA of a cluster brings of a tile: consecutive tokens, of each block a range of bytes."""
    return replace(tile, tokens=tile.tokens // cluster)


@dataclass(frozen=True)
class TensorTiles:
    """Tiles of K and V in 16-bit floats from ordinary tensors, by turns, each brought by a TMA copy for 64 channels.

    Tokens that the tensors have and the sequence has not may hold NaN, which a probability of zero does not take off
    P·V. The hardware knows nothing of a sequence's own length, so that the warp itself clears them in V's last tile,
    between its arrival, at a barrier of its own, and the word to the consumers.

    In a `cluster` each CTA brings its share of a tile's tokens to all of them. But for such a last tile, of which each
    brings all to itself: else a share of the next head's would be early for that barrier, of which there is one.

    copies:  of K and V, the copy of a block, and the head's blocks: coordinates ((token, channel), share, block)
    seq_k:   tokens of the sequence
    barrier, phase: shared, of this warp, and the parity of its phase, int32 (1,) in a register
    """

    copies: tuple
    seq_k: Int32
    barrier: cute.Pointer
    phase: cute.Tensor
    tile: cutlass.Constexpr[SwizzledTile]
    varlen: cutlass.Constexpr[bool]
    cluster: cutlass.Constexpr[int]

    @staticmethod
    def create(
        keys: cute.Tensor, maps: tuple, head: Int32, seq_k: Int32, tile: SwizzledTile, own: tuple, varlen: bool,
        cluster: int,
    ) -> TensorTiles:  # fmt: skip
        """maps: `tensor_maps`; head: batch·Hkv + KV head; own: the warp's barrier and the parity of its phase; varlen:
        whether ``seq_k`` may be less than the tensors'.
        """
        kv_heads = keys.shape[1]
        copies = []
        for atom, coordinates in (maps[:2], maps[2:]):
            rows = coordinates[None, None, head % kv_heads, head // kv_heads]
            copies.append((atom, cute.local_tile(rows, (tile.tokens // cluster, BLOCK_CHANNELS), (None, None))))
        return TensorTiles(tuple(copies), seq_k, *own, tile, varlen, cluster)

    @cute.jit
    def bring(self, tile: Int32, turn: cutlass.Constexpr[int], target: cute.Pointer, full: cute.Pointer) -> None:
        """Request K of ``tile``, or V if ``turn`` is 1, for the stage ``target``; ``full`` is told when it is there."""
        if const_expr(turn == 1 and self.varlen):
            left = self.seq_k - tile * self.tile.tokens
            if left < self.tile.tokens:
                self._request(tile, turn, target, self.barrier, alone=True)
                cute.arch.mbarrier_wait(self.barrier, self.phase[0])
                self.phase[0] = self.phase[0] ^ 1
                self._clear(target, left)
                if lane_index() == 0:
                    cute.arch.mbarrier_arrive(full)
            else:
                self._request(tile, turn, target, full)
        else:
            self._request(tile, turn, target, full)

    @cute.jit
    def _request(
        self, tile: Int32, turn: cutlass.Constexpr[int], target: cute.Pointer, barrier: cute.Pointer,
        alone: cutlass.Constexpr[bool] = False,
    ) -> None:  # fmt: skip
        """alone: for this CTA only, and by itself."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, self.tile.operand_bytes)
        if const_expr(self.cluster == 1):
            self._copy(tile, 0, turn, target, barrier, {})
        else:
            rank = cute.arch.block_idx_in_cluster()
            if const_expr(alone):
                for share in range_constexpr(self.cluster):
                    self._copy(tile, share, turn, target, barrier, {"mcast_mask": Int16(1) << rank.to(Int16)})
            else:
                self._copy(tile, rank, turn, target, barrier, {"mcast_mask": Int16((1 << self.cluster) - 1)})

    def _copy(self, tile: Int32, share: Any, turn: int, target: cute.Pointer, barrier: cute.Pointer, to: dict) -> None:
        """A share of a tile's tokens; ``to``: which CTAs of the cluster get it."""
        atom, blocks = self.copies[turn]
        block_bytes = self.tile.operand_bytes // self.tile.blocks
        layout = _share(self.tile, self.cluster).block.cute()
        if self.cluster > 1:
            tile = tile * self.cluster + share
            target = target + cute.assume(share * (block_bytes // self.cluster), divby=_CORE)
        for block in range(self.tile.blocks):
            place = cute.recast_ptr(target + block * block_bytes, layout.inner, dtype=self.tile.element)
            shared = cute.group_modes(cute.make_tensor(place, layout.outer), 0, 2)
            source = cute.group_modes(blocks[None, None, tile, block], 0, 2)
            shared, source = cpasync.tma_partition(atom, 0, cute.make_layout(1), shared, source)
            cute.copy(atom, source, shared, tma_bar_ptr=barrier, **to)  # elects a thread by itself

    @cute.jit
    def _clear(self, values: cute.Pointer, left: Int32) -> None:
        """Zeros for the tokens from ``left`` on, of all blocks; seen by the tensor cores when the warp goes on."""
        block_bytes = self.tile.operand_bytes // self.tile.blocks
        row_bytes = block_bytes // self.tile.tokens
        zeros = cute.make_rmem_tensor((_CHUNK // 4,), Int32)
        zeros.fill(0)
        for byte in cutlass.range(left * row_bytes + lane_index() * _CHUNK, block_bytes, 32 * _CHUNK, unroll=1):
            for block in range_constexpr(self.tile.blocks):
                place = values + cute.assume(byte, divby=_CHUNK) + block * block_bytes
                cute.autovec_copy(zeros, cute.make_tensor(cute.recast_ptr(place, dtype=Int32), zeros.layout))
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
