"""The attention kernels in plain torch: what they compute, rounding by rounding.

Integer steps are exact, float steps are rounded where the kernel rounds them. Not reproduced are the order in which an
MMA adds its products and the last bits of the GPU's approximate 2^x, logarithm and reciprocal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cute_attn import float32, quantizer_simulator
from cute_attn.kernels.quantize_query import BLOCK_TOKENS
from cute_attn.kernels.tile_image import TILE_TOKENS
from cute_attn.recipe import Recipe, as_recipe
from cute_attn.simulator_rows import Rows, rows_of
from cute_attn.tile_images import unpack_tile_images

__all__ = ["attention", "attention_on_image", "attention_quantised", "attention_unquantised"]

_SMALLEST_ROW_SCALE = 2.0**-100
_CHUNK_TOKENS = 16384


def attention_quantised(
    query: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    keys: tuple[torch.Tensor, torch.Tensor],
    values: tuple[torch.Tensor, torch.Tensor],
    *,
    delta: torch.Tensor | None = None,
    v_mean: torch.Tensor | None = None,
    key_lengths: Sequence[int] | None = None,
    recipe: str | Recipe = "int8",
    causal: bool,
    softmax_scale: float,
    out_dtype: torch.dtype = torch.float16,
    warp_rows: int = 32,
    cta_rows: int = 128,
    tile_tokens: int = TILE_TOKENS,
    pack_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention kernel on plain quantised tensors.

    query:  [B, Hq, Sq, D] in the recipe's qk_format (integers as int8), scale and bias float32 [B, Hq, Sq]
    keys:   [B, Hkv, Sk, D] in the same format, scale float32 [B, Hkv, Sk] (of integers: 22 significant bits)
    values: [B, Hkv, Sk, D] in the recipe's pv_format, scale float32 [B, Hkv, D]
    delta:  float32 [B, Hq, ceil(Sq/128), ≥ Sk] of a smoothed Q, added to the scores of 128 rows
    v_mean: float32 [B, Hkv, D] of a smoothed V, added to the output
    key_lengths: keys of every batch element, as if clamped to 0 … Sk; None: all have Sk
    warp_rows, cta_rows: query rows of one warp (they share the decision to rescale) and of one CTA
    tile_tokens: keys of a KV tile
    pack_gqa: whether a KV head's query heads are one, token by token, which decides what shares a warp; without delta

    Returns out ``out_dtype`` [B, Hq, Sq, D] and lse float32 [B, Hq, Sq].
    """
    if key_lengths is not None:
        results = []
        for b, length in enumerate(key_lengths):
            one, seen = slice(b, b + 1), slice(min(max(length, 0), keys[0].shape[2]))
            results.append(
                attention_quantised(
                    (query[0][one], query[1][one], query[2][one]),
                    (keys[0][one, :, seen], keys[1][one, :, seen]),
                    (values[0][one, :, seen], values[1][one]),
                    delta=None if delta is None else delta[one],
                    v_mean=None if v_mean is None else v_mean[one],
                    recipe=recipe,
                    causal=causal,
                    softmax_scale=softmax_scale,
                    out_dtype=out_dtype,
                    warp_rows=warp_rows,
                    cta_rows=cta_rows,
                    tile_tokens=tile_tokens,
                    pack_gqa=pack_gqa,
                )
            )
        return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])
    together = query[0].shape[1] // keys[0].shape[1] if pack_gqa else 1
    q, q_scale, q_bias = (_packed(x, together) for x in query)
    batch, heads, seq_q, head_dim = q.shape
    (k, k_scale), (v, v_scale) = keys, values
    group = heads // k.shape[1]
    k, v, k_scale, v_scale = (x.repeat_interleave(group, 1) for x in (k, v, k_scale, v_scale))
    v_mean = torch.zeros_like(v_scale) if v_mean is None else v_mean.repeat_interleave(group, 1)

    padded = -(-seq_q // cta_rows) * cta_rows
    q_rows = torch.zeros(batch, heads, padded, head_dim, dtype=torch.float32, device=q.device)
    q_rows[:, :, :seq_q] = q.float()
    row_scale = torch.zeros(batch, heads, padded, dtype=torch.float32, device=q.device)
    factor = torch.tensor(softmax_scale * math.log2(math.e), dtype=torch.float32)
    row_scale[:, :, :seq_q] = q_scale if delta is not None else q_scale * factor
    # A non-finite scale must not decide anything here: its row is made NaN at the end.
    row_scale = row_scale.nan_to_num(0.0, 0.0).clamp(min=_SMALLEST_ROW_SCALE)

    def scores(tokens: slice) -> torch.Tensor:
        products = q_rows @ k[:, :, tokens].float().mT
        y = (products.double() * k_scale[:, :, None, tokens].double()).float().nan_to_num(-math.inf)
        return y if delta is None else float32.fma(y, row_scale[..., None], delta[:, :, blocks, tokens])

    if delta is not None:  # whose rows meet all of Q's rows in the scores, so that these have Q's scale already
        blocks = (torch.arange(padded) // BLOCK_TOKENS).clamp(max=delta.shape[2] - 1)
    of_scores = row_scale if delta is None else factor.expand_as(row_scale).clamp(min=_SMALLEST_ROW_SCALE)
    rows = rows_of(as_recipe(recipe))(of_scores, head_dim, warp_rows)
    visible = _visit_tiles(rows, scores, v.float(), seq_q, cta_rows, causal, tile_tokens, together)
    out, lse = _finish(rows, visible, q_scale, q_bias, v_scale, v_mean, softmax_scale, out_dtype)
    return _unpacked(out, together), _unpacked(lse, together)


def _packed(x: torch.Tensor, together: int) -> torch.Tensor:
    """[B, H, S, …] -> [B, H / together, S · together, …]: row p is token p // together of the p % together-th head."""
    return x.unflatten(1, (-1, together)).transpose(2, 3).flatten(2, 3)


def _unpacked(x: torch.Tensor, together: int) -> torch.Tensor:
    """The way back."""
    return x.unflatten(2, (-1, together)).transpose(2, 3).flatten(1, 2)


def _visit_tiles(
    rows: Rows,
    scores: Callable[[slice], torch.Tensor],
    v: torch.Tensor,
    seq_q: int,
    cta_rows: int,
    causal: bool,
    tile_tokens: int,
    together: int,
) -> torch.Tensor:
    """All KV tiles, from the last to the first; returns, per query, whether it sees a key.

    together: rows of a token
    scores: y float32 [B, Hq, rows, tokens] of the tokens of one tile; v: float32 [B, Hq, Sk, D]
    """
    seq_k = v.shape[2]
    limit, unmasked = _visible_keys(rows.scale.shape[2], seq_q, seq_k, cta_rows, causal, together, v.device)
    first_full = unmasked // tile_tokens - 1
    for tile in reversed(range(-(-seq_k // tile_tokens))):
        tokens = slice(tile * tile_tokens, min((tile + 1) * tile_tokens, seq_k))
        rows.bound_sums((first_full >= tile) & ((first_full - tile) % (_CHUNK_TOKENS // tile_tokens) == 0))
        hidden = torch.arange(tokens.start, tokens.stop, device=v.device) >= limit[:, None]
        y = scores(tokens).masked_fill(hidden, -math.inf)
        rows.make_room(y)
        rows.accumulate(y, v[:, :, tokens])
    return limit[:seq_q] > 0


def attention_unquantised(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    recipe: Recipe,
    causal: bool,
    softmax_scale: float,
    warp_rows: int,
    cta_rows: int,
    tile_tokens: int = TILE_TOKENS,
    pack_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention kernel of recipes that take q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D] as they are."""
    together = q.shape[1] // k.shape[1] if pack_gqa else 1
    q = _packed(q, together)
    batch, heads, seq_q, head_dim = q.shape
    k, v = (x.float().repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    padded = -(-seq_q // cta_rows) * cta_rows
    q_rows = q.new_zeros(batch, heads, padded, head_dim, dtype=torch.float32)
    q_rows[:, :, :seq_q] = q.float()
    row_scale = torch.full(q_rows.shape[:3], softmax_scale * math.log2(math.e), device=q.device)
    rows = rows_of(recipe)(row_scale.clamp(min=_SMALLEST_ROW_SCALE), head_dim, warp_rows)

    def scores(tokens: slice) -> torch.Tensor:
        return q_rows @ k[:, :, tokens].mT

    visible = _visit_tiles(rows, scores, v, seq_q, cta_rows, causal, tile_tokens, together)
    ones, zeros = torch.ones_like(row_scale[:, :, :seq_q]), torch.zeros_like(row_scale[:, :, :seq_q])
    per_channel = v.new_ones(batch, heads, head_dim), v.new_zeros(batch, heads, head_dim)
    out, lse = _finish(rows, visible, ones, zeros, *per_channel, softmax_scale, q.dtype)
    return _unpacked(out, together), _unpacked(lse, together)


def _visible_keys(
    rows: int, seq_q: int, seq_k: int, cta_rows: int, causal: bool, together: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per query row: how many keys it sees, and how many all rows of its CTA see."""
    row = torch.arange(rows, device=device)
    if not causal:
        return torch.full_like(row, seq_k), torch.full_like(row, seq_k)
    tokens = (r // together for r in (row, row // cta_rows * cta_rows))
    limit, least = ((t + 1 + seq_k - seq_q // together).clamp(0, seq_k) for t in tokens)
    return limit, least


def _finish(
    rows: Rows,
    visible: torch.Tensor,
    q_scale: torch.Tensor,
    q_bias: torch.Tensor,
    v_scale: torch.Tensor,
    v_mean: torch.Tensor,
    softmax_scale: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE. ``visible``, per query: whether it sees a key; a row that does and sums up to 0 becomes NaN."""
    seq_q = len(visible)
    row_sum, bias = rows.row_sum[:, :, :seq_q], rows.bias[:, :, :seq_q]
    empty = row_sum == 0
    poisoned = ~(torch.isfinite(q_scale) & torch.isfinite(q_bias)) | (empty & visible)
    inverse = torch.where(empty, 0.0, 1.0 / row_sum.float())
    out = rows.output[:, :, :seq_q].float() * inverse[..., None] * v_scale[:, :, None] + v_mean[:, :, None]
    out = out.masked_fill(empty[..., None], 0.0).masked_fill(poisoned[..., None], math.nan)
    log2_sum = torch.where(empty, -math.inf, torch.log2(row_sum.double()) - bias.double())
    lse = log2_sum * math.log(2) + softmax_scale * q_bias.double()
    lse = lse.masked_fill(empty, -math.inf).masked_fill(poisoned, math.nan)
    return out.to(out_dtype), lse.float()


def attention_on_image(
    query: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    image: torch.Tensor,
    v_scale: torch.Tensor,
    seq_k: int,
    *,
    recipe: str | Recipe = "int8",
    tile_tokens: int = TILE_TOKENS,
    sum_rows: int = 0,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_quantised` on the tile images that the kernel reads: uint8 [B, Hkv, ceil(Sk/tile_tokens), bytes].

    tile_tokens, sum_rows: `TileImage`'s ``tokens`` and ``sum_rows``
    """
    recipe = as_recipe(recipe)
    formats = (recipe.pv_format, recipe.qk_format)
    k, k_scale, v = unpack_tile_images(image, query[0].shape[-1], seq_k, *formats, tile_tokens, sum_rows)
    return attention_quantised(query, (k, k_scale), (v, v_scale), recipe=recipe, tile_tokens=tile_tokens, **options)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    recipe: str | Recipe = "int8",
    causal: bool = False,
    softmax_scale: float | None = None,
    smooth_k: bool = True,
    key_lengths: torch.Tensor | None = None,
    warp_rows: int = 32,
    cta_rows: int = 128,
    tile_tokens: int = TILE_TOKENS,
    pack_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantisers and attention on q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D], float16 or bfloat16 (float32 also works).

    smooth_k: False shows what smoothing is good for; no kernel does without. key_lengths: int32 [B], or None

    Returns out in q's dtype and lse float32 [B, Hq, Sq], as `cute_attn.attention` does.
    """
    recipe = as_recipe(recipe)
    softmax_scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    tiles: dict[str, Any] = {
        "warp_rows": warp_rows,
        "cta_rows": cta_rows,
        "tile_tokens": tile_tokens,
        "pack_gqa": pack_gqa,
    }
    options: dict[str, Any] = {"recipe": recipe, "causal": causal, "softmax_scale": softmax_scale, **tiles}
    if key_lengths is not None:  # a batch element is a call of its own, with as many keys as it has
        lengths = key_lengths.clamp(0, k.shape[2]).tolist()
        one = [
            attention(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], smooth_k=smooth_k, **options)
            for b, n in enumerate(lengths)
        ]
        return torch.cat([out for out, _ in one]), torch.cat([lse for _, lse in one])
    if k.shape[2] == 0:
        return torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, device=q.device)
    if not recipe.quantises:
        return attention_unquantised(q, k, v, **options)
    k_mean = quantizer_simulator.key_mean(k) if smooth_k else torch.zeros_like(k[:, :, 0], dtype=torch.float32)
    v_mean = quantizer_simulator.value_mean(v) if recipe.smooth_v else None
    v_scale = quantizer_simulator.value_scale(v, recipe, v_mean)
    q_mean = quantizer_simulator.query_mean(q) if recipe.smooth_q else None
    formats = (recipe.qk_format, str(recipe.qk_scale))
    return attention_quantised(
        quantizer_simulator.quantize_query(q, k_mean, q_mean, *formats),
        quantizer_simulator.quantize_keys(k, k_mean, *formats, tokens=tile_tokens),
        (quantizer_simulator.quantize_values(v, v_scale, recipe, v_mean), v_scale),
        delta=None if q_mean is None else quantizer_simulator.delta_scores(q_mean, k, k_mean),
        v_mean=v_mean,
        out_dtype=q.dtype,
        **options,
    )
