"""A kernel whose main loop is known: four m16n8k16 MMAs an iteration, and a rescaling that some iterations skip."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float16, Float32, Int32
from cutlass.cute.nvgpu import warp
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor


@dataclass(frozen=True)
class MmaLoopConfig:
    """shared_values: float32 values of shared memory that the CTA asks for."""

    shared_values: int = 64


class MmaLoop:
    """out[32 lanes, 16] = a repeated product of constants; the numbers mean nothing, the machine code is looked at."""

    mmas_per_iteration = 4
    macs_per_iteration = 4 * 16 * 8 * 16

    def __init__(self, config: MmaLoopConfig) -> None:
        self.config = config

    @staticmethod
    def can_implement(config: MmaLoopConfig) -> str | None:
        return None

    def fake_arguments(self) -> tuple:
        out = make_fake_tensor(Float32, (32, 16), stride=(16, 1))
        return out, Int32(1), make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, out, iterations: Int32, stream):
        self.kernel(out, iterations).launch(
            grid=[1, 1, 1], block=[32, 1, 1], smem=4 * self.config.shared_values, stream=stream
        )

    @cute.kernel
    def kernel(self, out: cute.Tensor, iterations: Int32):
        lane, _, _ = cute.arch.thread_idx()
        mma = cute.make_tiled_mma(warp.MmaF16BF16Op(Float16, Float32, (16, 8, 16)))
        a = mma.make_fragment_A(mma.partition_shape_A((16, 16)))
        b = mma.make_fragment_B(mma.partition_shape_B((32, 16)))
        accumulator = cute.make_rmem_tensor(mma.partition_shape_C((16, 32)), Float32)
        accumulator.fill(0.0)
        a.fill(Float16(lane))
        b.fill(Float16(lane + 1))
        for _ in cutlass.range(iterations, unroll=1):
            cute.gemm(mma, accumulator, a, b, accumulator)
            if accumulator[0] > 100.0:
                scale = cute.arch.shuffle_sync_bfly(accumulator[0], 1)
                for i in cutlass.range_constexpr(cute.size(accumulator)):
                    accumulator[i] = accumulator[i] * scale
        for i in cutlass.range_constexpr(cute.size(accumulator)):
            out[lane, i] = accumulator[i]
