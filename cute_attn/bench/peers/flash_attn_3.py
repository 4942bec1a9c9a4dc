"""FlashAttention-3 in FP8, where its Hopper package is built from source: one scale per batch element and KV head."""

from __future__ import annotations

import torch

from cute_attn.bench.contender import Prepared, installed
from cute_attn.bench.peers.peer import Fp8Peer, to_e4m3
from cute_attn.dispatch import Support
from cute_attn.problem import Problem

__all__ = ["FlashAttn3Fp8"]


class FlashAttn3Fp8(Fp8Peer):
    """``flash_attn_interface.flash_attn_func`` on E4M3 tensors [B, S, H, D], causal bottom-right, bfloat16 output."""

    name = "flash_attn_3_fp8"

    def available(self) -> Support:
        if self._capability != (9, 0):
            return Support("has FP8 kernels for Hopper only")
        how = "build the folder hopper of github.com/Dao-AILab/flash-attention"
        return installed("flash_attn_interface", "FlashAttention-3", how)

    def supports(self, problem: Problem) -> Support:
        if problem.head_dim not in (64, 128, 256):
            return Support("measured at head dims 64, 128 and 256, for which it is tuned")
        return Support()

    def prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Prepared:
        from flash_attn_interface import flash_attn_func

        def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """E4M3 elements [B, S, H, D], and what to multiply them with, [B, Hkv]."""
            elements, scale = to_e4m3(x.unflatten(1, (problem.kv_heads, -1)), (2, 3, 4))
            return elements.flatten(1, 2).transpose(1, 2).contiguous(), scale.flatten(1)

        def run(operands: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
            (q8, q_scale), (k8, k_scale), (v8, v_scale) = operands
            scales = {"q_descale": q_scale, "k_descale": k_scale, "v_descale": v_scale}
            return flash_attn_func(q8, k8, v8, causal=problem.causal, **scales)

        ready = [quantised(x) for x in (q, k, v)]
        return Prepared(
            lambda: run(ready),
            lambda: run([quantised(x) for x in (q, k, v)]),
            lambda out: out.transpose(1, 2),
        )
