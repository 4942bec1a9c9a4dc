"""What a recipe brings to the main loop of the warpgroup-MMA attention kernels; the loop itself is the same for all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cutlass import BFloat16, Float16, Int8

from .ring_sources import TensorTiles, TileImages, tensor_maps
from .scores_warpgroup import WarpgroupScores
from .scores_warpgroup_float import WarpgroupFloatScores
from .softmax_log_linear import LogLinearSoftmax
from .softmax_warpgroup import WarpgroupSoftmax
from .softmax_warpgroup_float import WarpgroupFloatSoftmax
from .swizzled_tile import SwizzledTile
from .tile_image import TileImage

__all__ = ["LOG_LINEAR_RECIPES", "TILE_TOKENS", "WARPGROUP_RECIPES", "WarpgroupRecipe"]

TILE_TOKENS = 128
"""Tokens of a KV tile."""


@dataclass(frozen=True)
class WarpgroupRecipe:
    """Operand formats, scale access, softmax and conversion of P, as factories; each is called once per thread.

    accumulate: as of cute_attn.Recipe
    element: type of Q in memory
    turns:   1: K and V of a tile lie in one stage. 2: first K and then V, each in a stage of its own
    image:   head dim -> layout of one KV tile in shared memory: ``nbytes``; the others know what lies where in it
    maps:    host side, (K, V, tokens, image, cluster) -> what ``source`` needs besides the tensors, or None
    source:  how tiles get to shared memory: ``bring`` (tile, turn, stage, barrier), of a whole warp
    scores:  Q and K. ``multiply`` (stage -> sums of Q·Kᵀ), ``dequantise`` (sums -> scores, row maxima and factors,
             through a mask or not)
    softmax: P and V. ``bound_sums`` (before every ``chunk_tiles`` tiles, unless None), ``update`` (row maxima),
             ``probabilities`` (scores -> A operand), ``accumulate`` (A operand, stage -> ``output``), ``finish``
             (after the last tile, of whole warps), ``row_totals``
    """

    accumulate: str
    element: Any
    turns: int
    image: Any
    maps: Any
    source: Any
    scores: Any
    softmax: Any

    @property
    def quantised(self) -> bool:
        """Whether Q comes with scales, and K and V as tile images."""
        return self.element is Int8

    @property
    def query_bytes(self) -> int:
        """Bytes of an element of Q."""
        return self.element.width // 8


def _images(keys: str, values: str, accumulate: str) -> WarpgroupRecipe:
    image = partial(TileImage, keys=keys, values=values, tokens=TILE_TOKENS, sum_rows=8)
    return WarpgroupRecipe(
        accumulate, Int8, 1, image, _no_maps, TileImages.create, WarpgroupScores.create, WarpgroupSoftmax.create
    )


def _no_maps(*_: Any) -> None:
    return None


def _float(values: str, element: Any) -> WarpgroupRecipe:
    return WarpgroupRecipe(
        "float32",
        element,
        2,
        partial(SwizzledTile, values=values, tokens=TILE_TOKENS),
        tensor_maps,
        TensorTiles.create,
        WarpgroupFloatScores.create,
        WarpgroupFloatSoftmax.create,
    )


WARPGROUP_RECIPES = {
    "int8_fp8": _images("int8", "e4m3", "float32+float32"),
    "fp8": _images("e4m3", "e4m3", "float32+float32"),
    "int8": _images("int8", "int8", "int32"),
    "int8_fp16": _images("int8", "float16", "float32"),
    "fp16": _float("float16", Float16),
    "bf16": _float("bfloat16", BFloat16),
}
"""By name."""

LOG_LINEAR_RECIPES = {
    name: replace(
        WARPGROUP_RECIPES[name],
        scores=partial(WarpgroupScores.create, keeps_integers=True),
        softmax=LogLinearSoftmax.create,
    )
    for name in ("int8_fp8", "fp8")
}
"""By name, with exponent "fast"."""
