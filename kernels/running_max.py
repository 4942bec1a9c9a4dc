"""The running maximum of an online softmax: whole numbers in base 2, raised only when a score passes what they cover.

With x = y·row_scale the scores of a row in base 2, the row holds an integer m, kept as bias = top - m, and its
probabilities are P = 2^(x + bias) <= 2^top. Nothing of the row is touched while y <= `score_limit`. Otherwise m rises
to ceil(x_max + headroom), and what was accumulated is multiplied by 2^(old m - new m): a power of two, hence exact in
floats unless they underflow, and in integers but for the bits shifted out.

P above 2^top would break what the recipes rely on, so every rounding goes to the safe side: x, the headroom and bias
are rounded such that P is too small rather than too large, and a relative margin in the limit covers its approximate
reciprocal. Where |m| is beyond 2^20 the margin eats the headroom, and rows are rescaled more often than they need be.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.math import RoundingMode

__all__ = ["UNSEEN", "quad_max", "raised_bias", "score_limit"]

UNSEEN = float(2**100)
"""Bias of a row that has seen no key: larger than any score is negative, small enough that -inf stays -inf."""

_MARGIN = float(2**-20)
_UP, _DOWN, _NEAREST = RoundingMode.UP, RoundingMode.DOWN, RoundingMode.NEAREST_EVEN


def quad_max(y: Float32) -> Float32:
    """The largest ``y`` of the four lanes that share an accumulator row."""
    y = cute.arch.fmax(y, cute.arch.shuffle_sync_bfly(y, 1))
    return cute.arch.fmax(y, cute.arch.shuffle_sync_bfly(y, 2))


def raised_bias(bias: Float32, y: Float32, row_scale: Float32, top: float, headroom: float) -> Float32:
    """The bias of a row whose largest score so far may be ``y``; never larger than ``bias``."""
    x = cute.math.mul(y, row_scale, rounding=_UP)
    m = cute.math.ceil(cute.math.add(x, Float32(headroom), rounding=_UP))
    return cute.arch.fmin(bias, cute.math.add(Float32(top), -m, rounding=_DOWN))


def score_limit(bias: Float32, row_scale: Float32, top: float) -> Float32:
    """The largest score y that a row covers.

    The explicit roundings also keep multiplication and addition apart: where they are contracted to FFMA in this
    rarely taken code, ptxas spills a dozen registers in the main loop.
    """
    m = cute.math.add(Float32(top), -bias, rounding=_NEAREST)
    margin = cute.math.mul(cute.math.abs(m), Float32(-_MARGIN), rounding=_NEAREST)
    reciprocal = cute.math.rcp(row_scale, approx=True, ftz=True)
    return cute.math.add(m, margin, rounding=_NEAREST) * reciprocal
