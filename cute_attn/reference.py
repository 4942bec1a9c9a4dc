"""Attention in float64, and how far a result is from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["Errors", "attention", "errors"]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    scores_at_once: int = 1 << 24,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(softmax_scale · q kᵀ) v in float64.

    q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv], any float dtype; Hq a multiple of Hkv. Causal is aligned
    bottom-right: query i sees keys up to i + Sk − Sq. softmax_scale is 1/√D by default. At most ``scores_at_once``
    scores, or one row per head, exist at a time.

    Returns out [B, Hq, Sq, Dv] and lse [B, Hq, Sq] (natural logarithm), float64; a query without keys gets 0 and −inf.
    """
    batch, heads, seq_q, head_dim = q.shape
    kv_heads, seq_k = k.shape[1], k.shape[2]
    scores_shape = (batch, heads, seq_k)  # of one query
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    queries = q.double().unflatten(1, (kv_heads, heads // kv_heads))
    keys, values = k.double().unsqueeze(2), v.double().unsqueeze(2)
    out = torch.zeros(*queries.shape[:-1], v.shape[-1], dtype=torch.float64, device=q.device)
    lse = torch.full(queries.shape[:-1], -math.inf, dtype=torch.float64, device=q.device)
    if 0 in scores_shape:
        return out.flatten(1, 2), lse.flatten(1, 2)
    step = max(1, scores_at_once // math.prod(scores_shape))
    for start in range(0, seq_q, step):
        rows = slice(start, min(start + step, seq_q))
        scores = queries[..., rows, :] @ keys.mT * scale
        if causal:
            limit = torch.arange(start, rows.stop, device=q.device)[:, None] + (seq_k - seq_q)
            scores.masked_fill_(torch.arange(seq_k, device=q.device) > limit, -math.inf)
        lse[..., rows] = torch.logsumexp(scores, -1)
        # exp(−inf − (−inf)) is NaN, but a query without keys has weights of zero.
        shift = lse[..., rows, None]
        weights = torch.exp(scores - torch.where(shift == -math.inf, 0.0, shift))
        out[..., rows, :] = weights @ values
    return out.flatten(1, 2), lse.flatten(1, 2)


@dataclass(frozen=True)
class Errors:
    """Distance of a result from a reference.

    rel_l2:  ‖x − r‖₂ / ‖r‖₂
    rel_l1:  Σ|x − r| / Σ|r|, the mean relative error of the INT-FlashAttention and SageAttention papers
    cos:     cosine of the angle between both as vectors
    max_abs: max |x − r|
    """

    rel_l2: float
    rel_l1: float
    cos: float
    max_abs: float


def errors(result: torch.Tensor, reference: torch.Tensor) -> Errors:
    """`Errors` of ``result`` against ``reference`` (same shape), over all elements; equal zeros have no error."""
    x, r = result.double().flatten(), reference.double().flatten()
    difference = x - r

    def ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> float:
        return 0.0 if not numerator else float(numerator / denominator)

    norms = x.norm() * r.norm()
    return Errors(
        rel_l2=ratio(difference.norm(), r.norm()),
        rel_l1=ratio(difference.abs().sum(), r.abs().sum()),
        cos=float(x @ r / norms) if norms else float(not difference.any()),
        max_abs=float(difference.abs().max()) if difference.numel() else 0.0,
    )
