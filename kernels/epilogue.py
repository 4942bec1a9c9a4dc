"""From a warp's final softmax state to the caller's tensors: output, divided and scaled, and log-sum-exp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr, range_constexpr
from cutlass.cutlass_dsl import select_

from .operand_planes import lane_index
from .row_tile import RowTile
from .sequence import SequenceBounds
from .tile_image import TileImage

__all__ = ["Epilogue"]

_LN2 = 0.6931471805599453


@dataclass(frozen=True)
class Epilogue:
    """What one warp stores of its rows; R = 2·m_tiles rows per lane, row r is 8·r further than row 0.

    softmax:  final state: ``output``, and ``row_totals`` (row sum and its logarithm in base 2, less the bias)
    query:    Q's scale and bias float32 [rows] of this head (None if Q is not quantised), and softmax_scale · log2(e)
    warp_row: first of the warp's rows, relative to the CTA's first row
    """

    softmax: Any
    bounds: SequenceBounds
    query: tuple
    warp_row: Int32
    image: cutlass.Constexpr[TileImage | RowTile]
    m_tiles: cutlass.Constexpr[int]

    def row(self, r: int) -> Int32:
        """Query of this lane's row ``r``."""
        return self.bounds.row_begin + self.warp_row + lane_index() // 4 + 8 * r

    @cute.jit
    def store_output(self, out: cute.Tensor, channels: tuple):
        """out [rows, D] = O / Σ P · v_scale + v_mean, by stores as wide as a lane's runs of neighbouring channels.

        channels: v_scale and v_mean, float32 [D] or None. Runs of channels are inside D or outside as a whole

        A row that sees no key gets zeros. One that sees some and has Σ P = 0 had scores too large for float32 to hold
        its max (see `IntegerSoftmax`), and gets NaN.
        """
        runs = out.shape[1] // self.image.output_run
        for r in range_constexpr(2 * self.m_tiles):
            row = self.row(r)
            if row < self.bounds.all_rows:
                total, _ = self.softmax.row_totals(r)
                inverse, seen = Float32(0), self.bounds.key_limit(row) > 0
                if seen:
                    inverse = cute.math.rcp(total, approx=True, ftz=True)
                    inverse = inverse + (inverse - inverse)  # NaN if 1/0: shifted right, a negative O ends as -1
                inverse = inverse + self._nan_if_not_finite(row)
                for g in range_constexpr(cute.ceil_div(runs, 4)):
                    place = 4 * g + lane_index() % 4
                    if const_expr(4 * (g + 1) <= runs):
                        self._store_run(r, g, place, inverse, seen, out[row, None], channels)
                    else:
                        if place < runs:
                            self._store_run(r, g, place, inverse, seen, out[row, None], channels)

    def _store_run(
        self, r: int, g: int, place: Int32, inverse: Float32, seen: Boolean, out_row: cute.Tensor, channels: tuple
    ) -> None:
        """Channels run·place … of row ``r``, run = `output_run`: this lane's ``g``-th run of neighbours."""
        run = self.image.output_run
        scale = cute.make_rmem_tensor((run,), Float32)
        values = cute.make_rmem_tensor((run,), out_row.element_type)
        mean = cute.make_rmem_tensor((run,), Float32)
        scale.fill(1.0)
        for channel, factor in zip(channels, (scale, mean), strict=True):
            if const_expr(channel is not None):
                cute.autovec_copy(cute.local_tile(channel, (run,), (place,)), factor)
        for i in range(run):
            o = self.softmax.output[(i % 2, r % 2), r // 2, run // 2 * g + i // 2].to(Float32)
            o = o * inverse * scale[i]
            if const_expr(channels[1] is not None):
                o = o + mean[i]
            # Of a row without keys `inverse` is the result, 0 or NaN, whatever V's channel holds.
            values[i] = Float32(select_(seen, o, inverse)).to(values.element_type)
        cute.autovec_copy(values, cute.local_tile(out_row, (run,), (place,)))

    @cute.jit
    def store_lse(self, lse: cute.Tensor):
        """lse [rows] = ln Σ e^score, what smoothing took off the scores put back; one lane of a quad stores it."""
        _, bias, softmax_scale_log2 = self.query
        for r in range_constexpr(2 * self.m_tiles):
            row = self.row(r)
            if row < self.bounds.all_rows and lane_index() % 4 == 0:
                _, log2_total = self.softmax.row_totals(r)
                if self.bounds.key_limit(row) > 0:
                    log2_total = log2_total + (log2_total - log2_total)  # NaN where Σ P = 0, as in the output
                if const_expr(bias is not None):
                    log2_total = log2_total + softmax_scale_log2 * bias[row]
                lse[row] = log2_total * _LN2 + self._nan_if_not_finite(row)

    def _nan_if_not_finite(self, row: Int32) -> Float32:
        """0, or NaN if Q's scale or bias of this row says that the row held, or met, something that is not finite.

        Without them the row's own scores say so: their probabilities are NaN.
        """
        scales, biases, _ = self.query
        if const_expr(scales is None):
            return Float32(0)
        scale, bias = scales[row], biases[row]
        return (scale - scale) + (bias - bias)
