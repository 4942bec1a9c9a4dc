"""The quantiser kernels in plain torch, bit for bit: the same float32 steps in the same order."""

from __future__ import annotations

import math

import torch

from cute_attn.float32 import fma
from cute_attn.kernels.quantize_statistics import CHUNK_TOKENS
from cute_attn.kernels.rows import THREADS, VECTOR
from cute_attn.recipe import Recipe

__all__ = ["key_mean", "quantize_keys", "quantize_query", "quantize_values", "value_scale"]


def key_mean(k: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of k [B, Hkv, Sk, D], Sk ≥ 1: float32 [B, Hkv, D], in the kernels' order of summation."""
    batch, heads, seq_k, head_dim = k.shape
    rows = THREADS * VECTOR // head_dim
    chunks = -(-seq_k // CHUNK_TOKENS)
    padded = torch.zeros(batch, heads, chunks * CHUNK_TOKENS, head_dim, dtype=torch.float32, device=k.device)
    padded[:, :, :seq_k] = k.float()
    by_row = _sum_in_order(padded.reshape(batch, heads, chunks, CHUNK_TOKENS // rows, rows, head_dim), 3)
    return _sum_in_order(_sum_in_order(by_row, 3), 2) / float(seq_k)


def _sum_in_order(x: torch.Tensor, dim: int) -> torch.Tensor:
    total = torch.zeros_like(x.select(dim, 0))
    for part in x.unbind(dim):
        total = total + part
    return total


def value_scale(v: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Scales of v [B, Hkv, Sk, D]: float32 [B, Hkv, D], per channel, or equal ones per tensor (batch and KV head)."""
    amax = v.float().abs().amax(2)
    if recipe.v_scale == "tensor":
        amax = amax.amax(-1, keepdim=True).expand_as(amax).contiguous()
    return _power_of_two_scale(amax) if recipe.pv_format == "float16" else _symmetric_scale(amax)


def quantize_keys(k: torch.Tensor, k_mean: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """k int8 [B, Hkv, Sk, D] and its scales float32 [B, Hkv, Sk], per token, after k_mean [B, Hkv, D] is subtracted."""
    x = k.float() if k_mean is None else k.float() - k_mean[:, :, None]
    scale = _symmetric_scale(x.abs().amax(-1))
    bits = (scale.view(torch.int32).long() + 3) & ~3
    rounded = bits.to(torch.int32).view(torch.float32)
    scale = torch.where(scale < math.inf, rounded, scale)
    return _to_int8(x, scale[..., None]), scale


def quantize_values(v: torch.Tensor, v_scale: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """v [B, Hkv, Sk, D] divided by v_scale float32 [B, Hkv, D], in the recipe's format of V: int8 or float16."""
    scale = v_scale[:, :, None]
    return (v.float() * _inverse(scale)).half() if recipe.pv_format == "float16" else _to_int8(v.float(), scale)


def quantize_query(q: torch.Tensor, k_mean: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q int8 [B, Hq, Sq, D], q_scale and q_bias = q·k_mean (0 without k_mean), float32 [B, Hq, Sq]."""
    x = q.float()
    scale = _symmetric_scale(x.abs().amax(-1))
    bias = torch.zeros_like(scale)
    if k_mean is not None:
        mean = k_mean.repeat_interleave(q.shape[1] // k_mean.shape[1], 1)[:, :, None]
        bias = _dot_in_order(x, mean.expand_as(x))
    return _to_int8(x, scale[..., None]), scale, bias


def _dot_in_order(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Eight fused multiply-adds per thread, then a butterfly over the threads of a row, farthest first."""
    by_thread = [t.unflatten(-1, (-1, VECTOR)) for t in (x, y)]
    total = torch.zeros_like(by_thread[0][..., 0])
    for j in range(VECTOR):
        total = fma(by_thread[0][..., j], by_thread[1][..., j], total)
    while total.shape[-1] > 1:
        low, high = total.chunk(2, -1)
        total = low + high
    return total[..., 0]


def _symmetric_scale(amax: torch.Tensor) -> torch.Tensor:
    scale = amax * torch.tensor(1.0 / 127.0, dtype=torch.float32)
    return torch.where(scale < 2.0**-126, 0.0, scale)


def _power_of_two_scale(amax: torch.Tensor) -> torch.Tensor:
    power = (amax.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(amax < math.inf, power, amax)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    usable = (scale > 0) & (scale < math.inf)
    return torch.where(usable, 1.0 / torch.where(usable, scale, 1.0), 0.0)


def _to_int8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """round(x/scale), half to even, clamped to ±127; −127 for an inf or a NaN, 0 for its finite neighbours."""
    product = x * _inverse(scale)
    clamped = torch.where(product.isnan(), -127.0, product.clamp(-127.0, 127.0))
    return clamped.round().to(torch.int8)
