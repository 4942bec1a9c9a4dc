"""The online softmax of every recipe in plain torch: state of all query rows, and how a KV tile changes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from cute_attn import float32
from cute_attn.recipe import Recipe

__all__ = ["Rows", "rows_of"]

_UNSEEN = 2.0**100
_MARGIN = 2.0**-20  # the kernel's room for the approximate reciprocal of a row's scale


@dataclass
class Rows:
    """State of all query rows: [B, Hq, rows] (output: [B, Hq, rows, D]); each row belongs to a warp of neighbours.

    scale: factor from y to base-2 scores; warp_rows: rows of a warp, which share the decision to rescale

    Scores up to the integer m are covered: P = 2^(y·scale + bias) with bias = top - m is at most 2^top. `headroom` is
    how far m is put above a new maximum, `largest_sum` the row sum at which `bound_sums` raises m by one, `mma_tokens`
    what an MMA of P·V sums up before it rounds to its accumulator's type, where that is float16.
    """

    mma_tokens: ClassVar[int] = 16
    top: ClassVar[float]
    headroom: ClassVar[float]
    largest_sum: ClassVar[float] = math.inf
    p_dtype: ClassVar[torch.dtype] = torch.float16
    sum_dtype: ClassVar[torch.dtype] = torch.float32
    output_dtype: ClassVar[torch.dtype] = torch.float32

    scale: torch.Tensor
    head_dim: int
    warp_rows: int
    m: torch.Tensor = field(init=False)
    bias: torch.Tensor = field(init=False)
    row_sum: torch.Tensor = field(init=False)
    output: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.m = torch.full_like(self.scale, -_UNSEEN)
        self.bias = torch.full_like(self.scale, _UNSEEN)
        self.row_sum = torch.zeros_like(self.scale, dtype=self.sum_dtype)
        self.output = self.scale.new_zeros(*self.scale.shape, self.head_dim, dtype=self.output_dtype)

    def scale_down(self, count: torch.Tensor) -> None:
        """Multiply row sums and outputs by 2^-``count`` (whole numbers ≥ 0, float32 [B, Hq, rows])."""
        raise NotImplementedError

    def accumulate(self, y: torch.Tensor, values: torch.Tensor) -> None:
        """Add a tile of scores y float32 [B, Hq, rows, tokens] with ``values`` float32 [B, Hq, tokens, D]."""
        raise NotImplementedError

    def probabilities(self, y: torch.Tensor) -> torch.Tensor:
        """2^(y·scale + bias) as `p_dtype`."""
        return float32.exp2(float32.fma(y, self.scale[..., None], self.bias[..., None])).to(self.p_dtype)

    def raise_max(self, m: torch.Tensor, chosen: torch.Tensor) -> None:
        """Give the ``chosen`` rows the integer max ``m``, and scale what they accumulated under the smaller old one."""
        m = torch.where(chosen, torch.maximum(m, self.m), self.m)
        self.scale_down(m - self.m)
        self.bias = torch.where(m != self.m, float32.round_down(self.top - m.double()), self.bias)
        self.m = m

    def limit(self) -> torch.Tensor:
        """The largest score y of each row that the held max covers; -inf, at first, for rows that have seen no key."""
        m = (self.top - self.bias.double()).float()
        limit = (m - m.abs() * _MARGIN) / self.scale
        return torch.where(self.bias == _UNSEEN, -math.inf, limit)

    def make_room(self, y: torch.Tensor) -> None:
        """If a score passes its row's limit, raise the max of every row of that warp."""
        top = y.amax(-1)
        passed = (top > self.limit()).unflatten(-1, (-1, self.warp_rows)).any(-1)
        x = float32.round_up(top.double() * self.scale.double())
        m = torch.ceil(float32.round_up(x.double() + self.headroom))
        m = torch.where(top == -math.inf, self.m, m)  # such a row sees no key of this tile and keeps its max
        self.raise_max(m, passed.repeat_interleave(self.warp_rows, -1))

    def bound_sums(self, due: torch.Tensor) -> None:
        """One forced rescale of rows whose sum could grow too large in the next 16384 keys; ``due``: bool, per row."""
        self.raise_max(self.m + 1, due & (self.row_sum >= self.largest_sum))


class _Integer(Rows):
    """pv_format "int8": P as u8 by way of float16, output and row sum in int32."""

    top = float(torch.tensor(7.994353436858858))  # log2(255) as float32
    headroom = 0.5
    largest_sum = 12_700_000
    sum_dtype = output_dtype = torch.int32

    def scale_down(self, count: torch.Tensor) -> None:
        shift = count.clamp(max=31).to(torch.int32)
        self.row_sum >>= shift
        self.output >>= shift[..., None]

    def accumulate(self, y: torch.Tensor, values: torch.Tensor) -> None:
        p = (self.probabilities(y) + 1024).float() - 1024
        self.row_sum += p.sum(-1).to(torch.int32)
        self.output += (p @ values).to(torch.int32)


class _Float32(Rows):
    """pv_format "float16", accumulate "float32": P in float16, summed exactly but for float32."""

    top = headroom = 8.0

    def scale_down(self, count: torch.Tensor) -> None:
        # The kernel builds the factor from its exponent: below 2^-126 it is zero.
        factor = torch.where(count < 127, torch.exp2(-count.clamp(max=126)), 0.0)
        self.row_sum *= factor
        self.output *= factor[..., None].to(self.output_dtype)

    def accumulate(self, y: torch.Tensor, values: torch.Tensor) -> None:
        p = self.probabilities(y).float()
        self.row_sum += p.sum(-1)
        self.add_products(p, values)

    def add_products(self, p: torch.Tensor, values: torch.Tensor) -> None:
        self.output += p @ values


class _Float16(_Float32):
    """accumulate "float16"."""

    top, headroom = -4.0, 4.0
    output_dtype = torch.float16

    def add_products(self, p: torch.Tensor, values: torch.Tensor) -> None:
        self.output = _add_in_float16(self.output, p, values, self.mma_tokens)


class _BFloat16(_Float32):
    """pv_format "bfloat16"."""

    p_dtype = torch.bfloat16


class _TwoLevels(_Float32):
    """accumulate "float16+float32": sums of 64 tokens in float16."""

    def add_products(self, p: torch.Tensor, values: torch.Tensor) -> None:
        empty = torch.zeros_like(self.output).half()
        for p_64, values_64 in zip(p.split(64, -1), values.split(64, 2), strict=True):
            self.output += _add_in_float16(empty, p_64, values_64, self.mma_tokens).float()


class _E4M3(_Float32):
    """pv_format "e4m3", accumulate "float32+float32": P in E4M3, a tile's products summed before they meet the rest.

    The row sum is of the rounded P; that of a tile of 64 tokens is exact, multiples of 2^-9 that come to 2^15 at most.
    """

    top, headroom = float(float32.round_down(torch.tensor(math.log2(448), dtype=torch.float64))), 1.0
    mma_tokens = 32
    p_dtype = torch.float8_e4m3fn


class _E4M3TwoLevels(_E4M3, _TwoLevels):
    """pv_format "e4m3", accumulate "float16+float32"."""


class _E4M3Line(_E4M3):
    """exponent "fast": P's byte is 8·(x + 7) less a mean of what log2(1 + f) has more than f, rounded, in 0…126.

    Of integer scores the kernel has it in fixed point, some hundredths of a byte away before it is rounded.
    """

    offset = 6.9425

    def probabilities(self, y: torch.Tensor) -> torch.Tensor:
        offset = float32.round_down(self.bias.double() + torch.tensor(self.offset).double()) / 16
        byte = float32.fma(y, self.scale[..., None] / 16, offset[..., None]).clamp(0, 1) * 128
        return byte.round().to(torch.uint8).view(self.p_dtype)


def _add_in_float16(total: torch.Tensor, p: torch.Tensor, values: torch.Tensor, mma_tokens: int) -> torch.Tensor:
    """total + p·values by MMAs of ``mma_tokens`` tokens whose results are float16."""
    for p_k, values_k in zip(p.split(mma_tokens, -1), values.split(mma_tokens, 2), strict=True):
        total = (total.float() + p_k @ values_k).half()
    return total


_ROWS: dict[tuple[str, str], type[Rows]] = {
    ("int8", "int32"): _Integer,
    ("float16", "float32"): _Float32,
    ("float16", "float16"): _Float16,
    ("float16", "float16+float32"): _TwoLevels,
    ("bfloat16", "float32"): _BFloat16,
    ("e4m3", "float32+float32"): _E4M3,
    ("e4m3", "float16+float32"): _E4M3TwoLevels,
}


def rows_of(recipe: Recipe) -> type[Rows]:
    """The class of row state that simulates ``recipe``."""
    return _E4M3Line if recipe.exponent == "fast" else _ROWS[recipe.pv_format, recipe.accumulate]
