"""flash-attn-4 (FlashAttention's CuTe DSL kernels, from PyPI), in 16 bits: its FP8 kernels are for sm_100 alone."""

from __future__ import annotations

import torch

from cute_attn.bench.contender import Prepared, installed
from cute_attn.bench.peers.peer import Peer
from cute_attn.dispatch import Support
from cute_attn.problem import Problem

__all__ = ["FlashAttn4"]


class FlashAttn4(Peer):
    """``flash_attn.cute.interface.flash_attn_func``: [B, S, H, D], causal bottom-right, KV heads as they are."""

    name = "flash_attn_4"

    def available(self) -> Support:
        if self._capability[0] < 8:
            return Support("has no kernel below compute capability 8.0")
        if not (found := installed("flash_attn", "flash-attn-4", "pip install flash-attn-4")):
            return found
        return installed("flash_attn.cute", "flash-attn-4", "pip install flash-attn-4; another flash_attn is there")

    def prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Prepared:
        from flash_attn.cute.interface import flash_attn_func

        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        return Prepared(
            lambda: flash_attn_func(q, k, v, causal=problem.causal)[0], output=lambda out: out.transpose(1, 2)
        )
