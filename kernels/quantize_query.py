"""Q to INT8, INT4 or E4M3 in one read: its mean per block, its scales, and what smoothing K took off its scores.

A CTA owns a block of 128 tokens of one head. Each token belongs to L neighbouring lanes with 8 channels each, each
thread to 8 tokens, which it loads at once and keeps in 16-bit registers through all that needs the whole block.

    registers      Q as it was loaded: [8 tokens][8 channels] per thread
    1. q̄           mean over the block: 8 tokens in registers, then 16 rows of threads through shared memory
    2. amax        of each token over its lanes by shuffles, of its group in registers or through shared memory
    3. elements    quantised, stored 8 bytes a lane, or 4 (INT4)
    4. bias        of each token over its lanes by shuffles; with the scale through shared memory, to be stored as rows

Token ``64·(i//4) + 32·(row//8) + 8·(i%4) + row%8`` of the block is the i-th of a thread of row ``row``: the four rows
of 32 that a lane of the attention kernel's MMA holds (g, g+8, g+16, g+24) are tokens of one thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int8, Int32, const_expr, range_constexpr
from cutlass.cute.runtime import make_fake_stream
from cutlass.cutlass_dsl import select_

from .ptx import opaque
from .rounding import LARGEST, WORD_VALUES, absolute_max, inverse_scale, quantised_word, symmetric_scale
from .rows import VECTOR, QuantizerConfig, fake_tensor, stage_row
from .tile_image import TileImage

__all__ = ["BLOCK_TOKENS", "SCALE_GROUPS", "QueryConfig", "QueryRows", "block_token"]

BLOCK_TOKENS = 128
"""Tokens of Q that share one mean; also those of a scale "block"."""

SCALE_GROUPS = ("token", "thread", "warp", "block")
"""Tokens that share a scale: each its own; rows g, g+8, g+16, g+24 of 32; 32; 128."""

_ROWS = 16
_PASSES = BLOCK_TOKENS // _ROWS


def block_token(i: Any, row: Any) -> Any:
    """Token of the block that is the ``i``-th of the threads of ``row``."""
    return i // 4 * 64 + row // 8 * 32 + i % 4 * 8 + row % 8


@dataclass(frozen=True)
class QueryConfig:
    """What the quantiser of Q is compiled for.

    quantizer: head dim, dtype and alignment of Q
    keys:      what Q becomes, "int8", "int4" or "e4m3" (from sm_89 on): the format of K that it is multiplied with
    scale:     tokens that share a scale, one of `SCALE_GROUPS`
    smooth_k:  whether K's mean was removed (q_bias is q·k_mean)
    smooth_q:  whether the mean of each block of 128 tokens is subtracted before quantisation, and returned
    """

    quantizer: QuantizerConfig
    keys: str = "int8"
    scale: str = "token"
    smooth_k: bool = True
    smooth_q: bool = False


class QueryRows:
    """Quantises Q, one CTA per (block of 128 tokens, query head, batch element).

    Called with q [B, Hq, Sq, D] (any strides, head dim contiguous), k_mean float32 [B, Hkv, D] (None without smooth_k),
    and the results: q_data int8 [B, Hq, Sq, Dq], in INT4 with two integers a byte, the even dim in the low half, or the
    bytes of E4M3; Dq = ``TileImage(D, keys=keys).key_bytes``, zeros from D on; q_scale and q_bias float32 [B, Hq, Sq];
    and q_mean [B, Hq, ceil(Sq/128), D] in Q's dtype (None without smooth_q). Query head h belongs to KV head
    h // (Hq/Hkv).

    Reads every byte of Q once. All arithmetic is float32, one rounding a step, in this order:

    * q_mean: elements that are not finite count as 0. A thread adds its tokens in ascending order, the rows are added
      in ascending order, the sum is divided by the number of tokens of the block and rounded to Q's dtype. What is
      quantised is q − q_mean. |q| up to 2.6e36 is in range: 128 of it have to have a finite sum.
    * q_scale: amax · fl(1/127), fl(1/7) or fl(1/448). A token with an inf or a NaN gets a scale of its own that is not
      finite, and does not count in the amax of its group.
    * q_bias = q·k_mean from q as it came: eight fused multiply-adds per lane in ascending channel order, then a
      butterfly over the lanes of the token, farthest first; 0 without smooth_k.
    """

    def __init__(self, config: QueryConfig):
        if reason := self.can_implement(config):
            raise ValueError(reason)
        self.config = config
        self.head_dim = config.quantizer.head_dim
        self.tile = TileImage(self.head_dim, keys=config.keys)
        self.lanes = 1 << (self.tile.key_dims // VECTOR - 1).bit_length()
        self.threads = _ROWS * self.lanes

    @staticmethod
    def can_implement(config: QueryConfig) -> str | None:
        if config.scale not in SCALE_GROUPS:
            return f"scale {config.scale} is not one of {', '.join(SCALE_GROUPS)}"
        head_dim = config.quantizer.head_dim
        return config.quantizer.refusal() or TileImage.can_implement(head_dim, keys=config.keys)

    def fake_arguments(self) -> tuple[Any, ...]:
        element = self.config.quantizer.element_type
        q = fake_tensor(element, 4)
        k_mean = fake_tensor(Float32, 3, 16) if self.config.smooth_k else None
        data = fake_tensor(Int8, 4, 16)
        scales = [fake_tensor(Float32, 3) for _ in range(2)]
        q_mean = fake_tensor(element, 4) if self.config.smooth_q else None
        return (q, k_mean, data, *scales, q_mean, make_fake_stream(use_tvm_ffi_env_stream=True))

    @cute.jit
    def __call__(self, q, k_mean, q_data, q_scale, q_bias, q_mean, stream):
        grid = [cute.ceil_div(q.shape[2], BLOCK_TOKENS), q.shape[1], q.shape[0]]
        self.kernel(q, k_mean, q_data, q_scale, q_bias, q_mean).launch(
            grid=grid, block=[self.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, q: cute.Tensor, k_mean, q_data: cute.Tensor, q_scale: cute.Tensor, q_bias: cute.Tensor, q_mean):
        thread, _, _ = cute.arch.thread_idx()
        block, head, batch = cute.arch.block_idx()
        row, lane = thread // self.lanes, thread % self.lanes
        place = (batch, head, block)
        smem = cutlass.memory.SmemAllocator()
        staged = smem.allocate_tensor(Float32, cute.make_layout((BLOCK_TOKENS, 2)), 16)
        k_bar = None
        if const_expr(self.config.smooth_k):
            kv_head = head // (q.shape[1] // k_mean.shape[1])
            k_bar = stage_row(k_mean, (batch, kv_head), self.lanes * VECTOR, self.head_dim, smem, thread)
        tokens = self.load_tokens(q, place, row, lane)
        mean = None
        if const_expr(self.config.smooth_q):
            mean = self.block_mean(tokens, q, q_mean, smem, place, (thread, row, lane))
        amax = self.token_amax(tokens, mean, q.shape[2] - block * BLOCK_TOKENS, row)
        scales = self.scales(amax, smem, row, lane)
        self.store_quantised(tokens, mean, scales, q_data, q.shape[2], place, (row, lane))
        cute.arch.sync_threads()
        self.stage_results(tokens, k_bar, scales, staged, (row, lane))
        cute.arch.sync_threads()
        self.store_rows(staged, q_scale, q_bias, q.shape[2], place, thread)

    @cute.jit
    def load_tokens(self, q: cute.Tensor, place, row: Int32, lane: Int32) -> cute.Tensor:
        """This thread's 8 channels of its 8 tokens, (8, 8) in Q's dtype; zeros past the end and past D."""
        batch, head, block = place
        tokens = cute.make_rmem_tensor((VECTOR, _PASSES), q.element_type)
        tokens.fill(0.0)
        for i in range_constexpr(_PASSES):
            token = block * BLOCK_TOKENS + block_token(i, row)
            inside = token < q.shape[2]
            if const_expr(self.lanes * VECTOR != self.head_dim):
                inside = inside & (lane * VECTOR < self.head_dim)
            if inside:
                first = q.iterator + cute.crd2idx((batch, head, token, lane * VECTOR), q.layout)
                # The alignment is the caller's promise about pointer and strides; dynamic strides cannot carry it.
                align = self.config.quantizer.in_align
                aligned = cute.make_ptr(q.element_type, first.toint(), cute.AddressSpace.gmem, assumed_align=align)
                cute.autovec_copy(cute.make_tensor(aligned, cute.make_layout(VECTOR)), tokens[None, i])
        return tokens

    @cute.jit
    def block_mean(self, tokens: cute.Tensor, q: cute.Tensor, q_mean: cute.Tensor, smem, place, thread_row_lane):
        """q_mean of this thread's channels, float32; written for all."""
        batch, head, block = place
        thread, row, lane = thread_row_lane
        channels = self.lanes * VECTOR
        sums = smem.allocate_tensor(Float32, cute.make_layout((_ROWS, channels), stride=(channels, 1)), 16)
        total = cute.make_rmem_tensor((VECTOR,), Float32)
        total.fill(0.0)
        for i in range_constexpr(_PASSES):
            values = unpacked(tokens, i)
            for j in range_constexpr(VECTOR):
                total[j] = total[j] + select_(finite(values[j]), values[j], Float32(0.0))
        mine = cute.local_tile(sums[row, None], (VECTOR,), (lane,))
        cute.autovec_copy(total, mine)
        cute.arch.sync_threads()
        if thread < channels:
            mean = Float32(0.0)
            for r in range_constexpr(_ROWS):
                mean = mean + sums[r, thread]
            count = cutlass.min(q.shape[2] - block * BLOCK_TOKENS, BLOCK_TOKENS)
            rounded = (mean / Float32(count)).to(q.element_type)
            if thread < self.head_dim:
                q_mean[batch, head, block, thread] = rounded
            sums[0, thread] = rounded.to(Float32)  # only this thread reads its column of the rows
        cute.arch.sync_threads()
        result = cute.make_rmem_tensor((VECTOR,), Float32)
        cute.autovec_copy(cute.local_tile(sums[0, None], (VECTOR,), (lane,)), result)
        return result

    def values(self, tokens: cute.Tensor, mean, i: int) -> list[Float32]:
        """What is quantised of the ``i``-th token: its eight channels, less the mean."""
        values = unpacked(tokens, i)
        return [values[j] if mean is None else values[j] - mean[j] for j in range(VECTOR)]

    @cute.jit
    def token_amax(self, tokens: cute.Tensor, mean, left: Int32, row: Int32) -> cute.Tensor:
        """NaN-propagating amax of each of the 8 tokens over all channels; 0 past the end, ``left`` tokens on."""
        amax = cute.make_rmem_tensor((_PASSES,), Float32)
        for i in range_constexpr(_PASSES):
            peak = Float32(0.0)
            for value in self.values(tokens, mean, i):
                peak = absolute_max(peak, value)
            if const_expr(mean is not None):
                peak = Float32(select_(block_token(i, row) < left, peak, Float32(0.0)))
            amax[i] = cute.arch.warp_reduction(peak, absolute_max, threads_in_group=self.lanes)
        return amax

    @cute.jit
    def scales(self, amax: cute.Tensor, smem, row: Int32, lane: Int32) -> cute.Tensor:
        """Scales of the 8 tokens, from the amax of their groups without the tokens that are not finite."""
        result = cute.make_rmem_tensor((_PASSES,), Float32)
        usable = [select_(finite(amax[i]), amax[i], Float32(0.0)) for i in range(_PASSES)]
        halves = [usable[half : half + 4] for half in (0, 4)]
        if const_expr(self.config.scale != "token"):
            halves = [[largest(half)] * 4 for half in halves]
        if const_expr(self.config.scale in ("warp", "block")):
            halves = [[peak] * 4 for peak in self.over_rows([half[0] for half in halves], smem, row, lane)]
        peaks = [*halves[0], *halves[1]]
        for i in range_constexpr(_PASSES):
            peak = select_(finite(amax[i]), peaks[i], amax[i])
            result[i] = symmetric_scale(Float32(peak), LARGEST[self.config.keys])
        return result

    @cute.jit
    def over_rows(self, peaks: list[Float32], smem, row: Int32, lane: Int32) -> list[Float32]:
        """The largest of 32 tokens, or of all 128, for the tokens 0…3 and 4…7 of this thread."""
        shared = smem.allocate_tensor(Float32, cute.make_layout((_ROWS, 2)), 16)
        if lane == 0:
            for half in range_constexpr(2):
                shared[row, half] = peaks[half]
        cute.arch.sync_threads()
        if const_expr(self.config.scale == "block"):
            everything = largest([shared[r, half] for half in range(2) for r in range(_ROWS)])
            return [everything, everything]
        first = row // 8 * 8
        return [largest([shared[first + r, half] for r in range(8)]) for half in range(2)]

    @cute.jit
    def store_quantised(self, tokens: cute.Tensor, mean, scales, q_data: cute.Tensor, seq_q: Int32, place, row_lane):
        batch, head, block = place
        row, lane = row_lane
        per_word = WORD_VALUES[self.config.keys]
        words = VECTOR // per_word
        for i in range_constexpr(_PASSES):
            token = block * BLOCK_TOKENS + block_token(i, row)
            inverse = inverse_scale(scales[i])
            values = self.values(tokens, mean, i)
            packed = cute.make_rmem_tensor((words,), Int32)
            for w in range_constexpr(words):
                packed[w] = quantised_word(values[per_word * w : per_word * (w + 1)], inverse, self.config.keys)
            inside = token < seq_q
            if const_expr(self.lanes * VECTOR != self.tile.key_dims):
                inside = inside & (lane * VECTOR < self.tile.key_dims)
            if inside:
                byte = lane * (4 * words)
                first = q_data.iterator + cute.crd2idx((batch, head, token, byte), q_data.layout)
                aligned = cute.make_ptr(Int32, first.toint(), cute.AddressSpace.gmem, assumed_align=4 * words)
                cute.autovec_copy(packed, cute.make_tensor(aligned, cute.make_layout(words)))

    @cute.jit
    def stage_results(self, tokens: cute.Tensor, k_bar, scales: cute.Tensor, staged: cute.Tensor, row_lane):
        """Scales of the 8 tokens, and q·k_mean (0 without ``k_bar``), to shared memory."""
        row, lane = row_lane
        mean = cute.make_rmem_tensor((VECTOR,), Float32)
        if const_expr(k_bar is not None):
            cute.autovec_copy(cute.local_tile(k_bar, (VECTOR,), (lane,)), mean)
        for i in range_constexpr(_PASSES):
            bias = Float32(0.0)
            if const_expr(k_bar is not None):
                values = unpacked(tokens, i)
                for j in range_constexpr(VECTOR):
                    bias = cute.math.fma(values[j], mean[j], bias)
                bias = cute.arch.warp_reduction_sum(bias, threads_in_group=self.lanes)
            if lane == 0:
                staged[block_token(i, row), 0] = scales[i]
                staged[block_token(i, row), 1] = bias

    @cute.jit
    def store_rows(self, staged: cute.Tensor, q_scale: cute.Tensor, q_bias: cute.Tensor, seq_q: Int32, place, thread):
        batch, head, block = place
        for start in range_constexpr(0, BLOCK_TOKENS, self.threads):
            local = start + thread
            token = block * BLOCK_TOKENS + local
            if (local < BLOCK_TOKENS) & (token < seq_q):
                q_scale[batch, head, token] = staged[local, 0]
                q_bias[batch, head, token] = staged[local, 1]


def unpacked(tokens: cute.Tensor, i: int) -> list[Float32]:
    """The ``i``-th token as float32, converted anew: kept from use to use it would take twice the registers."""
    packed = cute.recast_tensor(tokens[None, i], Int32)
    words = cute.make_rmem_tensor((VECTOR // 2,), Int32)
    for w in range(VECTOR // 2):
        words[w] = opaque(packed[w])
    values = cute.recast_tensor(words, tokens.element_type).load().to(Float32)
    return [values[j] for j in range(VECTOR)]


def finite(value: Float32) -> Any:
    """Whether a value is neither an inf nor a NaN."""
    return abs(value) < Float32.inf


def largest(values: list[Float32]) -> Float32:
    """The largest of values that are not NaN."""
    result = values[0]
    for value in values[1:]:
        result = cute.arch.fmax(result, value)
    return result
