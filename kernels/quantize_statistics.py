"""K's mean and V's mean and scales: one pass over both, in a fixed order, without atomics.

    KeyValueStatistics   one CTA per (256 tokens, KV head, batch element): sum of K, amax (or sum, min, max) of V
    FinishStatistics     one CTA per (KV head, batch element): k_mean, v_mean and v_scale from all partial results

Order of the float32 sums, per channel: within a chunk of 256 tokens, token i belongs to row i mod R, where R is 128
divided by the power of two not below D/8; each row sums its tokens in ascending order, the rows are added in ascending
order, and so are the chunks; then a division.

V's mean comes out of the same pass as its largest distance from that mean: float32 subtraction is monotonic, so
max |v − mean| is the larger of max − mean and mean − min, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr, range_constexpr
from cutlass.cute.runtime import make_fake_stream
from cutlass.cutlass_dsl import select_

from .rounding import LARGEST, absolute_max, power_of_two_scale, symmetric_scale
from .rows import THREADS, VECTOR, QuantizerConfig, fake_tensor, key_length, load_vector
from .tile_image import VALUE_BYTES

__all__ = [
    "CHUNK_TOKENS",
    "FinishConfig",
    "FinishStatistics",
    "KeyValueStatistics",
    "StatisticsConfig",
    "partial_rows",
]

CHUNK_TOKENS = 256
"""Tokens per partial result: 16 chunks per head at 4096 tokens keep a large GPU busy from 8 heads on."""


def minimum(a: Float32, b: Float32) -> Float32:
    """The smaller one, NaN if either is."""
    return cute.arch.fmin(a, b, nan=True)


def maximum(a: Float32, b: Float32) -> Float32:
    """The larger one, NaN if either is."""
    return cute.arch.fmax(a, b, nan=True)


def add(a: Float32, b: Float32) -> Float32:
    return a + b


@dataclass(frozen=True)
class Statistic:
    """One number per channel that is gathered token by token: of K or V, from ``start`` by ``join``.

    counts_end: whether tokens past the end have to be left out; others repeat the last token, which changes nothing
    """

    of: str
    start: float
    join: Any
    counts_end: bool = False


_KEY_SUM = Statistic("k", 0.0, add, True)
_VALUE_AMAX = Statistic("v", 0.0, absolute_max)
_VALUE_SUM = Statistic("v", 0.0, add, True)
_VALUE_MIN = Statistic("v", float("inf"), minimum)
_VALUE_MAX = Statistic("v", -float("inf"), maximum)


def _statistics(smooth_v: bool) -> tuple[Statistic, ...]:
    return (_KEY_SUM, _VALUE_SUM, _VALUE_MIN, _VALUE_MAX) if smooth_v else (_KEY_SUM, _VALUE_AMAX)


def partial_rows(smooth_v: bool) -> int:
    """Numbers per channel and chunk of tokens: the sum of K, and the amax of V or its sum, minimum and maximum."""
    return len(_statistics(smooth_v))


@dataclass(frozen=True)
class StatisticsConfig:
    """quantizer: what all quantisers are compiled for.

    smooth_v: whether V's mean will be subtracted. varlen: whether batch elements have lengths of their own.
    """

    quantizer: QuantizerConfig
    smooth_v: bool = False
    varlen: bool = False


class KeyValueStatistics:
    """Partial statistics of K and V per chunk of tokens; minima and maxima propagate NaN.

    Called with k, v [B, Hkv, Sk, D] (any strides, head dim contiguous, Sk ≥ 1), partial float32
    [B, Hkv, ceil(Sk/256), partial_rows, D], and key_lengths int32 [B] (None without varlen). Fills the chunks that hold
    tokens, and reads every byte of these tokens of K and V once.
    """

    def __init__(self, config: StatisticsConfig):
        if reason := self.can_implement(config):
            raise ValueError(reason)
        self.config = config.quantizer
        self.varlen = config.varlen
        self.statistics = _statistics(config.smooth_v)

    @staticmethod
    def can_implement(config: StatisticsConfig) -> str | None:
        return config.quantizer.refusal()

    def fake_arguments(self) -> tuple[Any, ...]:
        element = self.config.element_type
        inputs = [fake_tensor(element, 4) for _ in range(2)]
        lengths = fake_tensor(Int32, 1) if self.varlen else None
        return (*inputs, fake_tensor(Float32, 5), lengths, make_fake_stream(use_tvm_ffi_env_stream=True))

    @cute.jit
    def __call__(self, k: cute.Tensor, v: cute.Tensor, partial: cute.Tensor, key_lengths, stream):
        grid = [partial.shape[2], k.shape[1], k.shape[0]]
        self.kernel(k, v, partial, key_lengths).launch(grid=grid, block=[THREADS, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, k: cute.Tensor, v: cute.Tensor, partial: cute.Tensor, key_lengths):
        chunk, _, batch = cute.arch.block_idx()
        tokens = key_length(key_lengths, batch, k.shape[2])
        if const_expr(self.varlen):
            if chunk * CHUNK_TOKENS < tokens:
                self.gather_chunk(k, v, partial, tokens)
        else:
            self.gather_chunk(k, v, partial, tokens)

    @cute.jit
    def gather_chunk(self, k: cute.Tensor, v: cute.Tensor, partial: cute.Tensor, tokens: Int32):
        lanes, rows = self.config.lanes_per_row, self.config.rows_per_pass
        thread, _, _ = cute.arch.thread_idx()
        chunk, head, batch = cute.arch.block_idx()
        row, lane = thread // lanes, thread % lanes
        channel = self.config.channel(lane)
        gathered = [cute.make_rmem_tensor((VECTOR,), Float32) for _ in self.statistics]
        for i in range_constexpr(len(self.statistics)):
            gathered[i].fill(self.statistics[i].start)
        passes = (cutlass.min(tokens - chunk * CHUNK_TOKENS, CHUNK_TOKENS) + (rows - 1)) // rows
        for i in cutlass.range(passes, unroll=4):
            token = chunk * CHUNK_TOKENS + i * rows + row
            self.add_token(k, v, (batch, head, token, channel), tokens, gathered)

        smem = cutlass.memory.SmemAllocator()
        by_row = cute.make_layout((rows, self.config.head_dim), stride=(self.config.head_dim, 1))
        staged = [smem.allocate_tensor(Float32, by_row, 16) for _ in self.statistics]
        if self.config.owns_channels(lane):
            for i in range_constexpr(len(self.statistics)):
                for j in range_constexpr(VECTOR):
                    staged[i][row, channel + j] = gathered[i][j]
        cute.arch.sync_threads()
        self.join_rows(staged, partial, (batch, head, chunk), thread)

    @cute.jit
    def add_token(self, k: cute.Tensor, v: cute.Tensor, coordinate, tokens: Int32, gathered):
        """Tokens past the end are read as the last one."""
        batch, head, token, channel = coordinate
        inside = token < tokens
        token = cutlass.min(token, tokens - 1)
        keys = load_vector(k, (batch, head, token, channel), self.config.in_align)
        values = load_vector(v, (batch, head, token, channel), self.config.in_align)
        for i in range_constexpr(len(self.statistics)):
            statistic = self.statistics[i]
            for j in range_constexpr(VECTOR):
                x = keys[j] if const_expr(statistic.of == "k") else values[j]
                if const_expr(statistic.counts_end):
                    x = Float32(select_(inside, x, Float32(0.0)))
                gathered[i][j] = statistic.join(gathered[i][j], x)

    @cute.jit
    def join_rows(self, staged, partial: cute.Tensor, place, thread: Int32):
        batch, head, chunk = place
        for start in range_constexpr(0, self.config.head_dim, THREADS):
            channel = start + thread
            if channel < self.config.head_dim:
                for i in range_constexpr(len(self.statistics)):
                    joined = Float32(self.statistics[i].start)
                    for row in cutlass.range(self.config.rows_per_pass, unroll_full=True):
                        joined = self.statistics[i].join(joined, staged[i][row, channel])
                    partial[batch, head, chunk, i, channel] = joined


@dataclass(frozen=True)
class FinishConfig:
    """head_dim: D. v_scale: "channel", or "tensor" for one scale over all tokens and channels of a (batch, KV head).

    values: what V becomes: "int8" (scale amax/127), "e4m3" (amax/448) or "float16" (the power of two not above amax).
    smooth_v, varlen: as in `StatisticsConfig`; with smooth_v, amax is that of V − v_mean. largest_value: what amax
    becomes in place of 127 or 448, for accumulators in which sums of larger values may overflow; None: 127 or 448.
    """

    head_dim: int
    v_scale: str = "channel"
    values: str = "int8"
    smooth_v: bool = False
    varlen: bool = False
    largest_value: float | None = None


class FinishStatistics:
    """k_mean, v_scale (equal channels if per tensor) and v_mean, all float32 [B, Hkv, D], from the partial results.

    A channel (or, per tensor, a head) of V with an inf or a NaN has scale NaN.

    Called with partial [B, Hkv, chunks, partial_rows, D], k_mean, v_scale, v_mean (None without smooth_v), seq_k
    (Int32, ≥ 1), and key_lengths int32 [B] (None without varlen). Everything is 0 for a batch element without keys.
    """

    def __init__(self, config: FinishConfig):
        if reason := self.can_implement(config):
            raise ValueError(reason)
        self.config = config
        self.statistics = _statistics(config.smooth_v)
        # A power of two of warps: of three, the compiler would read the peaks as four, one that nobody wrote.
        self.threads = max(32, 1 << (config.head_dim - 1).bit_length())

    @staticmethod
    def can_implement(config: FinishConfig) -> str | None:
        if config.v_scale not in ("channel", "tensor"):
            return f"v_scale {config.v_scale} is neither channel nor tensor"
        if config.values not in VALUE_BYTES:
            return f"values {config.values} is not one of {', '.join(VALUE_BYTES)}"
        largest = LARGEST.get(config.values)
        if config.largest_value is not None and (largest is None or not 1 <= config.largest_value <= largest):
            return f"largest_value {config.largest_value} is not " + (
                f"from 1 to {largest}, which is {config.values}'s"
                if largest
                else f"None, as for values {config.values}"
            )
        return QuantizerConfig(config.head_dim, "float16").refusal()

    def fake_arguments(self) -> tuple[Any, ...]:
        results = [fake_tensor(Float32, 3) for _ in range(2)]
        v_mean = fake_tensor(Float32, 3) if self.config.smooth_v else None
        lengths = fake_tensor(Int32, 1) if self.config.varlen else None
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return (fake_tensor(Float32, 5), *results, v_mean, Int32(1), lengths, stream)

    @cute.jit
    def __call__(self, partial, k_mean, v_scale, v_mean, seq_k: Int32, key_lengths, stream):
        self.kernel(partial, k_mean, v_scale, v_mean, seq_k, key_lengths).launch(
            grid=[partial.shape[1], partial.shape[0], 1], block=[self.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, partial: cute.Tensor, k_mean: cute.Tensor, v_scale, v_mean, seq_k: Int32, key_lengths):
        thread, _, _ = cute.arch.thread_idx()
        head, batch, _ = cute.arch.block_idx()
        # Threads past the head dim repeat the last channel: they take part in the maximum over channels.
        channel = cutlass.min(thread, self.config.head_dim - 1)
        tokens = key_length(key_lengths, batch, seq_k)
        gathered = [Float32(statistic.start) for statistic in self.statistics]
        for chunk in cutlass.range((tokens + (CHUNK_TOKENS - 1)) // CHUNK_TOKENS, unroll=4):
            for i in range_constexpr(len(self.statistics)):
                gathered[i] = self.statistics[i].join(gathered[i], partial[batch, head, chunk, i, channel])
        count = Float32(cutlass.max(tokens, 1))
        key_mean = gathered[0] / count
        value_mean = None
        if const_expr(self.config.smooth_v):
            value_mean = gathered[1] / count
            amax = maximum(gathered[3] - value_mean, value_mean - gathered[2])
            amax = Float32(select_(tokens > 0, amax, Float32(0.0)))
        else:
            amax = gathered[1]
        if const_expr(self.config.v_scale == "tensor"):
            amax = self.over_channels(amax, thread)
        if thread < self.config.head_dim:
            k_mean[batch, head, channel] = key_mean
            of_channel = self.scale(amax)
            v_scale[batch, head, channel] = of_channel + (of_channel - of_channel)  # NaN unless finite
            if const_expr(self.config.smooth_v):
                v_mean[batch, head, channel] = value_mean

    def scale(self, amax: Float32) -> Float32:
        if self.config.values == "float16":
            return power_of_two_scale(amax)
        return symmetric_scale(amax, self.config.largest_value or LARGEST[self.config.values])

    @cute.jit
    def over_channels(self, amax: Float32, thread: Int32):
        """The largest amax of all channels, to every thread."""
        warps = self.threads // 32
        amax = cute.arch.warp_reduction(amax, absolute_max)
        smem = cutlass.memory.SmemAllocator()
        peaks = smem.allocate_tensor(Float32, cute.make_layout(warps), 16)
        if thread % 32 == 0:
            peaks[thread // 32] = amax
        cute.arch.sync_threads()
        for warp in range_constexpr(warps):
            amax = absolute_max(amax, peaks[warp])
        return amax
