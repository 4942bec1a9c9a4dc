"""How the quantisers read [B, H, S, D] tensors: eight consecutive channels of one token per thread.

Eight 16-bit values are one 16-byte load where the tensor's alignment allows it. The assignment of channels and tokens
to threads does not depend on the alignment, so results do not either.

A power of two of neighbouring lanes shares a token, so that they can reduce over it by shuffles: the first D/8 of them
own eight channels each. The others repeat the loads of the last owner, which costs no memory traffic and changes no
maximum, and must add nothing to sums and store nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.runtime import make_fake_tensor

__all__ = ["THREADS", "VECTOR", "QuantizerConfig", "fake_tensor", "key_length", "load_vector", "stage_row"]

THREADS = 128
"""Threads per CTA of every quantiser."""

VECTOR = 8
"""Channels per thread."""

_DTYPES = {"float16": cutlass.Float16, "bfloat16": cutlass.BFloat16}
_SMALLEST_HEAD_DIM, _LARGEST_HEAD_DIM = 16, 256


@dataclass(frozen=True)
class QuantizerConfig:
    """What the quantisers of Q, K and V are compiled for.

    head_dim: D, any multiple of 8 from 16 to 256
    in_dtype: "float16" or "bfloat16"
    in_align: alignment in bytes that base pointers and all strides (in bytes) of the inputs have: 16, 8, 4 or 2
    """

    head_dim: int
    in_dtype: str
    in_align: int = 16

    def refusal(self) -> str | None:
        """None, or why no quantiser has this configuration."""
        if self.head_dim % VECTOR or not _SMALLEST_HEAD_DIM <= self.head_dim <= _LARGEST_HEAD_DIM:
            return (
                f"head dim {self.head_dim} is not a multiple of {VECTOR} "
                f"from {_SMALLEST_HEAD_DIM} to {_LARGEST_HEAD_DIM}"
            )
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
        """Threads that share one token: the power of two not below D/8."""
        return 1 << (self.head_dim // VECTOR - 1).bit_length()

    @property
    def rows_per_pass(self) -> int:
        """Tokens that the CTA reads at once."""
        return THREADS // self.lanes_per_row

    def owns_channels(self, lane: Int32) -> Any:
        """Whether ``lane`` of a token has channels of its own; True while tracing if all lanes have."""
        return True if self.lanes_per_row * VECTOR == self.head_dim else lane * VECTOR < self.head_dim

    def channel(self, lane: Int32) -> Int32:
        """First of the eight channels that ``lane`` of a token loads: its own, or those of the last owner."""
        own = lane * VECTOR
        return own if self.owns_channels(lane) is True else cutlass.min(own, self.head_dim - VECTOR)


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


@cute.jit
def stage_row(x: cute.Tensor, place, channels: cutlass.Constexpr, head_dim: cutlass.Constexpr, smem, thread: Int32):
    """Row ``place`` of x, float32 [B, H, D], to shared memory: ``channels`` floats, zeros from D on.

    At least channels/4 threads have to call; a barrier has to follow.
    """
    row = smem.allocate_tensor(Float32, cute.make_layout(channels), 16)
    channel = thread * 4
    if channel < channels:
        values = cute.make_rmem_tensor((4,), Float32)
        values.fill(0.0)
        if channel < head_dim:
            first = x.iterator + cute.crd2idx((*place, channel), x.layout)
            aligned = cute.make_ptr(Float32, first.toint(), cute.AddressSpace.gmem, assumed_align=16)
            cute.autovec_copy(cute.make_tensor(aligned, cute.make_layout(4)), values)
        cute.autovec_copy(values, cute.local_tile(row, (4,), (thread,)))
    return row


def key_length(key_lengths: cute.Tensor | None, batch: Int32, seq_k: Int32) -> Int32:
    """Tokens of K and V that batch element ``batch`` has: all Sk, or what key_lengths int32 [B] says, within 0…Sk."""
    if const_expr(key_lengths is None):
        return seq_k
    return cutlass.min(cutlass.max(key_lengths[batch], 0), seq_k)
