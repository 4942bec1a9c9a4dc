"""ΔS = q̄·(k − k̄): what smoothing Q took off the scores, one row per block of 128 queries, by 16-bit MMAs.

A CTA owns 128 keys of one KV head and keeps them in registers as B operands, so that K is read once, however many
queries there are. The rows of the A operand are the (query head of the group, Q block) pairs that share the KV head, 16
at a time:

    registers  K      [C chunks of 32 dims][8-token tiles][8 elements], C = ceil(D/32)
    shared     q̄      16 rows, read once by the CTA; float32 q̄·k̄ of each row
    loop over 16 rows: stage q̄, and its dot with k̄ from the same registers; 2·C k steps of m16n8k16; subtract; store

The dims of a chunk are permuted alike in both operands, which changes no sum: lane t holds dims 8t…8t+7 as k = 2t,
2t+1, 2t+8, 2t+9 of two k steps, so that every operand comes in 16-byte loads and needs no ldmatrix. Keys are permuted
as in a tile image (`TileImage.score_tokens`): a lane's accumulators are four neighbouring keys, one 16-byte store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr, range_constexpr
from cutlass.cute.runtime import make_fake_stream
from cutlass.cutlass_dsl import select_

from .atoms import mma_float_op
from .operand_planes import lane_index
from .rows import VECTOR, QuantizerConfig, fake_tensor, key_length, stage_row
from .tile_image import TileImage

__all__ = ["DeltaConfig", "DeltaScores"]

_KEYS = 128
_ROWS = 16
_CHUNK = 32


@dataclass(frozen=True)
class DeltaConfig:
    """quantizer: head dim, dtype and alignment of K. varlen_k: whether the kernel takes key_lengths."""

    quantizer: QuantizerConfig
    varlen_k: bool = False


class DeltaScores:
    """Fills ΔS, one CTA per (128 keys, KV head, batch element).

    Called with q_mean [B, Hq, Qb, D] (compact), k [B, Hkv, Sk, D] of the same dtype (any strides, head dim contiguous),
    k_mean float32 [B, Hkv, D], key_lengths int32 [B] (None without varlen_k), and delta float32 [B, Hq, Qb, T·64]
    (compact, T = ceil(Sk/64)), which it fills; zeros from the end of the keys on. Query head h belongs to KV head
    h // (Hq/Hkv).

    q̄·k and q̄·k̄ are accumulated in float32 and subtracted once: k̄ is not rounded to 16 bits, and neither is k − k̄.
    |error| ≤ (D + 2)·2^-23·Σ_d |q̄_d|(|k_d| + |k̄_d|), the bound for sums in any order of which every addition truncates.
    """

    def __init__(self, config: DeltaConfig):
        if reason := self.can_implement(config):
            raise ValueError(reason)
        self.config = config
        self.head_dim = config.quantizer.head_dim
        self.tile = TileImage(self.head_dim)
        self.chunks = -(-self.head_dim // _CHUNK)
        # K takes at most 64 registers of a lane.
        self.warp_keys = 32 if self.head_dim <= 128 else 16
        self.threads = _KEYS // self.warp_keys * 32
        self.lanes_per_row = self.threads // _ROWS
        self.vectors_per_lane = -(-self.chunks * (_CHUNK // VECTOR) // self.lanes_per_row)
        self.staged_dims = self.vectors_per_lane * self.lanes_per_row * VECTOR
        # An odd multiple of 64 bytes: the two rows of a phase of eight 16-byte loads lie in different banks.
        self.row_stride = _CHUNK * (self.chunks | 1)

    @staticmethod
    def can_implement(config: DeltaConfig) -> str | None:
        return config.quantizer.refusal()

    def fake_arguments(self) -> tuple[Any, ...]:
        element = self.config.quantizer.element_type
        key_lengths = fake_tensor(Int32, 1) if self.config.varlen_k else None
        q_mean, delta = fake_tensor(element, 4, 16), fake_tensor(Float32, 4, 16)
        k, k_mean = fake_tensor(element, 4), fake_tensor(Float32, 3, 16)
        return (q_mean, k, k_mean, key_lengths, delta, make_fake_stream(use_tvm_ffi_env_stream=True))

    @cute.jit
    def __call__(self, q_mean, k, k_mean, key_lengths, delta, stream):
        grid = [cute.ceil_div(delta.shape[3], _KEYS), k.shape[1], k.shape[0]]
        self.kernel(q_mean, k, k_mean, key_lengths, delta).launch(grid=grid, block=[self.threads, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, q_mean: cute.Tensor, k: cute.Tensor, k_mean: cute.Tensor, key_lengths, delta: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        block, head, batch = cute.arch.block_idx()
        length = key_length(key_lengths, batch, k.shape[2])
        rows = q_mean.shape[1] // k.shape[1] * q_mean.shape[2]
        # The rows of a KV head are neighbours in q_mean and in delta.
        first_row = (Int64(batch) * k.shape[1] + head) * rows
        first_key = block * _KEYS + thread // 32 * self.warp_keys

        smem = cutlass.memory.SmemAllocator()
        staged = smem.allocate_tensor(
            q_mean.element_type, cute.make_layout((_ROWS, self.row_stride), stride=(self.row_stride, 1)), 16
        )
        dots = smem.allocate_tensor(Float32, cute.make_layout(_ROWS), 16)
        keys = self.load_keys(k, (batch, head), first_key, length)
        mean = self.load_mean(k_mean, smem, (batch, head), thread)
        loaded = self.load_rows(q_mean, first_row, 0, rows, thread)
        for m in cutlass.range(cute.ceil_div(rows, _ROWS)):
            cute.arch.sync_threads()
            self.stage_rows(loaded, mean, staged, dots, thread)
            cute.arch.sync_threads()
            loaded.store(self.load_rows(q_mean, first_row, (m + 1) * _ROWS, rows, thread).load())
            accumulators = self.multiply(staged, keys)
            self.store(accumulators, dots, delta, first_row, m * _ROWS, rows, first_key, length)

    @cute.jit
    def load_keys(self, k: cute.Tensor, place, first_key: Int32, length: Int32) -> cute.Tensor:
        """The B operands of the warp's keys: ((2, 2), 2 k steps, chunks, 8-key tiles); zeros past the ends."""
        batch, head = place
        g, t = lane_index() // 4, lane_index() % 4
        tiles = self.warp_keys // 8
        order = self.tile.score_tokens.cute()
        keys = cute.make_rmem_tensor((VECTOR, self.chunks, tiles), k.element_type)
        keys.fill(0.0)
        for n in range_constexpr(tiles):
            key = first_key + order((g, n))
            for c in range_constexpr(self.chunks):
                dim = c * _CHUNK + t * VECTOR
                inside = key < length
                if const_expr((c + 1) * _CHUNK > self.head_dim):
                    inside = inside & (dim < self.head_dim)
                if inside:
                    row = k.iterator + cute.crd2idx((batch, head, key, dim), k.layout)
                    copy_vector(row, keys[None, c, n], self.config.quantizer.in_align)
        return cute.make_tensor(keys.iterator, cute.make_layout(((2, 2), 2, self.chunks, tiles)))

    @cute.jit
    def load_mean(self, k_mean: cute.Tensor, smem, place, thread: Int32) -> cute.Tensor:
        """k̄ of the dims whose q̄ this thread stages, (8, vectors)."""
        shared = stage_row(k_mean, place, self.staged_dims, self.head_dim, smem, thread)
        cute.arch.sync_threads()
        mean = cute.make_rmem_tensor((VECTOR, self.vectors_per_lane), Float32)
        for i in range_constexpr(self.vectors_per_lane):
            vector = self.staged_dim(thread, i) // VECTOR
            cute.autovec_copy(cute.local_tile(shared, (VECTOR,), (vector,)), mean[None, i])
        return mean

    @cute.jit
    def load_rows(self, q_mean: cute.Tensor, first_row: Int64, start: Int32, rows: Int32, thread: Int32) -> cute.Tensor:
        """This thread's part of rows ``start`` … +15 of q̄, (8, vectors); zeros past the ends."""
        row = start + thread // self.lanes_per_row
        loaded = cute.make_rmem_tensor((VECTOR, self.vectors_per_lane), q_mean.element_type)
        loaded.fill(0.0)
        for i in range_constexpr(self.vectors_per_lane):
            dim = self.staged_dim(thread, i)
            if (row < rows) & (dim < self.head_dim):
                copy_vector(q_mean.iterator + (first_row + row) * self.head_dim + dim, loaded[None, i], 16)
        return loaded

    def staged_dim(self, thread: Int32, i: int) -> Int32:
        """First of the eight dims that are the ``i``-th vector of this thread's row."""
        return (thread % self.lanes_per_row + i * self.lanes_per_row) * VECTOR

    @cute.jit
    def stage_rows(self, loaded: cute.Tensor, mean: cute.Tensor, staged: cute.Tensor, dots: cute.Tensor, thread: Int32):
        row = thread // self.lanes_per_row
        dot = Float32(0.0)
        for i in range_constexpr(self.vectors_per_lane):
            dim = self.staged_dim(thread, i)
            if dim < self.chunks * _CHUNK:
                cute.autovec_copy(loaded[None, i], shared_vector(staged, row, dim))
            values = loaded[None, i].load().to(Float32)
            for j in range_constexpr(VECTOR):
                dot = cute.math.fma(values[j], mean[j, i], dot)
        dot = cute.arch.warp_reduction_sum(dot, threads_in_group=self.lanes_per_row)
        if thread % self.lanes_per_row == 0:
            dots[row] = dot

    @cute.jit
    def multiply(self, staged: cute.Tensor, keys: cute.Tensor) -> cute.Tensor:
        """q̄·k of 16 rows with the warp's keys: float32 ((2, 2), 8-key tiles)."""
        g, t = lane_index() // 4, lane_index() % 4
        tiles = self.warp_keys // 8
        element = staged.element_type
        mma = cute.make_mma_atom(mma_float_op(element, Float32))
        accumulators = cute.make_rmem_tensor(((2, 2), tiles), Float32)
        accumulators.fill(0.0)
        for c in range_constexpr(self.chunks):
            # Registers of the A operand of two k steps: (row g or g + 8, low or high half of k, step)
            words = cute.make_rmem_tensor((2, 2, 2), Int32)
            for half in range_constexpr(2):
                vector = cute.make_rmem_tensor((VECTOR,), element)
                cute.autovec_copy(shared_vector(staged, g + 8 * half, c * _CHUNK + t * VECTOR), vector)
                for w in range_constexpr(4):
                    words[half, w % 2, w // 2] = cute.recast_tensor(vector, Int32)[w]
            rows = cute.make_tensor(cute.recast_ptr(words.iterator, dtype=element), cute.make_layout(((2, 2, 2), 2)))
            for step in range_constexpr(2):
                for n in range_constexpr(tiles):
                    acc = accumulators[None, n]
                    cute.mma_atom_call(mma, acc, rows[None, step], keys[None, step, c, n], acc)
        return accumulators

    @cute.jit
    def store(self, accumulators, dots: cute.Tensor, delta: cute.Tensor, first_row, start, rows, first_key, length):
        """Rows ``start`` … +15 of the warp's keys, four keys a store."""
        g, t = lane_index() // 4, lane_index() % 4
        for half in range_constexpr(2):
            row = g + 8 * half
            dot = dots[row]
            for pair in range_constexpr(self.warp_keys // 16):
                key = first_key + pair * 16 + t * 4
                values = cute.make_rmem_tensor((4,), Float32)
                for i in range_constexpr(4):
                    value = accumulators[(i % 2, half), 2 * pair + i // 2] - dot
                    values[i] = Float32(select_(key + i < length, value, Float32(0.0)))
                if (start + row < rows) & (key < delta.shape[3]):
                    place = delta.iterator + (first_row + start + row) * delta.shape[3] + key
                    aligned = cute.make_ptr(Float32, place.toint(), cute.AddressSpace.gmem, assumed_align=16)
                    cute.autovec_copy(values, cute.make_tensor(aligned, cute.make_layout(4)))


def copy_vector(first: cute.Pointer, target: cute.Tensor, align: int) -> None:
    """Eight elements of global memory from ``first`` on, whose alignment the caller promises."""
    aligned = cute.make_ptr(first.dtype, first.toint(), cute.AddressSpace.gmem, assumed_align=align)
    cute.autovec_copy(cute.make_tensor(aligned, cute.make_layout(VECTOR)), target)


def shared_vector(staged: cute.Tensor, row: Int32, dim: Int32) -> cute.Tensor:
    """Eight elements of a staged row; both it and the vector start at a multiple of 16 bytes."""
    offset = cute.assume(cute.crd2idx((row, dim), staged.layout), divby=VECTOR)
    return cute.make_tensor(staged.iterator + offset, cute.make_layout(VECTOR))
