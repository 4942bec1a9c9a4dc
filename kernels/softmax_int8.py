"""Online softmax of recipe int8: probabilities as u8, output and row sums in int32, the maximum in powers of two."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int8, Int32, Uint8

from .atoms import MmaInt8Op, ldmatrix_atom, mma_in_place
from .operand_planes import b_fragment_offset, lane_index
from .ptx import any_greater, pack_bytes_f16, shift_right
from .running_max import UNSEEN, quad_max, raised_bias, score_limit
from .tile_image import TILE_TOKENS, TileImage

__all__ = ["IntegerSoftmax"]

_LOG2_255 = 7.994353436858858

_HEADROOM = 0.5

# 2^31 / 127 less what 256 tiles of 64 probabilities of at most 255 can add, rounded down.
_SUM_BOUND = 12_700_000


@dataclass(frozen=True)
class IntegerSoftmax:
    """State of one warp's rows; R = 2·m_tiles rows per lane, row r is accumulator row 16·(r//2) + 8·(r%2) + lane//4.

    With x = y·row_scale the scores in base 2 and `running_max` with 2^top = 255, for larger ones would wrap,
        P = u8(2^(x + bias)),   output = Σ P·V,   row_sum = Σ P      (int32).
    While no score of the warp passes its row's limit nothing of the state is touched: a tile costs one FFMA and one
    MUFU per score and no work on the output. Otherwise m rises to ceil(x_max + ½) and output and row sum are shifted
    right. The ½ spares the next rescale at the price of at most half a bit of P.

    |output| <= 127·row_sum, so int32 holds as long as row_sum < 2^31/127 = 16.9 million: `bound_sums` before every
    256 tiles (at most 4 177 920 more) keeps it below 12.7 million there.

    output:  int32 ((2,2), m tiles, `value_channels`/8 n tiles), channels as in TileImage.output_channels
    sums:    int32 (2,2): [e, hi] is the row sum of row r = 2·m + hi in e == m, from one accumulator for both m tiles:
             the ones that multiply P sit in the even columns for m tile 0 and in the odd ones for m tile 1
    """

    output: cute.Tensor
    sums: cute.Tensor
    bias: cute.Tensor
    limit: cute.Tensor
    row_scale: cute.Tensor
    ones: cute.Tensor
    value_row: Int32
    image: cutlass.Constexpr[TileImage]
    m_tiles: cutlass.Constexpr[int]

    @staticmethod
    def create(row_scale: cute.Tensor, image: TileImage, m_tiles: int) -> IntegerSoftmax:
        """Empty state. ``row_scale``: float32 (R,), factor from y to base-2 scores, > 0."""
        rows = 2 * m_tiles
        output = cute.make_rmem_tensor(((2, 2), m_tiles, image.value_channels // 8), Int32)
        sums = cute.make_rmem_tensor(((2, 2),), Int32)
        bias, limit = cute.make_rmem_tensor((rows,), Float32), cute.make_rmem_tensor((rows,), Float32)
        ones = cute.make_rmem_tensor((m_tiles,), Int32)
        for tensor in (output, sums):
            for i in range(cute.size(tensor)):
                tensor[i] = Int32(0)
        for r in range(rows):
            bias[r] = Float32(UNSEEN)
            limit[r] = -Float32.inf
        odd_column = (lane_index() >> 2) & 1
        for m in range(m_tiles):
            chosen = Int32(1) if m_tiles == 1 else odd_column if m == 1 else 1 - odd_column
            ones[m] = chosen * 0x01010101
        return IntegerSoftmax(output, sums, bias, limit, row_scale, ones, b_fragment_offset(), image, m_tiles)

    @cute.jit
    def update(self, maxima: list[Float32]) -> None:
        """Make room for a tile whose largest scores in this lane's rows are ``maxima``."""
        if any_greater(maxima, [self.limit[r] for r in range(2 * self.m_tiles)]) != 0:
            self._rescale(maxima)

    def _rescale(self, maxima: list[Float32]) -> None:
        """Raise m of every row of the warp and shift what was accumulated under the old one.

        Everything hangs on the shuffles, which ptxas does not speculate: it would otherwise move this above the branch.
        """
        for r in range(2 * self.m_tiles):
            bias = raised_bias(self.bias[r], quad_max(maxima[r]), self.row_scale[r], _LOG2_255, _HEADROOM)
            # The biases are rounded, so their difference is near the integer it stands for, on either side.
            count = (cute.arch.fmin(self.bias[r] - bias, Float32(31)) + Float32(0.5)).to(Int32)
            self._shift(r, count, bias)

    chunk_tiles = 256
    """Tiles whose sums are in range after `bound_sums`."""

    def bound_sums(self) -> None:
        """Halve the rows whose sum could pass the bound within the next 256 tiles."""
        for r in range(2 * self.m_tiles):
            count = self._exceeds(self.sums[(r // 2 % self.m_tiles, r % 2),])
            self._shift(r, count, self.bias[r] - count.to(Float32))

    @cute.jit
    def _exceeds(self, row_sum: Int32) -> Int32:
        return Int32(1) if row_sum >= _SUM_BOUND else Int32(0)

    def _shift(self, r: int, count: Int32, bias: Float32) -> None:
        """Shift what row ``r`` accumulated right by ``count``, to match its new ``bias``."""
        self.bias[r], self.limit[r] = bias, score_limit(bias, self.row_scale[r], _LOG2_255)
        tile, hi = r // 2, r % 2
        for e in range(2):
            if e == tile or self.m_tiles == 1:
                self.sums[(e, hi),] = shift_right(self.sums[(e, hi),], count)
            for n in range(self.image.value_channels // 8):
                self.output[(e, hi), tile, n] = shift_right(self.output[(e, hi), tile, n], count)

    def row_totals(self, r: int) -> tuple[Float32, Float32]:
        """Row sum of row ``r`` as float32, and log2 of Σ 2^x over its keys: -inf if it saw none."""
        total = self.sums[(r // 2, r % 2),].to(Float32)
        return total, cute.math.log2(total, approx=True, ftz=True) - self.bias[r]

    def probabilities(self, scores: cute.Tensor) -> cute.Tensor:
        """P as u8 A operand ((4,2,2), m tiles, 2 blocks of 32 tokens): the accumulator's own order, lane by lane."""
        blocks = TILE_TOKENS // 32
        p = cute.make_rmem_tensor(((4, 2, 2), self.m_tiles, blocks), Uint8)
        packed = cute.recast_tensor(p, Int32)
        for m in range(self.m_tiles):
            for k in range(blocks):
                for half in range(2):
                    for hi in range(2):
                        n, r = 4 * k + 2 * half, 2 * m + hi
                        four = [
                            cute.math.exp2(self._exponent(scores[(e, hi), m, n + t], r), approx=True, ftz=True)
                            for t in range(2)
                            for e in range(2)
                        ]
                        packed[(0, hi, half), m, k] = pack_bytes_f16(four)
        return p

    def _exponent(self, y: Float32, r: int) -> Float32:
        """log2 of the probability of score ``y`` in row ``r``."""
        return cute.math.fma(y, self.row_scale[r], self.bias[r])

    def accumulate(self, p: cute.Tensor, stage: cute.Pointer) -> None:
        """output += P·V and row sums += P·1, for the tile image at ``stage`` (shared)."""
        values = cute.recast_ptr(stage + self.value_row, dtype=Int8) + self.image.v_offset
        mma = cute.make_mma_atom(MmaInt8Op(a_unsigned=True))
        load = ldmatrix_atom()
        dims = self.image.value_channels
        fragment = cute.make_layout(16)
        ones = cute.make_rmem_tensor(((4, 2),), Int8)
        ones_packed = cute.recast_tensor(ones, Int32)
        for k in range(TILE_TOKENS // 32):
            for n in range(dims // 16):
                v = cute.make_rmem_tensor(((4, 2), 2), Int8)
                row = cute.make_tensor(values + self.image.value_fragment(n, k), fragment)
                cute.copy(load, row, cute.make_tensor(v.iterator, fragment))
                for t in range(2):
                    for m in range(self.m_tiles):
                        acc = self.output[None, m, 2 * n + t]
                        mma_in_place(mma, acc, p[None, m, k], v[None, t])
            for m in range(self.m_tiles):
                for half in range(2):
                    ones_packed[(0, half),] = self.ones[m]
                mma_in_place(mma, self.sums, p[None, m, k], ones)
