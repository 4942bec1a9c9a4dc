"""K's mean and V's scales: one pass over both, in a fixed order, without atomics.

    KeyValueStatistics   one CTA per (256 tokens, KV head, batch element): partial sums of K and partial amax of V
    FinishStatistics     one CTA per (KV head, batch element): k_mean and v_scale from all partials

Order of K's float32 sum, per channel: within a chunk of 256 tokens, token i belongs to row i mod R, R = 1024/D; each
row sums its tokens in ascending order, the rows are added in ascending order, and so are the chunks; then a division.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr, range_constexpr
from cutlass.cute.runtime import make_fake_stream
from cutlass.cutlass_dsl import select_

from .int8_rounding import absolute_max, power_of_two_scale, symmetric_scale
from .rows import THREADS, VECTOR, QuantizerConfig, fake_tensor, load_vector
from .tile_image import VALUE_BYTES

__all__ = ["CHUNK_TOKENS", "FinishStatistics", "KeyValueStatistics", "StatisticsConfig"]

CHUNK_TOKENS = 256
"""Tokens per partial result: 16 chunks per head at 4096 tokens keep a large GPU busy from 8 heads on."""


class KeyValueStatistics:
    """Partial sums of K and NaN-propagating partial amax of V per chunk of tokens.

    Called with k, v [B, Hkv, Sk, D] (any strides, head dim contiguous, Sk ≥ 1), and k_partial, v_partial
    float32 [B, Hkv, ceil(Sk/256), D], which it fills. Reads every byte of K and V once.
    """

    def __init__(self, config: QuantizerConfig):
        if reason := self.can_implement(config):
            raise ValueError(reason)
        self.config = config

    @staticmethod
    def can_implement(config: QuantizerConfig) -> str | None:
        return config.refusal()

    def fake_arguments(self) -> tuple[Any, ...]:
        element = self.config.element_type
        inputs = [fake_tensor(element, 4) for _ in range(2)]
        partials = [fake_tensor(Float32, 4) for _ in range(2)]
        return (*inputs, *partials, make_fake_stream(use_tvm_ffi_env_stream=True))

    @cute.jit
    def __call__(self, k: cute.Tensor, v: cute.Tensor, k_partial: cute.Tensor, v_partial: cute.Tensor, stream):
        grid = [k_partial.shape[2], k.shape[1], k.shape[0]]
        self.kernel(k, v, k_partial, v_partial).launch(grid=grid, block=[THREADS, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, k: cute.Tensor, v: cute.Tensor, k_partial: cute.Tensor, v_partial: cute.Tensor):
        lanes, rows = self.config.lanes_per_row, self.config.rows_per_pass
        thread, _, _ = cute.arch.thread_idx()
        chunk, head, batch = cute.arch.block_idx()
        row, channel = thread // lanes, thread % lanes * VECTOR
        total = cute.make_rmem_tensor((VECTOR,), Float32)
        amax = cute.make_rmem_tensor((VECTOR,), Float32)
        total.fill(0.0)
        amax.fill(0.0)
        for i in cutlass.range(CHUNK_TOKENS // rows, unroll=4):
            self.add_token(k, v, (batch, head, chunk * CHUNK_TOKENS + i * rows + row, channel), total, amax)

        smem = cutlass.memory.SmemAllocator()
        by_row = cute.make_layout((rows, self.config.head_dim), stride=(self.config.head_dim, 1))
        sums = smem.allocate_tensor(Float32, by_row, 16)
        peaks = smem.allocate_tensor(Float32, by_row, 16)
        for j in range_constexpr(VECTOR):
            sums[row, channel + j] = total[j]
            peaks[row, channel + j] = amax[j]
        cute.arch.sync_threads()
        self.join_rows(sums, peaks, k_partial, v_partial, (batch, head, chunk), thread)

    @cute.jit
    def add_token(self, k: cute.Tensor, v: cute.Tensor, coordinate, total: cute.Tensor, amax: cute.Tensor):
        """Tokens past the end are read as the last one: they cannot change an amax, and are left out of the sum."""
        batch, head, token, channel = coordinate
        last = k.shape[2] - 1
        inside = token <= last
        token = cutlass.min(token, last)
        keys = load_vector(k, (batch, head, token, channel), self.config.in_align)
        values = load_vector(v, (batch, head, token, channel), self.config.in_align)
        for j in range_constexpr(VECTOR):
            total[j] = total[j] + select_(inside, keys[j], Float32(0.0))
            amax[j] = absolute_max(amax[j], values[j])

    @cute.jit
    def join_rows(self, sums, peaks, k_partial: cute.Tensor, v_partial: cute.Tensor, place, thread: Int32):
        batch, head, chunk = place
        for start in range_constexpr(0, self.config.head_dim, THREADS):
            channel = start + thread
            if channel < self.config.head_dim:
                total, amax = Float32(0.0), Float32(0.0)
                for row in range_constexpr(self.config.rows_per_pass):
                    total = total + sums[row, channel]
                    amax = absolute_max(amax, peaks[row, channel])
                k_partial[batch, head, chunk, channel] = total
                v_partial[batch, head, chunk, channel] = amax


@dataclass(frozen=True)
class StatisticsConfig:
    """head_dim: D. v_scale: "channel", or "tensor" for one scale over all tokens and channels of a (batch, KV head).

    values: what V becomes, "int8" (scale amax/127) or "float16" (the power of two not above amax).
    """

    head_dim: int
    v_scale: str = "channel"
    values: str = "int8"


class FinishStatistics:
    """k_mean [B, Hkv, D] and v_scale [B, Hkv, D] (equal channels if per tensor), both float32, from the partials.

    Called with k_partial, v_partial [B, Hkv, chunks, D], k_mean, v_scale, and seq_k (Int32, ≥ 1).
    """

    def __init__(self, config: StatisticsConfig):
        if reason := self.can_implement(config):
            raise ValueError(reason)
        self.config = config

    @staticmethod
    def can_implement(config: StatisticsConfig) -> str | None:
        if config.v_scale not in ("channel", "tensor"):
            return f"v_scale {config.v_scale} is neither channel nor tensor"
        if config.values not in VALUE_BYTES:
            return f"values {config.values} is not one of {', '.join(VALUE_BYTES)}"
        return QuantizerConfig(config.head_dim, "float16").refusal()

    def fake_arguments(self) -> tuple[Any, ...]:
        partials = [fake_tensor(Float32, 4) for _ in range(2)]
        results = [fake_tensor(Float32, 3) for _ in range(2)]
        return (*partials, *results, Int32(1), make_fake_stream(use_tvm_ffi_env_stream=True))

    @cute.jit
    def __call__(self, k_partial, v_partial, k_mean, v_scale, seq_k: Int32, stream):
        self.kernel(k_partial, v_partial, k_mean, v_scale, seq_k).launch(
            grid=[k_partial.shape[1], k_partial.shape[0], 1], block=[self.config.head_dim, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        k_partial: cute.Tensor,
        v_partial: cute.Tensor,
        k_mean: cute.Tensor,
        v_scale: cute.Tensor,
        seq_k: Int32,
    ):
        channel, _, _ = cute.arch.thread_idx()
        head, batch, _ = cute.arch.block_idx()
        total, amax = Float32(0.0), Float32(0.0)
        for chunk in cutlass.range(k_partial.shape[2], unroll=4):
            total = total + k_partial[batch, head, chunk, channel]
            amax = absolute_max(amax, v_partial[batch, head, chunk, channel])
        k_mean[batch, head, channel] = total / Float32(seq_k)
        if const_expr(self.config.v_scale == "tensor"):
            amax = self.over_channels(amax, channel)
        scale = power_of_two_scale if const_expr(self.config.values == "float16") else symmetric_scale
        v_scale[batch, head, channel] = scale(amax)

    @cute.jit
    def over_channels(self, amax: Float32, channel: Int32) -> Float32:
        """The largest amax of all channels, to every thread."""
        warps = self.config.head_dim // 32
        amax = cute.arch.warp_reduction(amax, absolute_max)
        smem = cutlass.memory.SmemAllocator()
        peaks = smem.allocate_tensor(Float32, cute.make_layout(warps), 16)
        if channel % 32 == 0:
            peaks[channel // 32] = amax
        cute.arch.sync_threads()
        for warp in range_constexpr(warps):
            amax = absolute_max(amax, peaks[warp])
        return amax
