"""SpargeAttn, where it is installed from source: SageAttention 2 that skips blocks."""

from __future__ import annotations

import torch

from cute_attn.bench.contender import Formats, Prepared, installed, top_left_refusal
from cute_attn.bench.peers.peer import Peer
from cute_attn.dispatch import Support
from cute_attn.problem import Problem

__all__ = ["Sparge"]


class Sparge(Peer):
    """``spas_sage2_attn_meansim_topk_cuda``, which its authors recommend, with a share of the key blocks kept.

    Which blocks it keeps depends on Q and K, so that there is no attention alone to time. Its TOPS are counted as if
    nothing were skipped; what skipping costs shows in the error. On random inputs no block matters less than another:
    the share of 1.0 compares kernels, any other says what a skipped block gains and nothing of what it costs a model.
    It masks whole blocks only, those on the diagonal not at all, which is an error of its own when causal.
    """

    capturable = False  # launched on the legacy default stream, as SageAttention
    quantises = True

    def __init__(self, capability: tuple[int, int], kept: float) -> None:
        super().__init__(capability)
        self.name = f"sparge_{kept:g}"
        self._kept = kept

    def formats(self, problem: Problem) -> Formats:
        if self._capability[0] == 8 and self._capability[1] < 9:
            return Formats("int8", "float16", "float16+float32")
        return Formats("int8", "e4m3", "float32+float32" if self._capability[0] == 9 else "float16+float32")

    def available(self) -> Support:
        if self._capability[0] not in (8, 9, 12):
            return Support(f"has no kernel for compute capability {self._capability[0]}.{self._capability[1]}")
        return installed("spas_sage_attn", "SpargeAttn", "not on PyPI; build github.com/thu-ml/SpargeAttn")

    def supports(self, problem: Problem) -> Support:
        if problem.head_dim not in (64, 128):
            return Support("head dims 64 and 128 only")
        if problem.group > 1:
            return Support("as many KV heads as heads: its block map compares them one by one")
        if problem.seq_q < 128:
            return Support("at least 128 queries")
        return top_left_refusal(problem)

    def prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Prepared:
        from spas_sage_attn import spas_sage2_attn_meansim_topk_cuda

        return Prepared(
            None, lambda: spas_sage2_attn_meansim_topk_cuda(q, k, v, topk=self._kept, is_causal=problem.causal)
        )
