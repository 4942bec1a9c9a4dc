"""Low-bit attention for NVIDIA GPUs since Ampere, in the CuTe DSL.

    out = cute_attn.attention(q, k, v, recipe="int8", causal=True)

See `attention`, `quantize`, `recipes` and `supports`. Importing this package does not import the CuTe DSL; the first
call does.
"""

from __future__ import annotations

from importlib import metadata as _metadata

from cute_attn.attention import attention
from cute_attn.dispatch import Support, supports
from cute_attn.problem import Problem
from cute_attn.quantize import quantize, quantize_key_value, quantize_query
from cute_attn.quantized import QuantizedKeyValue, QuantizedQuery
from cute_attn.recipe import Recipe, recipes
from cute_attn.tile_config import TileConfig, WarpgroupTileConfig

__version__ = _metadata.version("cute-attn")

__all__ = [
    "Problem",
    "QuantizedKeyValue",
    "QuantizedQuery",
    "Recipe",
    "Support",
    "TileConfig",
    "WarpgroupTileConfig",
    "attention",
    "quantize",
    "quantize_key_value",
    "quantize_query",
    "recipes",
    "supports",
]
