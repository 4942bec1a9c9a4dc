"""Runs FlashAttention's Ampere forward, from the pip package flash-attn-4, on the emulator.

A program of its own, because the emulator has to be installed before cutlass is imported. Prints one JSON object per
case: the errors of the kernel and of PyTorch in the same element type, both against float64, and what was launched.
"""

from __future__ import annotations

import json
import math
import os
import sys

ARCH = "sm_80"
# flash-attn-4's own switches for machines without a GPU; quack-kernels, which it imports, has the third and fourth.
os.environ.update(FLASH_ATTENTION_ARCH=ARCH, FLASH_ATTENTION_NUM_SMS="4", QUACK_ARCH="80", QUACK_CACHE_ENABLED="0")

from cute_attn.emulator import clear_launches, foreign, launches, settings  # noqa: E402

foreign.install(ARCH)

import torch  # noqa: E402
from flash_attn.cute.interface import flash_attn_func  # noqa: E402


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, Sq, Hq, D] and LSE [B, Hq, Sq] in the tensors' own element type; causal is aligned bottom-right."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if causal:
        seq_q, seq_k = scores.shape[-2:]
        hidden = torch.ones(seq_q, seq_k).triu(1 + seq_k - seq_q).bool()
        scores = scores.masked_fill(hidden, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def run(dtype: str, causal: bool, seq_q: int, seq_k: int, heads: int, kv_heads: int, head_dim: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, seq, h, head_dim, generator=generator).to(getattr(torch, dtype))
        for seq, h in ((seq_q, heads), (seq_k, kv_heads), (seq_k, kv_heads))
    )
    clear_launches()
    # The rows of a Q tile beyond the sequence are never written, and their results never stored: with NaN in them
    # everything that is stored has to be right all the same.
    with settings(uninitialized_shared="poison"):
        out, lse = flash_attn_func(q, k, v, causal=causal, return_lse=True)[:2]
    exact, exact_lse = attention(q.double(), k.double(), v.double(), causal)
    same_type, _ = attention(q, k, v, causal)
    return {
        "kernel": (out.double() - exact).abs().max().item(),
        "pytorch": (same_type.double() - exact).abs().max().item(),
        "lse": (lse.double() - exact_lse).abs().max().item(),
        "launched": [record.name for record in launches()],
    }


for case in json.loads(sys.argv[1]):
    print(json.dumps(run(*case)), flush=True)
