"""Online softmax of a warpgroup's rows whose P in E4M3 is a line over the scores: no 2^x, no conversion."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.math import RoundingMode

from .ptx import ceil_to_int, log_linear_e4m3, log_linear_e4m3_of_integers
from .softmax_warpgroup import WarpgroupSoftmax

__all__ = ["LogLinearSoftmax"]

# Of P = 2^(e+f), 0 <= f < 1, the E4M3 byte is 8·(e + 7 + 2^f - 1), rounded: 2^f - 1 is f less 0 … 0.086. The mean of
# that is .0573; P's error is least, 3.14 % in root mean square, about there (rounding 2^x itself: 2.65 %).
_OFFSET = 7 - 0.0575

_LARGEST_BYTE = 126  # 448; 127 is NaN

# Fixed point of the integer line: a byte is the highest of 32 bits, so a unit of x is 8·2^24.
_ONE = float(1 << 24)
_UNIT = 8 * _ONE
_LOWEST = -(1 << 30)


@dataclass(frozen=True)
class LogLinearSoftmax(WarpgroupSoftmax):
    """State of a warpgroup's rows as in `WarpgroupSoftmax`, with V in E4M3 and
        P's byte = round(8·(x + bias + _OFFSET)), clamped to 0 … 126,
    which is log2(P) as a straight line between powers of two. Hidden scores, -inf, give 0. Row sums are of the very P
    that is multiplied, as always, so that what P is too large or too small by on average does not show in the output.

    126 is never passed. Floats: x + bias <= top before it is rounded, the sum of bias and offset is rounded down and
    the products by 1/16 and 128 are exact, and 8·(top + _OFFSET) = 125.9988. Integers: the product is clamped.
    """

    def _line(self, scores: cute.Tensor, r: int, factor: Float32) -> tuple:
        if const_expr(scores.element_type is Int32):
            return self._integer_line(r, factor)
        offset = cute.math.add(self.bias[r], Float32(_OFFSET), rounding=RoundingMode.DOWN)
        return factor * (1 / 16), offset * (1 / 16)

    def _integer_line(self, r: int, factor: Float32) -> tuple[Int32, Int32, Int32]:
        """Of integer scores s: byte = min(max(s + offset, 0), limit)·slope >> 24, at any factor and bias.

        slope:  rounded to nearest, but not to 0, which moves a byte by less than |s|·2^-25, 1/8 for the largest s of
                head dim 256; capped where a step of s is a whole byte range and the largest s alone counts
        offset: of that slope, rounded up: the largest s of a row has s + offset >= 1, so that no row vanishes (of
                scores up to 2^25 in base 2). Moves bytes by a step of s, slope·2^-24, at most, which is small beside
                the rounding of Q and K to INT8, and by 1/64 for every 2^13 that a score in base 2 has
        limit:  limit·slope < 127·2^24, whatever was rounded before
        No sum wraps: s + offset <= 2^31·126.5/128 where a row covers s, and offset >= -2^30 is small enough for 0.
        """
        scaled = cute.arch.fmax(cute.math.fma(factor, Float32(_UNIT), Float32(-0.5)), Float32(0.5))
        slope = ceil_to_int(cute.arch.fmin(scaled, Float32(_LARGEST_BYTE * _ONE)))
        inverse = cute.math.rcp(cute.arch.fmax(slope.to(Float32), scaled), approx=True, ftz=True)
        at_zero = cute.math.fma(self.bias[r], Float32(_UNIT), Float32(_OFFSET * _UNIT + _ONE / 2))
        offset = ceil_to_int(cute.arch.fmax(at_zero * inverse, Float32(_LOWEST)))
        limit = cute.arch.fmax(inverse * ((_LARGEST_BYTE + 1 - 2**-10) * _ONE), Float32(1))
        return slope, offset, limit.to(Int32)

    def _register(self, scores: list, line: tuple, place: int) -> Int32:
        if const_expr(isinstance(scores[0], Int32)):
            return log_linear_e4m3_of_integers(scores, *line)
        return log_linear_e4m3(scores, *line)
