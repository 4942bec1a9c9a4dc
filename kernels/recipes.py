"""What a recipe brings to the main loop of the warp-MMA attention kernels; the loop itself is the same for all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from cutlass import BFloat16, Float8E4M3FN, Float16, Int8

from .kv_sources import ImageSource, RowSource
from .row_tile import RowTile
from .scores_float import FloatScores
from .scores_integer import IntegerScores
from .softmax_float import ACCUMULATORS, E4M3_ACCUMULATORS, Accumulator, FloatSoftmax
from .softmax_int8 import IntegerSoftmax
from .tile_image import TileImage

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """Operand formats, scale access, softmax and conversion of P, as factories; each is called once per warp.

    element: type of Q; two elements of INT4 are one Int8
    image:   head dim -> layout of one KV tile in shared memory: ``nbytes``; the others know what lies where in it
    source:  how tiles get there: ``copy`` (stage)
    scores:  Q and K. ``multiply`` (stage -> accumulators of Q·Kᵀ), ``dequantise`` (accumulators -> scores and row
             maxima, through a mask or not)
    softmax: P and V. ``bound_sums`` (before every ``chunk_tiles`` tiles, unless None), ``update`` (row maxima),
             ``probabilities`` (scores -> A operand), ``accumulate`` (A operand, stage -> ``output``), ``row_totals``
    """

    element: Any
    image: Any
    source: Any
    scores: Any
    softmax: Any

    @property
    def quantised(self) -> bool:
        """Whether Q comes as bytes with scales, and K and V as tile images."""
        return self.query_bytes == 1

    @property
    def takes_delta(self) -> bool:
        """Whether what smoothing Q took off the scores can be added to them."""
        return self.element is Int8

    @property
    def query_bytes(self) -> int:
        """Bytes of an element of Q."""
        return self.element.width // 8


def _integer(keys: str, values: str, softmax: Any) -> Recipe:
    image = partial(TileImage, keys=keys, values=values)
    return Recipe(Int8, image, ImageSource.create, IntegerScores.create, softmax)


def _e4m3(keys: str, accumulator: Accumulator) -> Recipe:
    softmax = partial(FloatSoftmax.create, accumulator=accumulator, element=Float8E4M3FN)
    if keys == "int8":
        return _integer(keys, "e4m3", softmax)
    scores = partial(FloatScores.create, element=Float8E4M3FN)
    image = partial(TileImage, keys=keys, values="e4m3")
    return Recipe(Float8E4M3FN, image, ImageSource.create, scores, softmax)


def _float(element: Any) -> Recipe:
    softmax = partial(FloatSoftmax.create, accumulator=ACCUMULATORS["float32"], element=element)
    return Recipe(element, RowTile, RowSource.create, partial(FloatScores.create, element=element), softmax)


RECIPES = {
    ("int8", "int32"): _integer("int8", "int8", IntegerSoftmax.create),
    ("int4_int8", "int32"): _integer("int4", "int8", IntegerSoftmax.create),
    **{
        (f"{keys}_fp16", name): _integer(keys, "float16", partial(FloatSoftmax.create, accumulator=how))
        for keys in ("int8", "int4")
        for name, how in ACCUMULATORS.items()
    },
    **{
        (name, how): _e4m3(keys, accumulator)
        for name, keys in (("int8_fp8", "int8"), ("fp8", "e4m3"))
        for how, accumulator in E4M3_ACCUMULATORS.items()
    },
    ("fp16", "float32"): _float(Float16),
    ("bf16", "float32"): _float(BFloat16),
}
"""By (recipe, accumulate)."""
