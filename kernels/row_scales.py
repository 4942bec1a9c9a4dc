"""The factor of a lane's query rows from products to scores in base 2."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr, range_constexpr

from .sequence import SequenceBounds

__all__ = ["SMALLEST_FACTOR", "row_scales"]

SMALLEST_FACTOR = float(2**-100)
"""Keeps -inf · factor away from NaN, also in rows of zeros, in those that end as NaN, and with tokens past the end."""


@cute.jit
def row_scales(
    scales: cute.Tensor | None, bounds: SequenceBounds, row: Int32, count: int, factor: Float32
) -> cute.Tensor:
    """float32 (count,): ``factor``, times Q's scale [Sq] if given, of queries row + 8·r; positive and finite."""
    row_scale = cute.make_rmem_tensor((count,), Float32)
    for r in range_constexpr(count):
        row_scale[r] = factor
        if const_expr(scales is not None):
            row_scale[r] = Float32(0)
            if row + 8 * r < bounds.seq_q:
                product = scales[row + 8 * r] * factor
                row_scale[r] = product if product < Float32.inf else Float32(0)
        row_scale[r] = cute.arch.fmax(row_scale[r], Float32(SMALLEST_FACTOR))
    return row_scale
