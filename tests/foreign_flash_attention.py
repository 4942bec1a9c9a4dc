"""Runs flash-attn-4, from the pip package, on the emulator: ``foreign_flash_attention.py ARCH CASES TENSORS``.

A program of its own, because the emulator has to be installed before cutlass is imported. CASES is a JSON list of
arguments of `run`. Prints one JSON object per case: errors against float64 of the kernels and of PyTorch in the same
element type, by tensor; whether other orders of warps and copies gave the same bits; and the kernels launched. Writes
the inputs and what the kernels computed to the file TENSORS, a dict by tensor per case, [B, S, H, D] each.
"""

from __future__ import annotations

import json
import math
import sys

from cute_attn.emulator import clear_launches, foreign, launches, settings

foreign.install(sys.argv[1])

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


def results(function, inputs: list[torch.Tensor], grad: torch.Tensor | None, causal: bool) -> dict[str, torch.Tensor]:
    """What a function of (q, k, v, causal) computes, and, where grad is given, the gradients of its inputs."""
    leaves = [x.clone().requires_grad_(grad is not None) for x in inputs]
    out, lse = function(*leaves, causal)
    found = {"out": out.detach(), "lse": lse.detach()}
    if grad is not None:
        out.backward(grad.to(out.dtype))
        found.update(zip(("dq", "dk", "dv"), (x.grad for x in leaves), strict=True))
    return found


def flash_attention(q, k, v, causal: bool):
    return flash_attn_func(q, k, v, causal=causal, return_lse=True)[:2]


def run(
    dtype: str,
    causal: bool,
    seq_q: int,
    seq_k: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    backward: bool = False,
    repeatable: bool = True,
) -> tuple[dict, dict[str, torch.Tensor]]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(seq_q, heads), (seq_k, kv_heads), (seq_k, kv_heads), (seq_q, heads)]
    *inputs, grad = (
        torch.randn(2, seq, h, head_dim, generator=generator, device="cuda").to(getattr(torch, dtype))
        for seq, h in shapes
    )
    grad = grad if backward else None
    clear_launches()
    # The rows of a Q tile beyond the sequence are never written, and their results never stored: with NaN in them
    # everything that is stored has to be right all the same.
    with settings(uninitialized_shared="poison", races=True):
        kernel = results(flash_attention, inputs, grad, causal)
        with settings(seed=7):
            again = results(flash_attention, inputs, grad, causal) if repeatable else kernel
    exact = results(attention, [x.double() for x in inputs], grad, causal)
    same_type = results(attention, inputs, grad, causal)

    def errors(found: dict[str, torch.Tensor]) -> dict[str, float]:
        return {name: (found[name].double() - exact[name]).abs().max().item() for name in exact}

    report = {
        "kernel": errors(kernel),
        "pytorch": errors(same_type),
        "identical": all(torch.equal(kernel[name], again[name]) for name in kernel),
        "launched": [record.name for record in launches()],
    }
    return report, {name: x.cpu() for name, x in {**dict(zip("qkv", inputs, strict=True)), **kernel}.items()}


tensors = []
for case in json.loads(sys.argv[2]):
    report, computed = run(**case)
    print(json.dumps(report), flush=True)
    tensors.append(computed)
torch.save(tensors, sys.argv[3])
