"""How the quantisers read [B, H, S, D] tensors: eight consecutive channels of one token per thread.

Eight 16-bit values are one 16-byte load where the tensor's alignment allows it. The assignment of channels and tokens
to threads does not depend on the alignment, so results do not either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_tensor

__all__ = ["THREADS", "VECTOR", "QuantizerConfig", "fake_tensor", "load_vector"]

THREADS = 128
"""Threads per CTA of every quantiser."""

VECTOR = 8
"""Channels per thread."""

_DTYPES = {"float16": cutlass.Float16, "bfloat16": cutlass.BFloat16}
_HEAD_DIMS = (32, 64, 128, 256)


@dataclass(frozen=True)
class QuantizerConfig:
    """What the quantisers of Q, K and V are compiled for.

    head_dim: D; D/8 threads share a token and reduce over it by shuffles, hence a power of two up to 256
    in_dtype: "float16" or "bfloat16"
    in_align: alignment in bytes that base pointers and all strides (in bytes) of the inputs have: 16, 8, 4 or 2
    """

    head_dim: int
    in_dtype: str
    in_align: int = 16

    def refusal(self) -> str | None:
        """None, or why no quantiser has this configuration."""
        if self.head_dim not in _HEAD_DIMS:
            return f"head dim {self.head_dim} is not one of {', '.join(map(str, _HEAD_DIMS))}"
        if self.in_dtype not in _DTYPES:
            return f"input dtype {self.in_dtype} is not one of {', '.join(_DTYPES)}"
        if self.in_align not in (16, 8, 4, 2):
            return f"input alignment {self.in_align} is not 16, 8, 4 or 2 bytes"
        return None

    @property
    def element_type(self) -> Any:
        return _DTYPES[self.in_dtype]

    @property
    def lanes_per_row(self) -> int:
        """Threads that share one token."""
        return self.head_dim // VECTOR

    @property
    def rows_per_pass(self) -> int:
        """Tokens that the CTA reads at once."""
        return THREADS // self.lanes_per_row


def fake_tensor(dtype: Any, rank: int, align: int | None = None) -> Any:
    """A tensor of symbolic shape and 64-bit strides whose last mode is contiguous, for tensor-free compilation."""
    shape = tuple(cute.sym_int32() for _ in range(rank))
    stride = (*(cute.sym_int64() for _ in range(rank - 1)), 1)
    return make_fake_tensor(dtype, shape, stride, assumed_align=align)


def load_vector(x: cute.Tensor, coordinate: tuple[Int32, ...], align: int) -> list[Float32]:
    """Eight consecutive elements of the last mode from ``coordinate`` on, as float32, by loads of ``align`` bytes."""
    first = x.iterator + cute.crd2idx(coordinate, x.layout)
    # The alignment is the caller's promise about pointer and strides; dynamic strides cannot carry it.
    aligned = cute.make_ptr(x.element_type, first.toint(), cute.AddressSpace.gmem, assumed_align=align)
    values = cute.make_tensor(aligned, cute.make_layout(VECTOR)).load().to(Float32)
    return [values[i] for i in range(VECTOR)]
