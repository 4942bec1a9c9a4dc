"""What the attention kernels of all families are called with: the same tensors, in the same order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int8, Int32, Uint8, const_expr
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

__all__ = ["HEAD_DIMS", "OUT_DTYPES", "Call", "attention_arguments"]

HEAD_DIMS = range(16, 257, 8)
"""Head dims that there are kernels for."""

OUT_DTYPES = {"float16": Float16, "bfloat16": BFloat16}
"""By name."""


def attention_arguments(
    recipe: Any,
    image: Any,
    head_dim: int,
    out_dtype: str,
    out_align: int,
    *,
    has_lse: bool,
    smooth_q: bool,
    smooth_v: bool,
    varlen_k: bool,
) -> tuple[Any, ...]:
    """Tensors without memory, scalars and stream that stand for the arguments of `AttentionSm80` while compiling.

    recipe: ``quantised``, ``element``; image: ``key_bytes``, ``nbytes``; the others as in the configurations
    """
    batch, heads, kv_heads, seq_q, tiles = (cute.sym_int32() for _ in range(5))

    def compact(dtype: Any, shape: tuple[Any, ...], align: int) -> Any:
        order = tuple(reversed(range(len(shape))))
        return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)

    def rows(heads: Any, tokens: Any, element: Any, align: int) -> Any:
        """[B, H, S, D] of 16-bit floats with any strides that keep rows aligned to ``align`` bytes."""
        strides = tuple(cute.sym_int64(divisibility=align // 2) for _ in range(3))
        return make_fake_tensor(element, (batch, heads, tokens, head_dim), (*strides, 1), assumed_align=align)

    if recipe.quantised:
        query = (compact(Int8, (batch, heads, seq_q, image.key_bytes), 16),)
        query += tuple(compact(Float32, (batch, heads, seq_q), 4) for _ in range(2))
        key_value = (
            compact(Uint8, (batch, kv_heads, tiles, image.nbytes), 16),
            compact(Float32, (batch, kv_heads, head_dim), 16),
        )
    else:
        query = (rows(heads, seq_q, recipe.element, 16), None, None)
        key_value = tuple(rows(kv_heads, tiles, recipe.element, 16) for _ in range(2))
    return (
        *query,
        *key_value,
        compact(Float32, (batch, heads, cute.sym_int32(), cute.sym_int32(64)), 16) if smooth_q else None,
        compact(Float32, (batch, kv_heads, head_dim), 16) if smooth_v else None,
        compact(Int32, (batch,), 4) if varlen_k else None,
        rows(heads, seq_q, OUT_DTYPES[out_dtype], out_align),
        compact(Float32, (batch, heads, seq_q), 4) if has_lse else None,
        Int32(0),
        Float32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )


@dataclass(frozen=True)
class Call:
    """The arguments of one launch, in shapes and formats those of `AttentionSm80.__call__`, or of `AttentionSm90`'s.

    keys, values: tile images and V's scales, or K and V themselves
    maps:         what the copies of K and V need besides, or None

    With packed query heads q, q_scale, q_bias, out and lse are the views of `packed_heads`.
    """

    q: cute.Tensor
    q_scale: cute.Tensor | None
    q_bias: cute.Tensor | None
    keys: cute.Tensor
    values: cute.Tensor
    maps: tuple | None
    v_mean: cute.Tensor | None
    key_lengths: cute.Tensor | None
    out: cute.Tensor
    lse: cute.Tensor | None
    seq_k: Int32
    softmax_scale_log2: Float32

    @property
    def heads(self) -> Int32:
        """Query heads; if they are packed, KV heads."""
        return self.q.shape[1]

    @property
    def rows(self) -> Any:
        """Queries of a head; of packed heads (query heads of a KV head, queries of each)."""
        return self.q.shape[2]

    @property
    def group(self) -> Int32:
        """Query heads that share a KV head; if they are packed, 1."""
        return self.heads // self.keys.shape[1]

    def keys_of(self, batch: Int32) -> Int32:
        """Keys of a batch element."""
        if const_expr(self.key_lengths is None):
            return self.seq_k
        return cutlass.max(cutlass.min(self.key_lengths[batch], self.seq_k), 0)
