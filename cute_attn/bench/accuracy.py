"""Errors against float64, on a sample of the rows: all of them would take longer than everything that is timed."""

from __future__ import annotations

import torch

from cute_attn import reference
from cute_attn.problem import Problem
from cute_attn.reference import Errors

__all__ = ["Sample"]

_ROWS, _HEADS, _BATCHES = 64, 4, 2


def _spread(count: int, of: int) -> list[int]:
    """Up to ``count`` of the numbers below ``of``, evenly spaced, the first and the last among them."""
    return sorted({round(i * (of - 1) / max(min(count, of) - 1, 1)) for i in range(min(count, of))})


class Sample:
    """Some rows of one problem's output in float64.

    64 rows, the first and the last among them, of up to 4 heads, each with another KV head, of up to 2 batch elements.
    Every one sees all of its keys.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> None:
        """q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D], on any device; the work is done there."""
        kv_heads = _spread(_HEADS, problem.kv_heads)
        self._batches, self._rows = _spread(_BATCHES, problem.batch), _spread(_ROWS, problem.seq_q)
        self._heads = [h * problem.group + i % problem.group for i, h in enumerate(kv_heads)]
        keys, values = (x[self._batches][:, kv_heads] for x in (k, v))
        queries = self._of(q)
        if not problem.causal:
            self._exact = reference.attention(queries, keys, values)[0]
            return
        outs = []
        for i, row in enumerate(self._rows):
            seen = max(row + 1 + problem.seq_k - problem.seq_q, 0)  # bottom-right: this row's keys, all of them
            one = queries[:, :, i : i + 1]
            outs.append(reference.attention(one, keys[:, :, :seen], values[:, :, :seen])[0])
        self._exact = torch.cat(outs, 2)

    def _of(self, x: torch.Tensor) -> torch.Tensor:
        """The sampled rows of q or of an output [B, Hq, Sq, D]."""
        return x[self._batches][:, self._heads][:, :, self._rows]

    def errors(self, out: torch.Tensor) -> Errors:
        """Distance of a whole output [B, Hq, Sq, D] from float64 attention, on these rows."""
        return reference.errors(self._of(out), self._exact)
