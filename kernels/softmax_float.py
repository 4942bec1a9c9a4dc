"""Online softmax with probabilities in floats of 16 or 8 bits, and every way to accumulate P·V in floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float8E4M3FN, Float16, Float32, Int32, const_expr

from .atoms import ldmatrix_atom, mma_float_op, mma_in_place
from .operand_planes import PLANE_BYTES_PER_ROW, b_fragment_offset, transposed_b_fragment_offset
from .ptx import any_greater, multiply_f16x2, pack_bf16x2, pack_bytes_e4m3, pack_f16x2
from .row_tile import RowTile
from .running_max import UNSEEN, quad_max, raised_bias, score_limit
from .tile_image import TILE_TOKENS, TileImage

__all__ = ["ACCUMULATORS", "E4M3_ACCUMULATORS", "Accumulator", "FloatSoftmax"]

_LOG2_448 = 8.807353973388672  # of the largest E4M3: the largest float32 that is not greater


@dataclass(frozen=True)
class Accumulator:
    """How O = P·V is accumulated.

    output:   element type of the accumulators that live as long as the kernel
    products: element type in which one tile's P·V is accumulated
    top:      log2 of the largest P
    headroom: log2 of how much the max of a row may grow before the row is rescaled
    by_tile:  whether a tile's P·V is summed by itself and then added to the output
    """

    output: Any
    products: Any
    top: float
    headroom: int
    by_tile: bool = False


ACCUMULATORS = {
    "float32": Accumulator(Float32, Float32, top=8, headroom=8),
    "float16+float32": Accumulator(Float32, Float16, top=8, headroom=8, by_tile=True),
    "float16": Accumulator(Float16, Float16, top=-4, headroom=4),
}
"""Of P in 16 bits."""

E4M3_ACCUMULATORS = {
    "float32+float32": Accumulator(Float32, Float32, top=_LOG2_448, headroom=1, by_tile=True),
    "float16+float32": Accumulator(Float32, Float16, top=_LOG2_448, headroom=1, by_tile=True),
}
"""Of P in E4M3."""

_PACK = {
    Float16: lambda two: pack_f16x2(*two),
    BFloat16: lambda two: pack_bf16x2(*two),
    Float8E4M3FN: pack_bytes_e4m3,
}


@dataclass(frozen=True)
class FloatSoftmax:
    """State of one warp's rows; R = 2·m_tiles rows per lane, row r is accumulator row 16·(r//2) + 8·(r%2) + lane//4.

    With x = y·row_scale the scores in base 2 and `running_max`,
        P = f16(2^(x + bias)) <= 2^top,   output = Σ P·V,   row_sum = Σ P   (float32; of the rounded P)
    and e4m3(…) in place of f16(…) where V is E4M3.
    While no score of the warp passes its row's limit, `headroom` above the max at the last rescale, nothing of the
    state is touched: a tile costs one FFMA and one MUFU per score and no work on the output. Otherwise output and row
    sum are multiplied by a power of two.

    The result is as exact as with P <= 1 and a rescale in every tile. In 16 bits:
        P   f16 rounds it to 11 bits, or to a multiple of 2^-24 below 2^-14. The largest P of a row is at least
            2^(top - headroom - 1): ½ with top = headroom = 8, 2^-9 with top = -4 and headroom = 4. So the fixed step is
            at most 2^-15 of the largest P, and half that is less than the largest P's own rounding
        O   the factors are powers of two: floats keep all their bits. What falls below the smallest normal float16 is
            rounded to 2^-24 as well, 2^-15 of a row sum that is at least 2^-9
    (bfloat16, for V in bfloat16, rounds P to 8 bits and has float32's range), and in range, for V in a tile image has
    |v| < 2 (its scale is the power of two not above its channel's largest):
        float32          row_sum <= 2^8·keys and |output| <= 2^9·keys, far below 2^127
        float16+float32  a tile's products are at most 64·2^8·2 = 2^15 < 65504
        float16          an MMA of 16 tokens adds at most 16·2^-4·2 = 2, by which a float16 beyond 4096, in steps of 4,
                         no longer grows. Small terms are lost to a large output in this way, so that it is less
                         accurate the more keys count; row_sum, in float32, is not affected
    In E4M3:
        P   is rounded to 4 bits, or to a multiple of 2^-9 below 2^-6. The largest P of a row is at least
            2^(top - headroom - 1) = 112, so the fixed step is at most 2^-15.8 of it. P never passes 448: the
            conversion saturates, and 2^top <= 448 sees to it that nothing is saturated but the last bit of 2^x
        O   the tensor cores' own float32 sums may have 13 bits of fraction (`mma_float_op`). They start at 0 in every
            tile and are added to output and row_sum in float32: what they cut off stays a part of the tile's sum
            (SageAttention2, arXiv 2411.10958, section 3.2), where one accumulator for all keys would stop growing
        float32+float32  row_sum <= 448·keys and |output| <= 448²·keys, far below 2^127
        float16+float32  V's scale makes |v| <= 2.25. A product is at most 448·2.25 = 1008, so no sum of some of a
                         tile's 64 products, in any order, is beyond 64·1008 = 64512 < 65504. Rounding cannot lead
                         there either: it is monotonic, and 64512 = 63·2^10 is a float16

    output:  `accumulator.output` ((2,2), m tiles, `value_channels`/8 n tiles), channels as in TileImage.output_channels
    sums:    float32 ((2,2), m tiles): (0, hi) is the row sum of row r = 2·m + hi; column 1 is not kept up. One
             accumulator for both m tiles, as in IntegerSoftmax, would carry a NaN from a row to the one 16 rows further
    """

    output: cute.Tensor
    sums: cute.Tensor
    bias: cute.Tensor
    limit: cute.Tensor
    row_scale: cute.Tensor
    value_row: Int32
    image: cutlass.Constexpr[TileImage | RowTile]
    m_tiles: cutlass.Constexpr[int]
    accumulator: cutlass.Constexpr[Accumulator]
    element: cutlass.Constexpr[Any]

    @staticmethod
    def create(
        row_scale: cute.Tensor,
        image: TileImage | RowTile,
        m_tiles: int,
        accumulator: Accumulator,
        element: Any = Float16,
    ) -> FloatSoftmax:
        """Empty state. ``row_scale``: float32 (R,), factor from y to base-2 scores, > 0; element: type of P and V."""
        rows = 2 * m_tiles
        output = cute.make_rmem_tensor(((2, 2), m_tiles, image.value_channels // 8), accumulator.output)
        sums = cute.make_rmem_tensor(((2, 2), m_tiles), Float32)
        bias, limit = cute.make_rmem_tensor((rows,), Float32), cute.make_rmem_tensor((rows,), Float32)
        output.fill(0.0)
        sums.fill(0.0)
        for r in range(rows):
            bias[r] = Float32(UNSEEN)
            limit[r] = -Float32.inf
        value_row = b_fragment_offset() if image.values_transposed else transposed_b_fragment_offset()
        return FloatSoftmax(output, sums, bias, limit, row_scale, value_row, image, m_tiles, accumulator, element)

    @cute.jit
    def update(self, maxima: list[Float32]) -> None:
        """Make room for a tile whose largest scores in this lane's rows are ``maxima``."""
        if any_greater(maxima, [self.limit[r] for r in range(2 * self.m_tiles)]) != 0:
            self._rescale(maxima)

    def _rescale(self, maxima: list[Float32]) -> None:
        """Raise m of every row of the warp and scale what was accumulated under the old one.

        Everything hangs on the shuffles, which ptxas does not speculate: it would otherwise move this above the branch.
        """
        top, headroom = self.accumulator.top, self.accumulator.headroom
        for r in range(2 * self.m_tiles):
            self._scale(r, raised_bias(self.bias[r], quad_max(maxima[r]), self.row_scale[r], top, headroom))

    chunk_tiles = None
    """Sums of any number of keys are in range."""

    def _scale(self, r: int, bias: Float32) -> None:
        """Multiply what row ``r`` accumulated by a power of two, to match its new ``bias``."""
        count = cute.arch.fmin(self.bias[r] - bias, Float32(127))
        if const_expr(self.accumulator.top != int(self.accumulator.top)):
            count = count + Float32(0.5)  # the biases are rounded: they differ by nearly an integer, on either side
        count = count.to(Int32)
        factor = ((127 - count) << 23).bitcast(Float32)
        self.bias[r], self.limit[r] = bias, score_limit(bias, self.row_scale[r], self.accumulator.top)
        tile, hi = r // 2, r % 2
        self.sums[(0, hi), tile] = self.sums[(0, hi), tile] * factor
        if const_expr(self.accumulator.output is Float16):
            pairs, factors = cute.recast_tensor(self.output, Int32), pack_f16x2(factor, factor)
            for n in range(self.image.value_channels // 8):
                pairs[(0, hi), tile, n] = multiply_f16x2(pairs[(0, hi), tile, n], factors)
        else:
            for n in range(self.image.value_channels // 8):
                for e in range(2):
                    self.output[(e, hi), tile, n] = self.output[(e, hi), tile, n] * factor

    def row_totals(self, r: int) -> tuple[Float32, Float32]:
        """Row sum of row ``r``, and log2 of Σ 2^x over its keys: -inf if it saw none."""
        total = self.sums[(0, r % 2), r // 2]
        return total, cute.math.log2(total, approx=True, ftz=True) - self.bias[r]

    def probabilities(self, scores: cute.Tensor) -> cute.Tensor:
        """P as A operand in the accumulator's own order: ((2,2,2), m tiles, 4 blocks of 16 tokens) of 16 bits,
        ((4,2,2), m tiles, 2 blocks of 32) of E4M3."""
        tiles = 2 // self._bytes  # n8 tiles of S that fill a register of P
        p = cute.make_rmem_tensor(((2 * tiles, 2, 2), self.m_tiles, len(self._blocks())), self.element)
        packed = cute.recast_tensor(p, Int32)
        for m in range(self.m_tiles):
            for k in self._blocks():
                for half in range(2):
                    for hi in range(2):
                        packed[(0, hi, half), m, k] = _PACK[self.element](
                            [
                                self._probability(scores[(e, hi), m, (2 * k + half) * tiles + t], 2 * m + hi)
                                for t in range(tiles)
                                for e in range(2)
                            ]
                        )
        return p

    @property
    def _bytes(self) -> int:
        """Bytes of an element of P and V."""
        return self.element.width // 8

    def _blocks(self) -> range:
        """The MMAs along a tile's tokens: a plane of V each."""
        return range(TILE_TOKENS * self._bytes // PLANE_BYTES_PER_ROW)

    def _probability(self, y: Float32, r: int) -> Float32:
        return cute.math.exp2(cute.math.fma(y, self.row_scale[r], self.bias[r]), approx=True, ftz=True)

    def accumulate(self, p: cute.Tensor, stage: cute.Pointer) -> None:
        """output += P·V and row sums += P·1, for the tile image at ``stage`` (shared)."""
        values = cute.recast_ptr(stage + self.value_row, dtype=self.element) + self.image.v_offset // self._bytes
        self._add_row_sums(p)
        pairs = range(self.image.value_channels // 16)
        if const_expr(self.accumulator.by_tile):
            # Which way ptxas needs fewer moves and spills, at head dim 128 of sm_80 and sm_89.
            for n in pairs if const_expr(self.element is Float8E4M3FN) else reversed(pairs):
                self._add_tile(p, values, n)
        else:
            for k in self._blocks():
                for n in pairs:
                    self._multiply(p, values, k, n, self._output_pair(n))

    def _output_pair(self, n: int) -> list[cute.Tensor]:
        """The accumulators of n8 tiles 2·n and 2·n + 1, [m_tiles·t + m] of tile 2·n + t."""
        return [self.output[None, m, 2 * n + t] for t in range(2) for m in range(self.m_tiles)]

    def _add_tile(self, p: cute.Tensor, values: cute.Pointer, n: int) -> None:
        """output += P·V of the whole tile, summed in `products`' element type, for two n8 tiles."""
        sums = cute.make_rmem_tensor(((2, 2), 2 * self.m_tiles), self.accumulator.products)
        sums.fill(0.0)
        for k in self._blocks():
            self._multiply(p, values, k, n, [sums[None, i] for i in range(2 * self.m_tiles)])
        for i, output in enumerate(self._output_pair(n)):
            for j in range(4):
                output[j] = output[j] + sums[j, i].to(Float32)

    def _multiply(self, p: cute.Tensor, values: cute.Pointer, k: int, n: int, sums: list[cute.Tensor]) -> None:
        """sums[m_tiles·t + m] += P·V of the k-th tokens of one MMA and the two n8 tiles 2·n + t."""
        mma = cute.make_mma_atom(mma_float_op(self.element, self.accumulator.products))
        v = cute.make_rmem_tensor(((4 // self._bytes, 2), 2), self.element)
        fragment = cute.make_layout(16 // self._bytes)
        row = cute.make_tensor(values + self.image.value_fragment(n, k) // self._bytes, fragment)
        load = ldmatrix_atom(self.element, transpose=not self.image.values_transposed)
        cute.copy(load, row, cute.make_tensor(v.iterator, fragment))
        for t in range(2):
            for m in range(self.m_tiles):
                mma_in_place(mma, sums[self.m_tiles * t + m], p[None, m, k], v[None, t])

    def _add_row_sums(self, p: cute.Tensor) -> None:
        """row_sum += P·1; of E4M3 by itself first, like the output: see the class."""
        mma = cute.make_mma_atom(mma_float_op(self.element, Float32))
        ones = cute.make_rmem_tensor(((4 // self._bytes, 2),), self.element)
        ones.fill(1.0)
        sums = self.sums
        if const_expr(self.element is Float8E4M3FN):
            sums = cute.make_rmem_tensor(sums.shape, Float32)
            sums.fill(0.0)
        for k in self._blocks():
            for m in range(self.m_tiles):
                mma_in_place(mma, sums[None, m], p[None, m, k], ones)
        if const_expr(self.element is Float8E4M3FN):
            for m in range(self.m_tiles):
                for hi in range(2):
                    self.sums[(0, hi), m] = self.sums[(0, hi), m] + sums[(0, hi), m]
