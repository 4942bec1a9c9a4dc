"""Which lane holds which element of an MMA's operands, read off the atoms' own thread-value layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import cutlass.cute as cute
from cutlass import Float16, Float32

from cute_attn.kernels.atoms import MmaInt8Op, ldmatrix_atom, mma_float_op
from cute_attn.kernels.tile_image import StaticLayout

from .tracing import while_tracing

__all__ = ["F16", "MMAS", "S4", "S8", "U8", "Fragment", "Mma", "fragments", "ldmatrix_layouts", "static"]


@dataclass(frozen=True)
class Mma:
    """One row of the table of MMAs: what it is called, how the kernels make it, bits of an element of A and B."""

    name: str
    title: str
    make: Callable[[], Any]
    bits: int


S8 = Mma("mma_s8", "mma.m16n8k32  s8 · s8 → s32", MmaInt8Op, 8)
U8 = Mma("mma_u8", "mma.m16n8k32  u8 · s8 → s32", lambda: MmaInt8Op(a_unsigned=True), 8)
S4 = Mma("mma_s4", "mma.m16n8k64  s4 · s4 → s32", MmaInt8Op, 4)
F16 = Mma("mma_f16", "mma.m16n8k16  f16 · f16 → f32", lambda: mma_float_op(Float16, Float32), 16)

MMAS = (S8, U8, S4, F16)
"""The compiler has no atom for s4. Its fragments are those of s8 byte for byte, two k in each: `_halved`."""


@dataclass(frozen=True)
class Fragment:
    """One operand of an MMA, spread over a warp, or over the threads of a warpgroup.

    shape:  (m, k) of A, (n, k) of B, (m, n) of C
    layout: (lane, value) -> index in that shape, first mode fastest, as the atom states it
    bits:   of an element
    """

    operand: str
    shape: tuple[int, int]
    layout: StaticLayout
    bits: int

    @property
    def values(self) -> int:
        """Elements that a lane holds."""
        return self.layout.extents()[1]

    @property
    def packed(self) -> int:
        """Elements in a register."""
        return 32 // self.bits

    @property
    def registers(self) -> int:
        return self.values // self.packed

    def place(self, lane: int, value: int) -> tuple[int, int]:
        """Coordinate in ``shape`` of a lane's element; ``value`` counts through its registers, low bits first."""
        index = self.layout(lane, value)
        return index % self.shape[0], index // self.shape[0]

    def owners(self) -> dict[tuple[int, int], tuple[int, int]]:
        """The inverse of `place`: coordinate -> (lane, value)."""
        lanes = range(self.layout.extents()[0])
        return {self.place(lane, value): (lane, value) for lane in lanes for value in range(self.values)}


def static(layout: Any) -> StaticLayout:
    """A layout of the DSL, whose numbers are all known, in ours."""
    return StaticLayout(layout.shape, layout.stride)


def _halved(layout: StaticLayout, rows: int) -> StaticLayout:
    """The layout of an operand of 8-bit elements where each of them is two, neighbours in k."""

    def wider(stride: Any) -> Any:
        """A step along k, ``rows`` or a multiple of it, is twice as far; one along the rows is not."""
        return tuple(map(wider, stride)) if isinstance(stride, tuple) else stride if stride < rows else 2 * stride

    (lanes, values), (lane_steps, value_steps) = layout.shape, layout.stride
    return StaticLayout((lanes, (2, *values)), (wider(lane_steps), (rows, *wider(value_steps))))


@cache
def fragments(mma: Mma) -> dict[str, Fragment]:
    """Fragments of A, B and C by name."""

    def read() -> Any:
        atom = cute.make_mma_atom(mma.make())
        return atom.shape_mnk, *(static(layout) for layout in (atom.tv_layout_A, atom.tv_layout_B, atom.tv_layout_C))

    (m, n, k), a, b, c = while_tracing(read)
    if mma.bits == 4:
        k, a, b = 2 * k, _halved(a, m), _halved(b, n)
    return {
        "A": Fragment("A", (m, k), a, mma.bits),
        "B": Fragment("B", (n, k), b, mma.bits),
        "C": Fragment("C", (m, n), c, 32),
    }


@cache
def ldmatrix_layouts(transpose: bool) -> tuple[StaticLayout, StaticLayout]:
    """(lane, element) -> element of four 8 by 16-byte matrices in 16-bit elements, as addressed and as received."""

    def read() -> Any:
        atom = ldmatrix_atom(Float16, transpose=transpose)
        return static(atom.layout_src_tv), static(atom.layout_dst_tv)

    return while_tracing(read)
