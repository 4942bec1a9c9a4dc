"""What a recipe brings to the main loop of the warp-MMA attention kernels; the loop itself is the same for all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from .scores_int8 import Int8Scores
from .softmax_float import ACCUMULATORS, FloatSoftmax
from .softmax_int8 import IntegerSoftmax
from .tile_image import TileImage

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """Operand formats, scale access, softmax and conversion of P, as three factories; each is called once per warp.

    image:   head dim -> layout of one KV tile: ``nbytes``; the other two know what lies where in it
    scores:  Q and K. ``multiply`` (stage -> accumulators of Q·Kᵀ), ``dequantise`` (accumulators -> scores and row
             maxima, through a mask or not)
    softmax: P and V. ``bound_sums`` (before a chunk of tiles), ``update`` (row maxima), ``probabilities`` (scores -> A
             operand), ``accumulate`` (A operand, stage -> ``output``), ``row_totals``
    """

    image: Any
    scores: Any
    softmax: Any


RECIPES = {
    ("int8", "int32"): Recipe(TileImage, Int8Scores.create, IntegerSoftmax.create),
    **{
        ("int8_fp16", name): Recipe(
            partial(TileImage, values="float16"), Int8Scores.create, partial(FloatSoftmax.create, accumulator=how)
        )
        for name, how in ACCUMULATORS.items()
    },
}
"""By (recipe, accumulate)."""
