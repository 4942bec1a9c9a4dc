"""From a recipe and a tile config to the attention kernel's class and static configuration, nothing compiled yet."""

from __future__ import annotations

import functools
from typing import Any

from cute_attn.recipe import Recipe
from cute_attn.tile_config import AnyTileConfig, TileConfig

__all__ = ["KERNEL_RECIPES", "attention_kernel", "shared_bytes"]

KERNEL_RECIPES = {
    ("int8", "int8"): "int8",
    ("int8", "float16"): "int8_fp16",
    ("int8", "e4m3"): "int8_fp8",
    ("e4m3", "e4m3"): "fp8",
    ("int4", "int8"): "int4_int8",
    ("int4", "float16"): "int4_fp16",
    ("float16", "float16"): "fp16",
    ("bfloat16", "bfloat16"): "bf16",
}
"""The kernels' names of recipes by (qk_format, pv_format)."""


def attention_kernel(
    recipe: Recipe,
    head_dim: int,
    dtype: str,
    causal: bool,
    tile: AnyTileConfig,
    *,
    has_lse: bool = False,
    varlen_k: bool = False,
    out_align: int = 16,
) -> tuple[Any, Any]:
    """The kernel class that ``tile`` belongs to, and its configuration."""
    common: dict[str, Any] = {
        "head_dim": head_dim,
        "out_dtype": dtype,
        "causal": causal,
        "has_lse": has_lse,
        "out_align": out_align,
        "recipe": KERNEL_RECIPES[recipe.qk_format, recipe.pv_format],
        "accumulate": recipe.accumulate,
        "smooth_v": recipe.smooth_v,
        "varlen_k": varlen_k,
        "stages": tile.stages,
    }
    if isinstance(tile, TileConfig):
        from cute_attn.kernels.attention_sm80 import AttentionConfig, AttentionSm80

        config = AttentionConfig(**common, smooth_q=recipe.smooth_q, warps=tile.warps, m_tiles=tile.m_tiles)
        return AttentionSm80, config
    from cute_attn.kernels.attention_sm90 import AttentionSm90, AttentionSm90Config

    own = {
        "k_scale_per_token": recipe.qk_scale == "token",
        "exponent": recipe.exponent,
        "fma_eighths": tile.fma_eighths,
        "overlap": tile.overlap,
        "cluster": tile.cluster,
        "warpgroups": tile.warpgroups,
        "pack_gqa": tile.pack_gqa,
        "persistent": tile.persistent,
    }
    return AttentionSm90, AttentionSm90Config(**common, **own)


@functools.lru_cache(maxsize=1024)
def shared_bytes(recipe: Recipe, head_dim: int, tile: AnyTileConfig) -> int:
    """Bytes of dynamic shared memory that a CTA takes."""
    kernel_class, config = attention_kernel(recipe, head_dim, recipe.dtypes[0], False, tile)
    return kernel_class(config).shared_bytes
