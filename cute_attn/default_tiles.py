"""The tile config for a problem that nobody has tuned."""

from __future__ import annotations

import functools
from dataclasses import replace

from cute_attn.arch import Arch
from cute_attn.attention_kernels import attention_kernel, shared_bytes
from cute_attn.problem import Problem
from cute_attn.recipe import Recipe
from cute_attn.tile_config import TileConfig, WarpgroupTileConfig

__all__ = ["warp_tile", "warpgroup_tile"]

_LARGE_TILES = (
    TileConfig(warps=4, m_tiles=2, stages=2),
    TileConfig(warps=8, m_tiles=2, stages=2),
    TileConfig(warps=8, m_tiles=2, stages=1),
    TileConfig(warps=8, m_tiles=1, stages=2),
    TileConfig(warps=8, m_tiles=1, stages=1),
    TileConfig(warps=4, m_tiles=1, stages=1),
)
"""Tile configs for long sequences, the best first.

Registers allow eight warps of up to 255 on a multiprocessor, two for each tensor core, so that one computes 2^x while
the other multiplies. Two CTAs of four, which do not wait for each other's barriers, are the first choice where shared
memory holds both; then one of eight. 16-row warps read K and V from shared memory twice as often.
"""

_SYSTEM_SHARED_BYTES = 1024
"""Of every CTA's shared memory, reserved by the system (CUDA C++ Programming Guide, compute capability 8.x on)."""


def warp_tile(recipe: Recipe, problem: Problem, arch: Arch) -> TileConfig:
    """Of the warp-MMA kernels: the smallest CTA that holds all of Q, or the usual one."""
    full = _large_tile(recipe, problem.head_dim, arch)
    smaller = (
        replace(full, warps=1, m_tiles=1),
        replace(full, warps=2, m_tiles=1),
        replace(full, warps=full.warps // 2),
    )
    return next((tile for tile in smaller if problem.seq_q <= tile.rows), full)


@functools.lru_cache(maxsize=1024)
def _large_tile(recipe: Recipe, head_dim: int, arch: Arch) -> TileConfig:
    """The first of `_LARGE_TILES` that fits."""
    most = _largest_32_row_head_dim(recipe, arch)
    for tile in _LARGE_TILES:
        needed = shared_bytes(recipe, head_dim, tile)
        together = 8 // tile.warps if tile.m_tiles == 2 else 1
        available = arch.shared_bytes + _SYSTEM_SHARED_BYTES
        if (tile.m_tiles == 1 or head_dim <= most) and together * (needed + _SYSTEM_SHARED_BYTES) <= available:
            return tile
    return _LARGE_TILES[-1]


def _largest_32_row_head_dim(recipe: Recipe, arch: Arch) -> int:
    """Up to where 32-row warps keep all registers: O takes head_dim of them, half of that in float16.

    With float accumulators sm_120a spills beyond half of the others'. Its tensor cores, 52 cycles per 32 scores and
    more, leave 16-row warps time to read shared memory twice as often (30).
    """
    most = 256 if recipe.accumulate == "float16" else 128
    return most // 2 if arch.name == "sm_120a" and recipe.accumulate != "int32" else most


_PACKED_SHARE = 0.9
"""As in FlashAttention-3's `should_pack_gqa` (hopper/heuristics.h)."""


def warpgroup_tile(recipe: Recipe, problem: Problem, arch: Arch) -> WarpgroupTileConfig:
    """Of the warpgroup-MMA kernels: the smallest CTA that holds all of Q, or the largest that there is.

    Query heads that share a KV head are packed where the share of a large CTA's rows that are filled without it is
    below `_PACKED_SHARE` of what it is with it: where tokens are few, or make a last CTA of few. Unmeasured here.
    """
    full = _large_warpgroup_tile(recipe, problem.head_dim, arch)
    rows = problem.seq_q * problem.group
    pack = _filled(problem.seq_q, full.rows) < _PACKED_SHARE * _filled(rows, full.rows)
    tiles = [replace(full, warpgroups=n, pack_gqa=pack) for n in range(1, full.warpgroups + 1)]
    return next((tile for tile in tiles if (rows if pack else problem.seq_q) <= tile.rows), tiles[-1])


def _filled(rows: int, cta_rows: int) -> float:
    """Share of the rows of CTAs of ``cta_rows`` that ``rows`` fill; 0 of none."""
    return rows / max(-(-rows // cta_rows) * cta_rows, 1)


@functools.lru_cache(maxsize=1024)
def _large_warpgroup_tile(recipe: Recipe, head_dim: int, arch: Arch) -> WarpgroupTileConfig:
    """As many consumer warpgroups as registers allow, which read a KV tile together, then as many stages as fit.

    Up to four tiles: one that is computed with and three on their way. Unmeasured; unquantised K and V of a tile take a
    stage each.
    """
    most = 4 if recipe.quantises else 8
    tiles = [WarpgroupTileConfig(warpgroups, n) for warpgroups in (3, 2, 1) for n in range(most, 1, -1)]
    return next(tile for tile in tiles if _fits(recipe, head_dim, tile, arch))


def _fits(recipe: Recipe, head_dim: int, tile: WarpgroupTileConfig, arch: Arch) -> bool:
    kernel_class, config = attention_kernel(recipe, head_dim, recipe.dtypes[0], False, tile)
    return not kernel_class.can_implement(config) and kernel_class(config).shared_bytes <= arch.shared_bytes
