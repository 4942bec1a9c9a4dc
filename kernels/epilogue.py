"""From a warp's final softmax state to the caller's tensors: output, divided and scaled, and log-sum-exp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr, range_constexpr
from cutlass.cutlass_dsl import select_

from .operand_planes import lane_index
from .quad_transpose import quad_transpose
from .row_tile import RowTile
from .sequence import SequenceBounds
from .swizzled_tile import SwizzledTile
from .tile_image import TileImage

__all__ = ["OUTPUT_VECTOR", "Epilogue"]

_LN2 = 0.6931471805599453

OUTPUT_VECTOR = 8
"""Channels that a lane stores together: 16 bytes."""


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
    image: cutlass.Constexpr[TileImage | RowTile | SwizzledTile]
    m_tiles: cutlass.Constexpr[int]

    def row(self, r: int) -> Int32:
        """Query of this lane's row ``r``."""
        return self.bounds.row_begin + self.warp_row + lane_index() // 4 + 8 * r

    @cute.jit
    def store_output(self, out: cute.Tensor, channels: tuple):
        """out [rows, D] = O / Σ P · v_scale + v_mean. A lane stores eight neighbouring channels, in as few pieces as
        the output's alignment allows, and the four lanes of a row 64 bytes.

        channels: v_scale and v_mean, float32 [D] or None; both None where V is the caller's own tensor

        A row that sees no key gets zeros. One that sees some and has Σ P = 0 had scores too large for float32 to hold
        its max (see `IntegerSoftmax`), and gets NaN.
        """
        for r in range_constexpr(2 * self.m_tiles):
            row = self.row(r)
            if const_expr(self._gathers):
                self._store_row(r, row, out[row, None], channels)
            else:
                if row < self.bounds.all_rows:
                    self._store_row(r, row, out[row, None], channels)

    @property
    def _gathers(self) -> bool:
        """Whether a lane's neighbouring channels are two, and the four lanes of a row exchange them, of whole warps.

        Otherwise V's channels are permuted in the tile image, so that a lane has eight.
        """
        return self.image.output_run < OUTPUT_VECTOR

    @cute.jit
    def _store_row(self, r: int, row: Int32, out_row: cute.Tensor, channels: tuple):
        total, _ = self.softmax.row_totals(r)
        inverse, seen = Float32(0), self.bounds.key_limit(row) > 0
        if seen:
            inverse = cute.math.rcp(total, approx=True, ftz=True)
            inverse = inverse + (inverse - inverse)  # NaN if 1/0: shifted right, a negative O ends as -1
        inverse = inverse + self._nan_if_not_finite(row)
        vectors = out_row.shape[0] // OUTPUT_VECTOR
        for g in range_constexpr(cute.ceil_div(vectors, 4)):
            place = 4 * g + lane_index() % 4
            if const_expr(self._gathers):
                values = self._gathered(self._values(r, g, inverse, seen, out_row.element_type))
                if row < self.bounds.all_rows and place < vectors:
                    self._store(values, out_row, place)
            elif const_expr(4 * (g + 1) <= vectors):
                self._store_own(r, g, place, inverse, seen, out_row, channels)
            else:
                if place < vectors:
                    self._store_own(r, g, place, inverse, seen, out_row, channels)

    def _store_own(
        self, r: int, g: int, place: Int32, inverse: Float32, seen: Boolean, out_row: cute.Tensor, channels: tuple
    ) -> None:
        """Channels 8·place … of row ``r``: this lane's ``g``-th eight."""
        scale, mean = (cute.make_rmem_tensor((OUTPUT_VECTOR,), Float32) for _ in range(2))
        scale.fill(1.0)
        for channel, factor in zip(channels, (scale, mean), strict=True):
            if const_expr(channel is not None):
                cute.autovec_copy(cute.local_tile(channel, (OUTPUT_VECTOR,), (place,)), factor)
        factors = scale, mean if channels[1] is not None else None
        self._store(self._values(r, g, inverse, seen, out_row.element_type, *factors), out_row, place)

    def _values(
        self,
        r: int,
        g: int,
        inverse: Float32,
        seen: Boolean,
        element: Any,
        scale: cute.Tensor | None = None,
        mean: cute.Tensor | None = None,
    ) -> cute.Tensor:
        """What this lane has of n8 tiles 4·g … 4·g + 3 of row ``r``, scaled and converted; zeros past the last tile."""
        values = cute.make_rmem_tensor((OUTPUT_VECTOR,), element)
        tiles = self.image.value_channels // 8
        for i in range(OUTPUT_VECTOR):
            tile = 4 * g + i // 2
            if tile >= tiles:
                values[i] = Float32(0).to(element)
                continue
            o = self.softmax.output[(i % 2, r % 2), r // 2, tile].to(Float32) * inverse
            if const_expr(scale is not None):
                o = o * scale[i]
            if const_expr(mean is not None):
                o = o + mean[i]
            # Of a row without keys `inverse` is the result, 0 or NaN, whatever V's channel holds.
            values[i] = Float32(select_(seen, o, inverse)).to(element)
        return values

    @staticmethod
    def _gathered(values: cute.Tensor) -> cute.Tensor:
        """The pairs of four n8 tiles -> lane t's eight channels, those of the t-th tile."""
        words = cute.recast_tensor(values, Int32)
        for j, word in enumerate(quad_transpose([words[j] for j in range(4)])):
            words[j] = word
        return values

    @staticmethod
    def _store(values: cute.Tensor, out_row: cute.Tensor, place: Int32) -> None:
        cute.autovec_copy(values, cute.local_tile(out_row, (OUTPUT_VECTOR,), (place,)))

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
