"""Online softmax of a warpgroup's rows: probabilities in 8-bit or 16-bit formats, P from registers, sums by the MMA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float32, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from .operand_planes import PLANE_BYTES_PER_ROW
from .ptx import any_greater, pack_bytes_e4m3
from .running_max import UNSEEN, quad_max, raised_bias
from .tile_image import VALUE_BYTES, TileImage
from .warpgroup_mma import ROWS, accumulators, multiply, plane_operand, warpgroup_mma

__all__ = ["WarpgroupSoftmax"]


@dataclass(frozen=True)
class _Format:
    """How P and V are multiplied.

    p, v:     element types
    top:      log2 of the largest P
    headroom: log2 of how much the max of a row may grow before the row is rescaled
    pack:     neighbouring P of a row -> one register
    """

    p: Any
    v: Any
    top: float
    headroom: float
    pack: Callable[[list[Float32]], Int32]


_FORMATS = {
    # log2(448), rounded down to float32
    "e4m3": _Format(Float8E4M3FN, Float8E4M3FN, 8.807353973388672, 1.0, pack_bytes_e4m3),
}


@dataclass(frozen=True)
class WarpgroupSoftmax:
    """State of a warpgroup's rows, two per lane as in `WarpgroupScores`.

    With x = y·factor the scores in base 2 and `running_max`,
        P = 2^(x + bias) <= 2^top in V's format,   output = Σ P·V,   row_sum = Σ P   (of the rounded P).
    While no exponent x + bias of a warp passes top, nothing of the state is touched. Otherwise output and row sums are
    multiplied by a power of two.

    The tensor cores of sm_90a add products of 8-bit floats with about 14 bits below the largest, so that one tile is
    summed there, from zero, and added to `output` in float32.

    values: fragment of the MMA: descriptors of V's planes with the stage last
    output: float32 ((2,2), 1, n8 tiles), channels as in TileImage.output_channels, and a last n8 tile of row sums
    bias:   float32 (2,)
    """

    mma: cute.TiledMma
    values: cute.Tensor
    output: cute.Tensor
    bias: cute.Tensor
    image: cutlass.Constexpr[TileImage]

    @staticmethod
    def create(tiles: cute.Pointer, stages: int, stage_bytes: int, image: TileImage) -> WarpgroupSoftmax:
        """Empty state. tiles: the ring's stages."""
        kind = _FORMATS[image.values]
        mma = warpgroup_mma(kind.p, kind.v, image.value_rows, a_in_registers=True)
        thread = mma.get_slice(0)
        planes = image.tokens * VALUE_BYTES[image.values] // PLANE_BYTES_PER_ROW
        rows = image.value_rows
        v = plane_operand(tiles + image.v_offset, kind.v, rows, rows, planes, stages, stage_bytes)
        output = cute.make_rmem_tensor(((2, 2), 1, rows // 8), Float32)
        bias = cute.make_rmem_tensor((2,), Float32)
        output.fill(0.0)
        bias.fill(UNSEEN)
        return WarpgroupSoftmax(mma, thread.make_fragment_B(thread.partition_B(v)), output, bias, image)

    chunk_tiles = None
    """Sums of any number of keys are in range."""

    @property
    def _format(self) -> _Format:
        return _FORMATS[self.image.values]

    @cute.jit
    def update(self, largest: list[Float32], factors: list[Float32]) -> None:
        """Make room for a tile whose largest scores in this lane's rows are ``largest``.

        What is compared is the very exponent that `probabilities` computes: no P can pass 2^top.
        """
        exponents = [cute.math.fma(largest[r], factors[r], self.bias[r]) for r in range(2)]
        if any_greater(exponents, [Float32(self._format.top)] * 2) != 0:
            self._rescale(largest, factors)

    def _rescale(self, largest: list[Float32], factors: list[Float32]) -> None:
        """Raise m of the warp's rows and scale what was accumulated under the old one."""
        top, headroom = self._format.top, self._format.headroom
        for r in range(2):
            x = quad_max(largest[r] * factors[r])
            bias = raised_bias(self.bias[r], x, Float32(1), top, headroom)
            count = cute.arch.fmin(self.bias[r] - bias, Float32(127)).to(Int32)
            factor = ((127 - count) << 23).bitcast(Float32)
            self.bias[r] = bias
            for n in range(self.image.value_rows // 8):
                for e in range(2):
                    self.output[(e, r), 0, n] = self.output[(e, r), 0, n] * factor

    def row_totals(self, r: int) -> tuple[Float32, Float32]:
        """Row sum of row ``r``, and log2 of Σ 2^x over its keys: -inf if it saw none."""
        total = self.output[(0, r), 0, self.image.value_channels // 8].to(Float32)
        return total, cute.math.log2(total, approx=True, ftz=True) - self.bias[r]

    def probabilities(self, scores: cute.Tensor, factors: list[Float32]) -> cute.Tensor:
        """P as A operand, ((4,2,2), 1, 32-byte blocks) of bytes: the accumulators' own order, lane by lane."""
        blocks = self.image.tokens * VALUE_BYTES[self.image.values] // PLANE_BYTES_PER_ROW
        each = 4 // VALUE_BYTES[self.image.values]
        p = cute.make_rmem_tensor(((each, 2, 2), 1, blocks), self._format.p)
        packed = cute.recast_tensor(p, Int32)
        for k in range(blocks):
            for half in range(2):
                for r in range(2):
                    first = each // 2 * (2 * k + half)
                    columns = [(e, first + t) for t in range(each // 2) for e in range(2)]
                    four = [self._probability(scores[(e, r), n], factors[r], r) for e, n in columns]
                    packed[(0, r, half), 0, k] = self._format.pack(four)
        return p

    def _probability(self, y: Float32, factor: Float32, r: int) -> Float32:
        return cute.math.exp2(cute.math.fma(y, factor, self.bias[r]), approx=True, ftz=True)

    def accumulate(self, p: cute.Tensor, stage: Int32) -> None:
        """output += P·V and row sums += P·1, for the tile in ``stage``."""
        sums = accumulators(self.image.value_rows, Float32)
        warpgroup.fence()
        multiply(self.mma, sums, p, self.values[None, None, None, stage], add=False)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        for i in range(cute.size(sums)):
            self.output[i] = self.output[i] + sums[i]
