"""The quantiser kernels in plain torch, bit for bit: the same float32 steps in the same order.

key_lengths, wherever it is taken: int32 [B], how many of the Sk tokens of K and V a batch element has; None: all. The
others count for nothing and become zeros with scale 0.
"""

from __future__ import annotations

import math

import torch

from cute_attn.float32 import fma
from cute_attn.kernels.quantize_key_value import key_groups
from cute_attn.kernels.quantize_query import BLOCK_TOKENS
from cute_attn.kernels.quantize_statistics import CHUNK_TOKENS
from cute_attn.kernels.rounding import LARGEST
from cute_attn.kernels.rows import VECTOR, QuantizerConfig
from cute_attn.kernels.tile_image import TILE_TOKENS
from cute_attn.recipe import Recipe

__all__ = [
    "delta_scores",
    "key_mean",
    "quantize_keys",
    "quantize_query",
    "quantize_values",
    "query_mean",
    "value_mean",
    "value_scale",
]


def key_mean(k: torch.Tensor, key_lengths: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens of k [B, Hkv, Sk, D], Sk ≥ 1: float32 [B, Hkv, D], in the kernels' order of summation."""
    return _token_mean(k, key_lengths)


def value_mean(v: torch.Tensor, key_lengths: torch.Tensor | None = None) -> torch.Tensor:
    """The same of v."""
    return _token_mean(v, key_lengths)


def _token_mean(x: torch.Tensor, key_lengths: torch.Tensor | None) -> torch.Tensor:
    batch, heads, seq_k, head_dim = x.shape
    rows = QuantizerConfig(head_dim, "float16").rows_per_pass
    chunks = -(-seq_k // CHUNK_TOKENS)
    padded = torch.zeros(batch, heads, chunks * CHUNK_TOKENS, head_dim, dtype=torch.float32, device=x.device)
    padded[:, :, :seq_k] = _kept(x.float(), key_lengths)
    by_row = _sum_in_order(padded.reshape(batch, heads, chunks, CHUNK_TOKENS // rows, rows, head_dim), 3)
    counts = _lengths(x, key_lengths).clamp(min=1).float()
    return _sum_in_order(_sum_in_order(by_row, 3), 2) / counts[:, None, None]


def _lengths(x: torch.Tensor, key_lengths: torch.Tensor | None) -> torch.Tensor:
    """Tokens of every batch element of x [B, Hkv, Sk, D]: int32 [B]."""
    if key_lengths is None:
        return torch.full((x.shape[0],), x.shape[2], dtype=torch.int32, device=x.device)
    return key_lengths.clamp(0, x.shape[2])


def _kept(x: torch.Tensor, key_lengths: torch.Tensor | None) -> torch.Tensor:
    """x [B, Hkv, Sk, …] with zeros in place of the tokens past the end, whatever they hold."""
    tokens = torch.arange(x.shape[2], device=x.device)
    inside = tokens < _lengths(x, key_lengths)[:, None, None]
    return torch.where(inside.reshape(*inside.shape, *[1] * (x.ndim - 3)), x, torch.zeros_like(x))


def _sum_in_order(x: torch.Tensor, dim: int) -> torch.Tensor:
    total = torch.zeros_like(x.select(dim, 0))
    for part in x.unbind(dim):
        total = total + part
    return total


def value_scale(
    v: torch.Tensor,
    recipe: Recipe,
    v_mean: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scales of v [B, Hkv, Sk, D]: float32 [B, Hkv, D], per channel, or equal ones per tensor (batch and KV head).

    v_mean: `value_mean` of v if that is subtracted
    """
    amax = _kept(_smoothed(v, v_mean), key_lengths).abs().amax(2)
    if recipe.v_scale == "tensor":
        amax = amax.amax(-1, keepdim=True).expand_as(amax).contiguous()
    largest = recipe.largest_value
    scale = _power_of_two_scale(amax) if largest is None else _symmetric_scale(amax, largest)
    return torch.where(scale.isfinite(), scale, math.nan)


def _smoothed(x: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
    return x.float() if mean is None else x.float() - mean[:, :, None]


def quantize_keys(
    k: torch.Tensor,
    k_mean: torch.Tensor | None,
    keys: str = "int8",
    k_scale: str = "token",
    key_lengths: torch.Tensor | None = None,
    tokens: int = TILE_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """k [B, Hkv, Sk, D] in ``keys`` and its scales float32 [B, Hkv, Sk], after k_mean [B, Hkv, D] is subtracted.

    keys: "int8" or "int4" (−7…7), both as int8, or "e4m3"; k_scale: the tokens that share a scale, see `key_groups`;
    tokens: those of a tile, 64 or 128
    """
    x = _kept(_smoothed(k, k_mean), key_lengths)
    scale = _symmetric_scale(_amax_of_groups(x.abs().amax(-1), k_scale, tokens), LARGEST[keys])
    if keys != "e4m3":
        bits = (scale.view(torch.int32).long() + 3) & ~3
        rounded = bits.to(torch.int32).view(torch.float32)
        scale = torch.where(scale < math.inf, rounded, scale)
    scale = _kept(scale, key_lengths)
    return _quantised(x, scale[..., None], keys), scale


def _amax_of_groups(amax: torch.Tensor, k_scale: str, tokens: int) -> torch.Tensor:
    """amax [B, Hkv, Sk] of tokens -> the largest finite one of each token's group, or its own if that is not finite."""
    layout = key_groups(k_scale, tokens)
    members, groups = layout.extents()
    places = torch.tensor([[layout(m, g) for m in range(members)] for g in range(groups)], device=amax.device)
    finite = torch.where(amax < math.inf, amax, 0.0)
    tiles = torch.nn.functional.pad(finite, (0, -amax.shape[2] % tokens)).unflatten(2, (-1, tokens))
    shared = torch.empty_like(tiles)
    shared[..., places] = tiles[..., places].amax(-1, keepdim=True).expand(*tiles.shape[:-1], groups, members)
    return torch.where(amax < math.inf, shared.flatten(2)[..., : amax.shape[2]], amax)


def quantize_values(
    v: torch.Tensor,
    v_scale: torch.Tensor,
    recipe: Recipe,
    v_mean: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """v [B, Hkv, Sk, D] divided by v_scale float32 [B, Hkv, D], in the recipe's format of V.

    v_mean: float32 [B, Hkv, D], subtracted before, or None
    """
    return _quantised(_kept(_smoothed(v, v_mean), key_lengths), v_scale[:, :, None], recipe.pv_format)


def query_mean(q: torch.Tensor) -> torch.Tensor:
    """Mean of each block of 128 tokens of q [B, Hq, Sq, D]: [B, Hq, ceil(Sq/128), D] in q's dtype.

    Elements that are not finite count as 0; the last block is divided by the tokens that it has.
    """
    usable = _in_blocks(torch.where(q.isfinite(), q, 0).float())
    # The i-th token of a row of threads in the kernel, as (i // 4, row // 8, i % 4, row % 8).
    by_row = usable.unflatten(3, (2, 2, 4, 8)).permute(0, 1, 2, 3, 5, 4, 6, 7).reshape(*usable.shape[:3], 8, 16, -1)
    total = _sum_in_order(_sum_in_order(by_row, 3), 3)
    tokens = (q.shape[2] - BLOCK_TOKENS * torch.arange(total.shape[2], device=q.device)).clamp(max=BLOCK_TOKENS)
    return (total / tokens.float()[:, None]).to(q.dtype)


def quantize_query(
    q: torch.Tensor,
    k_mean: torch.Tensor | None,
    q_mean: torch.Tensor | None = None,
    keys: str = "int8",
    scale: str = "token",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q − q_mean [B, Hq, Sq, D] in ``keys``, q_scale and q_bias = q·k_mean (0 without), float32 [B, Hq, Sq].

    q_mean: of `query_mean`, or None; keys: as in `quantize_keys`; scale: tokens that share one, of `SCALE_GROUPS`
    """
    x = q.float()
    bias = torch.zeros(q.shape[:3], device=q.device)
    if k_mean is not None:
        mean = k_mean.repeat_interleave(q.shape[1] // k_mean.shape[1], 1)[:, :, None]
        bias = _dot_in_order(x, mean.expand_as(x))
    if q_mean is not None:
        x = x - q_mean.float().repeat_interleave(BLOCK_TOKENS, 2)[:, :, : q.shape[2]]
    amax = x.abs().amax(-1)
    peak = _group_amax(torch.where(amax < math.inf, amax, 0.0), scale)
    q_scale = _symmetric_scale(torch.where(amax < math.inf, peak, amax), LARGEST[keys])
    return _quantised(x, q_scale[..., None], keys), q_scale, bias


def delta_scores(
    q_mean: torch.Tensor, k: torch.Tensor, k_mean: torch.Tensor, key_lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """q̄·(k − k̄): float32 [B, Hq, Qb, T·64] of q_mean [B, Hq, Qb, D], k [B, Hkv, Sk, D] and k_mean [B, Hkv, D].

    Zeros past the end: of Sk, or of key_lengths [B]. In float32 as in the kernel, but sums in another order.
    """
    group = q_mean.shape[1] // k.shape[1]
    rows = q_mean.float()
    delta = rows @ k.float().repeat_interleave(group, 1).mT
    delta = delta - rows @ k_mean.repeat_interleave(group, 1)[..., None]
    tokens = torch.arange(k.shape[2], device=k.device)
    if key_lengths is not None:
        delta = torch.where(tokens < key_lengths[:, None, None, None], delta, 0.0)
    return torch.nn.functional.pad(delta, (0, -k.shape[2] % TILE_TOKENS))


def _in_blocks(x: torch.Tensor) -> torch.Tensor:
    """[B, Hq, Sq, …] -> [B, Hq, ceil(Sq/128), 128, …], zeros past the end."""
    blocks = -(-x.shape[2] // BLOCK_TOKENS)
    padded = x.new_zeros(*x.shape[:2], blocks * BLOCK_TOKENS, *x.shape[3:])
    padded[:, :, : x.shape[2]] = x
    return padded.unflatten(2, (blocks, BLOCK_TOKENS))


def _group_amax(amax: torch.Tensor, scale: str) -> torch.Tensor:
    """The largest of each token's group, [B, Hq, Sq]."""
    # (warp, r, g): token 32·warp + 8·r + g of its block
    groups = _in_blocks(amax).unflatten(3, (4, 4, 8))
    dims = {"token": (), "thread": (4,), "warp": (4, 5), "block": (3, 4, 5)}[scale]
    largest = groups.amax(dims, keepdim=True) if dims else groups
    return largest.expand_as(groups).flatten(2)[..., : amax.shape[2]]


def _dot_in_order(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Eight fused multiply-adds per lane, then a butterfly over the lanes of a row, farthest first; 2^n of them."""
    by_thread = [t.unflatten(-1, (-1, VECTOR)) for t in (x, y)]
    total = torch.zeros_like(by_thread[0][..., 0])
    for j in range(VECTOR):
        total = fma(by_thread[0][..., j], by_thread[1][..., j], total)
    lanes = 1 << (total.shape[-1] - 1).bit_length()
    total = torch.nn.functional.pad(total, (0, lanes - total.shape[-1]))
    while total.shape[-1] > 1:
        low, high = total.chunk(2, -1)
        total = low + high
    return total[..., 0]


def _symmetric_scale(amax: torch.Tensor, largest: float) -> torch.Tensor:
    scale = amax * torch.tensor(1.0 / largest, dtype=torch.float32)
    return torch.where(scale < 2.0**-126, 0.0, scale)


def _power_of_two_scale(amax: torch.Tensor) -> torch.Tensor:
    power = (amax.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(amax < math.inf, power, amax)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    usable = (scale > 0) & (scale < math.inf)
    return torch.where(usable, 1.0 / torch.where(usable, scale, 1.0), 0.0)


def _quantised(x: torch.Tensor, scale: torch.Tensor, form: str) -> torch.Tensor:
    """x/scale in format ``form``, half to even, clamped to its largest magnitude; 0 beside an inf or a NaN.

    These themselves mean nothing: −127 or −7 in INT8 and INT4, NaN in E4M3 and float16.
    """
    product = x * _inverse(scale)
    if form == "float16":
        return product.half()
    largest = LARGEST[form]
    clamped = product.clamp(-largest, largest)
    if form == "e4m3":
        # PyTorch's own conversion does not clamp, and keeps the sign of a NaN.
        return torch.where(product.isnan(), math.nan, clamped).to(torch.float8_e4m3fn)
    return torch.where(product.isnan(), -largest, clamped).round().to(torch.int8)
