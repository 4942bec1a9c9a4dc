"""Q to INT8, one scale per token, and what smoothing K took off its scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int8, Int32, const_expr, range_constexpr
from cutlass.cute.runtime import make_fake_stream

from .int8_rounding import absolute_max, inverse_scale, symmetric_scale, to_int8x4
from .rows import THREADS, VECTOR, QuantizerConfig, fake_tensor, load_vector

__all__ = ["QueryConfig", "QueryRows"]

_PASSES = 4


@dataclass(frozen=True)
class QueryConfig:
    """quantizer: what all quantisers are compiled for. smooth_k: whether K's mean was removed (q_bias is q·k_mean)."""

    quantizer: QuantizerConfig
    smooth_k: bool = True


class QueryRows:
    """Quantises Q per token; D/8 neighbouring threads per token, 4 tokens per thread.

    Called with q [B, Hq, Sq, D] (any strides, head dim contiguous), k_mean float32 [B, Hkv, D] (None without smooth_k),
    and the results: q_int8 [B, Hq, Sq, D], q_scale and q_bias float32 [B, Hq, Sq]. Query head h belongs to KV head
    h // (Hq/Hkv). q_bias = q·k_mean in float32, from the unquantised q: eight fused multiply-adds per thread in
    ascending channel order, then a butterfly over the D/8 threads of the token, farthest first; 0 without smooth_k.
    """

    def __init__(self, config: QueryConfig):
        if reason := self.can_implement(config):
            raise ValueError(reason)
        self.config = config

    @staticmethod
    def can_implement(config: QueryConfig) -> str | None:
        return config.quantizer.refusal()

    def fake_arguments(self) -> tuple[Any, ...]:
        q = fake_tensor(self.config.quantizer.element_type, 4)
        k_mean = fake_tensor(Float32, 3, 16) if self.config.smooth_k else None
        scales = [fake_tensor(Float32, 3) for _ in range(2)]
        return (q, k_mean, fake_tensor(Int8, 4, 16), *scales, make_fake_stream(use_tvm_ffi_env_stream=True))

    @cute.jit
    def __call__(self, q, k_mean, q_int8, q_scale, q_bias, stream):
        tokens = self.config.quantizer.rows_per_pass * _PASSES
        grid = [cute.ceil_div(q.shape[2], tokens), q.shape[1], q.shape[0]]
        self.kernel(q, k_mean, q_int8, q_scale, q_bias).launch(grid=grid, block=[THREADS, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, q: cute.Tensor, k_mean, q_int8: cute.Tensor, q_scale: cute.Tensor, q_bias: cute.Tensor):
        lanes, rows = self.config.quantizer.lanes_per_row, self.config.quantizer.rows_per_pass
        thread, _, _ = cute.arch.thread_idx()
        block, head, batch = cute.arch.block_idx()
        row, lane = thread // lanes, thread % lanes
        mean = None
        if const_expr(self.config.smooth_k):
            kv_head = head // (q.shape[1] // k_mean.shape[1])
            mean = load_vector(k_mean, (batch, kv_head, lane * VECTOR), 16)
        for i in range_constexpr(_PASSES):
            token = block * (rows * _PASSES) + i * rows + row
            self.quantize_token(q, mean, q_int8, q_scale, q_bias, (batch, head, token), lane)

    @cute.jit
    def quantize_token(self, q: cute.Tensor, mean, q_int8, q_scale, q_bias, place, lane: Int32):
        batch, head, token = place
        lanes = self.config.quantizer.lanes_per_row
        channel = lane * VECTOR
        # Threads past the end repeat the last token: every lane has to take part in the shuffles.
        inside = token < q.shape[2]
        token = cutlass.min(token, q.shape[2] - 1)
        values = load_vector(q, (batch, head, token, channel), self.config.quantizer.in_align)
        amax, bias = Float32(0.0), Float32(0.0)
        for j in range_constexpr(VECTOR):
            amax = absolute_max(amax, values[j])
            if const_expr(self.config.smooth_k):
                bias = cute.math.fma(values[j], mean[j], bias)
        amax = cute.arch.warp_reduction(amax, absolute_max, threads_in_group=lanes)
        bias = cute.arch.warp_reduction_sum(bias, threads_in_group=lanes)
        scale = symmetric_scale(amax)
        inverse = [inverse_scale(scale)] * 4
        if inside:
            row = q_int8.iterator + cute.crd2idx((batch, head, token, channel), q_int8.layout)
            words = cute.make_tensor(
                cute.make_ptr(Int32, row.toint(), cute.AddressSpace.gmem, assumed_align=8), cute.make_layout(2)
            )
            packed = cute.make_rmem_tensor((2,), Int32)
            for w in range_constexpr(2):
                packed[w] = to_int8x4(values[4 * w : 4 * w + 4], inverse)
            cute.autovec_copy(packed, words)
            if lane == 0:
                q_scale[batch, head, token] = scale
                q_bias[batch, head, token] = bias
