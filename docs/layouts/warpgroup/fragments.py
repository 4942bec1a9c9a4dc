"""Which thread of a warpgroup holds which element, read off the MMAs that the kernels make."""

from __future__ import annotations

from functools import cache
from typing import Any

from cutlass import BFloat16, Float8E4M3FN, Float16, Int8, Uint8
from cutlass.cute.nvgpu import OperandMajorMode

from cute_attn.kernels.swizzled_tile import SwizzledTile
from cute_attn.kernels.tile_image import TileImage
from cute_attn.kernels.warpgroup_mma import warpgroup_mma

from ..fragments import Fragment, static
from ..permutations import values_token_of_k
from ..tracing import while_tracing
from .kernels import ARCH, kernel_of

__all__ = [
    "p_operand", "p_tokens", "packed_scores", "s_accumulator", "score_element", "sums_accumulator", "v_tokens",
]  # fmt: skip

_ELEMENTS = {
    "int8": Int8, "uint8": Uint8, "e4m3": Float8E4M3FN, "float16": Float16, "bfloat16": BFloat16,
}  # fmt: skip


def _fragment(operand: str, a: str, b: str, columns: int, *, in_registers: bool, b_major: Any = None) -> Fragment:
    def read() -> Any:
        major = b_major or OperandMajorMode.K
        mma = warpgroup_mma(_ELEMENTS[a], _ELEMENTS[b], columns, a_in_registers=in_registers, b_major=major)
        return mma.shape_mnk, static(mma.tv_layout_A if operand == "A" else mma.tv_layout_C)

    (m, n, k), layout = while_tracing(read, ARCH)
    bits = _ELEMENTS[a].width if operand == "A" else 32
    return Fragment(operand, (m, k) if operand == "A" else (m, n), layout, bits)


@cache
def s_accumulator(name: str) -> Fragment:
    """S of a warpgroup, (64, 128): what Q·Kᵀ leaves in its threads."""
    image = kernel_of(name).image
    keys = image.keys if isinstance(image, TileImage) else image.values
    return _fragment("C", keys, keys, image.tokens, in_registers=False)


@cache
def p_operand(name: str) -> Fragment:
    """P of one instruction, (64, k): what P·V wants in the threads' registers."""
    values = kernel_of(name).image.values
    p = "uint8" if values == "int8" else values
    return _fragment("A", p, values, 32, in_registers=True)


@cache
def sums_accumulator(name: str) -> Fragment:
    """P·V and P·1 of a warpgroup, (64, rows of V): where there are rows of ones, the last n8 tile has the row sums.

    Accumulators do not depend on types, and those of V's parts follow one another as those of the whole would:
    8-bit integers, which have no N of 136, are asked for as E4M3.
    """
    image = kernel_of(name).image
    values = "e4m3" if image.values == "int8" else image.values
    return _fragment("C", values, values, image.value_rows, in_registers=True)


def score_element(name: str, thread: int, value: int) -> tuple[int, int]:
    """(row, token) of S in a thread's accumulator ``value``."""
    row, column = s_accumulator(name).place(thread, value)
    return row, kernel_of(name).image.score_tokens(column % 8, column // 8)


def v_tokens(name: str) -> list[int]:
    """Token of V at each k of the instructions of P·V."""
    image = kernel_of(name).image
    if isinstance(image, SwizzledTile):  # rows of V as they come
        starts = {image.columns(0, token): token for token in range(image.tokens)}
        return [starts[offset] for offset in sorted(starts)]
    return values_token_of_k(image)


def p_tokens(name: str, thread: int, block: int) -> list[tuple[int, int]]:
    """(row, token) of P that instruction ``block`` expects in each of a thread's elements of A."""
    a, order = p_operand(name), v_tokens(name)
    places = (a.place(thread, value) for value in range(a.values))
    return [(row, order[block * a.shape[1] + k]) for row, k in places]


def packed_scores(name: str, thread: int, block: int) -> list[tuple[int, int]]:
    """(row, token) of S in the same elements, as `WarpgroupSoftmax.probabilities` packs them.

    Register 2·half + r has, of row r, the accumulators of as many n8 tiles as fill it, two columns of each.
    """
    tiles = p_operand(name).packed // 2
    return [
        score_element(name, thread, 4 * ((2 * block + half) * tiles + t) + 2 * r + e)
        for half in range(2)
        for r in range(2)
        for t in range(tiles)
        for e in range(2)
    ]
