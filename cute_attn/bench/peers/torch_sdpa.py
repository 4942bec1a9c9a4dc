"""``torch.nn.functional.scaled_dot_product_attention``, one backend at a time."""

from __future__ import annotations

import warnings

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cute_attn.bench.contender import Prepared, top_left_refusal
from cute_attn.bench.peers.peer import Peer
from cute_attn.dispatch import Support
from cute_attn.problem import Problem

__all__ = ["TorchSdpa"]

_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class TorchSdpa(Peer):
    """FlashAttention-2 as PyTorch brings it ("flash"), or cuDNN's attention ("cudnn"), in 16 bits."""

    def __init__(self, capability: tuple[int, int], backend: str) -> None:
        super().__init__(capability)
        self.name = f"sdpa_{backend}"
        self._backend = _BACKENDS[backend]

    def supports(self, problem: Problem) -> Support:
        return top_left_refusal(problem)

    def prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Prepared:
        def attention() -> torch.Tensor:
            with sdpa_kernel(self._backend):
                return scaled_dot_product_attention(q, k, v, is_causal=problem.causal, enable_gqa=problem.group > 1)

        with warnings.catch_warnings(record=True) as reasons:
            warnings.simplefilter("always")
            try:
                attention()
            except RuntimeError as error:  # "No available kernel": why not is in the warnings
                said = "; ".join(str(reason.message).split("(Triggered")[0].strip() for reason in reasons)
                raise RuntimeError(f"{error} {said}") from error
        return Prepared(attention)
