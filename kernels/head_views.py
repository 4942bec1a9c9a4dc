"""What of the attention kernels' arguments belongs to one head, or to the heads that are packed into one."""

from __future__ import annotations

import math

import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

__all__ = ["head_channels", "head_queries", "head_rows", "packed_heads"]


def packed_heads(x: cute.Tensor | None, kv_heads: Int32) -> cute.Tensor | None:
    """[B, Hkv, rows, …] of x [B, Hq, Sq, …], if there is one: the query heads of a KV head as one of group·Sq rows.

    group = Hq / Hkv. Row p is token p // group of query head p % group of its KV head, a mode ((group, Sq)) whose
    strides are those of heads and tokens: whatever is indexed by p is where it was.
    """
    if const_expr(x is None):
        return None
    batch, heads, seq_q, *channels = x.shape
    batch_step, head_step, token_step, *steps = (s if isinstance(s, int) else Int64(s) for s in x.stride)
    group = heads // kv_heads
    shape = (batch, kv_heads, (group, seq_q), *channels)
    stride = (batch_step, head_step * group, (head_step, token_step), *steps)
    return cute.make_tensor(x.iterator, cute.make_layout(shape, stride=stride))


def head_rows(x: cute.Tensor, head: Int32) -> cute.Tensor:
    """[rows] of one head, batch·H + head, of [B, H, rows]: compact, or compact before its heads were packed."""
    return cute.make_tensor(_begin(x, head), cute.make_layout(x.shape[2], stride=x.stride[2]))


def _begin(x: cute.Tensor, head: Int32) -> cute.Pointer:
    """Where ``head`` of a compact [B, H, rows, …] begins. A head of packed ones has its size among the strides."""
    if isinstance(x.shape[2], tuple):
        return x.iterator + Int64(head) * x.stride[1]
    return x.iterator + math.prod(x.shape[2:], start=Int64(head))


def head_channels(x: cute.Tensor | None, head: Int32) -> cute.Tensor | None:
    """[D] of one KV head, batch·Hkv + KV head, of a compact [B, Hkv, D] tensor, if there is one."""
    if const_expr(x is None):
        return None
    head_dim = x.shape[2]
    return cute.make_tensor(x.iterator + Int64(head) * head_dim, cute.make_layout(head_dim))


def head_queries(q: cute.Tensor, head: Int32, compact: bool) -> cute.Tensor:
    """[rows, D] of one head, batch·H + head, of Q [B, H, rows, D], of packed heads or not.

    Where it is known to be ``compact`` it is addressed by the flat head: with strides, ptxas spills a dozen registers
    in the masked loop of recipe int8 on sm_80.
    """
    _, heads, rows, row_bytes = q.shape
    if not compact:
        return q[head // heads, head % heads, None, None]
    layout = cute.make_layout((rows, row_bytes), stride=(q.stride[2], 1))
    return cute.make_tensor(_begin(q, head), layout)
