"""What of the attention kernels' arguments belongs to one head."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

__all__ = ["head_channels", "head_queries", "head_rows"]


def head_rows(x: cute.Tensor, head: Int32) -> cute.Tensor:
    """[Sq] of one head, batch·Hq + query head, of a compact [B, Hq, Sq] tensor."""
    seq_q = x.shape[2]
    return cute.make_tensor(x.iterator + Int64(head) * seq_q, cute.make_layout(seq_q))


def head_channels(x: cute.Tensor | None, head: Int32) -> cute.Tensor | None:
    """[D] of one KV head, batch·Hkv + KV head, of a compact [B, Hkv, D] tensor, if there is one."""
    if const_expr(x is None):
        return None
    head_dim = x.shape[2]
    return cute.make_tensor(x.iterator + Int64(head) * head_dim, cute.make_layout(head_dim))


def head_queries(q: cute.Tensor, head: Int32, compact: bool) -> cute.Tensor:
    """[Sq, D] of one head, batch·Hq + query head, of Q [B, Hq, Sq, D].

    Where it is known to be ``compact`` it is addressed by the flat head: with strides, ptxas spills a dozen registers
    in the masked loop of recipe int8 on sm_80.
    """
    _, heads, seq_q, row_bytes = q.shape
    if not compact:
        return q[head // heads, head % heads, None, None]
    rows = cute.make_layout((seq_q, row_bytes), stride=(row_bytes, 1))
    return cute.make_tensor(q.iterator + Int64(head) * seq_q * row_bytes, rows)
