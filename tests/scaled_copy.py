"""A small kernel for the tests of the compiler's surroundings: out = x · factor, and faults on demand."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor


@dataclass(frozen=True)
class ScaledCopyConfig:
    """threads: per CTA. has_bias: a vector over columns is added. overrun: columns read beyond the last one."""

    threads: int = 64
    has_bias: bool = False
    overrun: int = 0


class ScaledCopy:
    """One CTA per row of float32 matrices with any strides; [rows, columns] -> [rows, columns]."""

    def __init__(self, config: ScaledCopyConfig) -> None:
        self.config = config

    @staticmethod
    def can_implement(config: ScaledCopyConfig) -> str | None:
        return None if config.threads % 32 == 0 else f"threads={config.threads} is no multiple of a warp"

    def fake_arguments(self) -> tuple:
        rows, columns = cute.sym_int(), cute.sym_int()
        matrix = [
            make_fake_tensor(Float32, (rows, columns), stride=(cute.sym_int64(), cute.sym_int64())) for _ in range(2)
        ]
        bias = make_fake_tensor(Float32, (columns,), stride=(1,)) if self.config.has_bias else None
        return matrix[0], bias, matrix[1], Float32(1.0), make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, x, bias, out, factor: Float32, stream):
        self.kernel(x, bias, out, factor).launch(
            grid=[x.shape[0], 1, 1], block=[self.config.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, bias, out: cute.Tensor, factor: Float32):
        thread, _, _ = cute.arch.thread_idx()
        row, _, _ = cute.arch.block_idx()
        for column in cutlass.range(thread, x.shape[1] + self.config.overrun, self.config.threads):
            value = x[row, column] * factor
            if cutlass.const_expr(bias is not None):
                value = value + bias[column]
            out[row, column] = value
