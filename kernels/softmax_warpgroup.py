"""Online softmax of a warpgroup's rows: P in any of V's formats, from registers; row sums by the MMA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float8E4M3FN, Float16, Float32, Int8, Int32, Uint8, const_expr, range_constexpr
from cutlass.cute.nvgpu import warpgroup

from .operand_planes import PLANE_BYTES_PER_ROW
from .ptx import any_greater, exp2_on_fma, pack_bf16x2, pack_bytes_e4m3, pack_bytes_f16, pack_f16x2, shift_right
from .running_max import UNSEEN, quad_max, raised_bias
from .tile_image import VALUE_BYTES, TileImage
from .warpgroup_mma import multiply, plane_operand, warpgroup_mma

__all__ = ["FORMATS", "WarpgroupSoftmax", "value_parts"]


@dataclass(frozen=True)
class _Format:
    """How P and V are multiplied.

    p, v:     element types
    sums:     element type of the accumulators
    in_place: whether the MMA adds to the output. Otherwise it sums one tile, from zero, and that is added to the output
    top:      log2 of the largest P
    headroom: log2 of how much the max of a row may grow before the row is rescaled
    pack:     neighbouring P of a row -> one register
    """

    p: Any
    v: Any
    sums: Any
    in_place: bool
    top: float
    headroom: float
    pack: Callable[[list[Float32]], Int32]


FORMATS = {
    # log2(448), rounded down to float32
    "e4m3": _Format(Float8E4M3FN, Float8E4M3FN, Float32, False, 8.807353973388672, 1.0, pack_bytes_e4m3),
    # log2(255); larger P would wrap
    "int8": _Format(Uint8, Int8, Int32, True, 7.994353436858858, 0.5, pack_bytes_f16),
    "float16": _Format(Float16, Float16, Float32, True, 8.0, 8.0, lambda p: pack_f16x2(*p)),
    "bfloat16": _Format(BFloat16, BFloat16, Float32, True, 8.0, 8.0, lambda p: pack_bf16x2(*p)),
}
"""By the name of V's format."""

# 2^31 / 127 less what 16384 probabilities of at most 255 can add, rounded down.
_SUM_BOUND = 12_700_000
_BOUNDED_TOKENS = 16384

# Registers of a consumer besides accumulators and P, row state, counters and what is being computed: while S becomes P,
# and during P·V. With fewer ptxas spills.
_SOFTMAX_REGISTERS = 16
_PRODUCT_REGISTERS = 8

_LARGEST_N = 256

# What `exp2_on_fma` makes of a power x: (x + 120) / 256.
_SPLIT, _OFFSET = 1 / 256, 120 / 256


def value_parts(image: TileImage, registers: int) -> tuple[int, ...] | None:
    """Rows of V, and of ones, that are multiplied at a time; None if there are not ``registers`` enough for the output.

    8-bit integers: wgmma has no N of 32·i + 8, so that the ones go apart. Sums of one tile that meet the output later
    take registers besides it: as few parts as fit.
    """
    kind, rows = FORMATS[image.values], image.value_rows
    left = registers - rows // 2
    if left < image.tokens // 2 + _SOFTMAX_REGISTERS:
        return None
    if kind.v is Int8:
        return image.value_channels, image.sum_rows
    tiles, packed = rows // 8, image.tokens * kind.v.width // 64
    for count in range(1, tiles + 1):
        most = -(-tiles // count)
        if 8 * most <= _LARGEST_N and (kind.in_place or packed + 4 * most + _PRODUCT_REGISTERS <= left):
            return tuple(8 * (tiles * (i + 1) // count - tiles * i // count) for i in range(count))
    return None


@dataclass(frozen=True)
class WarpgroupSoftmax:
    """State of a warpgroup's rows, two per lane as in `WarpgroupScores`.

    With x = y·factor the scores in base 2 and `running_max`,
        P = 2^(x + bias) <= 2^top in V's format,   output = Σ P·V,   row_sum = Σ P   (of the rounded P).
    While no exponent x + bias of a warp passes top, nothing of the state is touched. Otherwise output and row sums are
    multiplied by a power of two, integers shifted right.

    e4m3:    the tensor cores of sm_90a keep about 14 bits of a sum of products of 8-bit floats, so that they sum one
             tile, and tiles are added up in float32
    int8:    |output| <= 127·row_sum, so int32 holds as long as row_sum < 2^31/127: `bound_sums` before every 16384 keys
    float16: as of `FloatSoftmax`, float32 sums

    values: of each of the `parts` of V, its MMA and fragment: descriptors of the planes with the stage last
    output: ((2,2), 1, n8 tiles), channels as in TileImage.output_channels, and a last n8 tile of row sums
    bias:   float32 (2,)
    """

    values: tuple
    output: cute.Tensor
    bias: cute.Tensor
    image: cutlass.Constexpr[TileImage]
    parts: cutlass.Constexpr[tuple]
    fma_eighths: cutlass.Constexpr[int]

    @classmethod
    def create(
        cls, tiles: cute.Pointer, stages: int, stage_bytes: int, image: TileImage, registers: int, fma_eighths: int
    ) -> WarpgroupSoftmax:
        """Empty state. tiles: the ring's stages; registers: of a consumer thread; fma_eighths: see `probabilities`."""
        kind, rows = FORMATS[image.values], image.value_rows
        planes = image.tokens * VALUE_BYTES[image.values] // PLANE_BYTES_PER_ROW
        parts = value_parts(image, registers) or ()
        values, first = [], 0
        for part in parts:
            mma = warpgroup_mma(kind.p, kind.v, part, a_in_registers=True)
            start = tiles + (image.v_offset + first * PLANE_BYTES_PER_ROW)
            v = plane_operand(start, kind.v, part, rows, planes, stages, stage_bytes)
            thread = mma.get_slice(0)
            values.append((mma, thread.make_fragment_B(thread.partition_B(v))))
            first += part
        output = cute.make_rmem_tensor(((2, 2), 1, rows // 8), kind.sums)
        bias = cute.make_rmem_tensor((2,), Float32)
        output.fill(0)
        bias.fill(UNSEEN)
        return cls(tuple(values), output, bias, image, parts, fma_eighths)

    @property
    def chunk_tiles(self) -> int | None:
        """Tiles whose sums are in range after `bound_sums`; None if those of any number are."""
        return _BOUNDED_TOKENS // self.image.tokens if self._integer else None

    @property
    def _format(self) -> _Format:
        return FORMATS[self.image.values]

    @property
    def _integer(self) -> bool:
        return self._format.sums is Int32

    @cute.jit
    def update(self, largest: list[Float32], factors: list[Float32]) -> None:
        """Make room for a tile whose largest scores in this lane's rows are ``largest``.

        What is compared is the very exponent that `probabilities` computes: no P can pass 2^top.
        """
        if self._passes(largest, factors) != 0:
            for r in range_constexpr(2):
                self._scale(r, *self._raised(r, largest[r] * factors[r]))

    @cute.jit
    def raise_max(self, largest: list[Float32], factors: list[Float32]) -> tuple[Int32, cute.Tensor]:
        """`update` but for what was accumulated, to which tensor cores may still add: returns `rescale`'s arguments.

        A region of its own keeps ptxas from putting off what it computes until the tensor cores are waited for.
        """
        counts = cute.make_rmem_tensor((2,), Int32)
        counts.fill(0)
        passes = self._passes(largest, factors)
        if passes != 0:
            for r in range_constexpr(2):
                counts[r], self.bias[r] = self._raised(r, largest[r] * factors[r])
        return passes, counts

    @cute.jit
    def rescale(self, passes: Int32, counts: cute.Tensor) -> None:
        """The other half of `update`: nonzero if any row's maximum was raised, and each row's log2 of the scale."""
        if passes != 0:
            for r in range_constexpr(2):
                self._scale(r, counts[r], self.bias[r])

    def _passes(self, largest: list[Float32], factors: list[Float32]) -> Int32:
        """Nonzero if in any lane of the warp a row does not cover its largest score."""
        exponents = [cute.math.fma(largest[r], factors[r], self.bias[r]) for r in range(2)]
        return any_greater(exponents, [Float32(self._format.top)] * 2)

    def _raised(self, r: int, x: Float32) -> tuple[Int32, Float32]:
        """log2 of the scale of what was accumulated, and bias, when m of row ``r`` covers ``x`` of all its lanes."""
        bias = raised_bias(self.bias[r], quad_max(x), Float32(1), self._format.top, self._format.headroom)
        growth = self.bias[r] - bias
        if const_expr(self._integer):
            # The biases are rounded, so their difference is near the integer it stands for, on either side.
            return (cute.arch.fmin(growth, Float32(31)) + Float32(0.5)).to(Int32), bias
        return cute.arch.fmin(growth, Float32(127)).to(Int32), bias

    def _scale(self, r: int, count: Int32, bias: Float32) -> None:
        """Multiply what row ``r`` accumulated by 2^-``count``, to match its new ``bias``."""
        self.bias[r] = bias
        if const_expr(not self._integer):
            factor = ((127 - count) << 23).bitcast(Float32)
        for n in range(self.image.value_rows // 8):
            for e in range(2):
                sums = self.output[(e, r), 0, n]
                self.output[(e, r), 0, n] = shift_right(sums, count) if self._integer else sums * factor

    def bound_sums(self) -> None:
        """Halve the rows whose sum could pass the bound within the next `chunk_tiles`."""
        for r in range(2):
            count = self._exceeds(self._row_sum(r))
            self._scale(r, count, self.bias[r] - count.to(Float32))

    @cute.jit
    def _exceeds(self, row_sum: Int32) -> Int32:
        return Int32(1) if row_sum >= _SUM_BOUND else Int32(0)

    def finish(self) -> None:
        """After the last tile, by whole warps: every lane of a row gets the row's sum. The MMA has given it to all."""

    def _row_sum(self, r: int) -> Any:
        return self.output[(0, r), 0, self.image.value_channels // 8]

    def row_totals(self, r: int) -> tuple[Float32, Float32]:
        """Row sum of row ``r``, and log2 of Σ 2^x over its keys: -inf if it saw none."""
        total = self._row_sum(r).to(Float32)
        return total, cute.math.log2(total, approx=True, ftz=True) - self.bias[r]

    def exponents(self, scores: cute.Tensor, factors: list[Float32]) -> cute.Tensor:
        """x + bias of ``scores`` in registers of their own, so that those of the scores are free."""
        exponents = cute.make_rmem_tensor(scores.shape, Float32)
        for n in range(self.image.tokens // 8):
            for r in range(2):
                for e in range(2):
                    exponents[(e, r), n] = cute.math.fma(scores[(e, r), n], factors[r], self.bias[r])
        return exponents

    def probabilities(self, scores: cute.Tensor, factors: list[Float32] | None) -> cute.Tensor:
        """P as A operand, ((4,2,2), 1, blocks of 32 tokens), of float16 ((2,2,2), 1, of 16): in the accumulators'
        own order, lane by lane. `fma_eighths` of every 8 in a row are computed on the FMA pipe, the others by MUFU.

        factors: of ``scores``, or None where these are what `exponents` made of them
        """
        each = 32 // self._format.p.width
        blocks = self.image.tokens // (8 * each)
        p = cute.make_rmem_tensor(((each, 2, 2), 1, blocks), self._format.p)
        packed = cute.recast_tensor(p, Int32)
        exponents = (None, None, Float32(_SPLIT), Float32(_OFFSET))
        lines = [self._line(scores, r, factors[r]) if factors else exponents for r in range(2)]
        for k in range(blocks):
            for half in range(2):
                for r in range(2):
                    first = each // 2 * (2 * k + half)
                    some = [scores[(i % 2, r), first + i // 2] for i in range(each)]
                    packed[(0, r, half), 0, k] = self._register(some, lines[r], each * half)
        return p

    def _line(self, scores: cute.Tensor, r: int, factor: Float32) -> tuple:
        """What `_register` needs to know of row ``r``: exponents as a line over ``scores``, for MUFU and for FMAs."""
        return factor, self.bias[r], factor * _SPLIT, cute.math.fma(self.bias[r], _SPLIT, _OFFSET)

    def _register(self, scores: list, line: tuple, place: int) -> Int32:
        """P of neighbouring ``scores`` of a row, the first of which is ``place``-th of its block, as one register."""
        factor, bias, *scaled = line
        some = []
        for i, y in enumerate(scores):
            if (place + i) % 8 < self.fma_eighths:
                some.append(exp2_on_fma(y, *scaled))
            else:
                x = y if factor is None else cute.math.fma(y, factor, bias)
                some.append(cute.math.exp2(x, approx=True, ftz=True))
        return self._format.pack(some)

    def accumulate(self, p: cute.Tensor, stage: Int32) -> None:
        """output += P·V and row sums += P·1, for the tile in ``stage``."""
        first = 0
        for group in self.groups:
            sums = self.issue(p, stage, group)
            warpgroup.wait_group(0)
            self.add(sums, first)
            first += sum(self.parts[i] for i in group)

    @property
    def groups(self) -> list[list[int]]:
        """Which of the `parts` of V are multiplied together: all where the MMA adds to the output, or else one."""
        parts = list(range(len(self.parts)))
        return [parts] if self._format.in_place else [[i] for i in parts]

    def issue(self, p: cute.Tensor, stage: Int32, group: list[int]) -> cute.Tensor | None:
        """Issue P·V of the parts in ``group``, to be waited for. Returns their sums of the tile, None if in place."""
        sums = None
        if not self._format.in_place:
            rows = sum(self.parts[i] for i in group)
            sums = cute.make_rmem_tensor(((2, 2, rows // 8), 1, 1), Float32)
        warpgroup.fence()
        for i in group:
            mma, values = self.values[i]
            target = self._output(sum(self.parts[:i]), self.parts[i]) if sums is None else sums
            multiply(mma, target, p, values[None, None, None, stage], add=sums is None)
        warpgroup.commit_group()
        return sums

    def add(self, sums: cute.Tensor | None, first: int = 0) -> None:
        """Add the finished ``sums`` of `issue`, of the rows of V from ``first`` on, to the output."""
        if sums is not None:
            for i in range(cute.size(sums)):
                self.output[first // 2 + i] = self.output[first // 2 + i] + sums[i]

    def _output(self, first: int, rows: int) -> cute.Tensor:
        """The accumulators of ``rows`` rows of V from ``first`` on, as the MMA has them."""
        return cute.make_tensor(self.output.iterator + first // 2, cute.make_layout(((2, 2, rows // 8), 1, 1)))
