"""Which kernel serves a (recipe, problem, arch): one table, and one reason for every refusal."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cute_attn.arch import Arch, arch_from_name
from cute_attn.problem import Problem
from cute_attn.recipe import RECIPES, Recipe, as_recipe
from cute_attn.tile_config import TileConfig

if TYPE_CHECKING:
    from cute_attn.kernels.attention_sm80 import AttentionConfig

__all__ = ["Support", "attention_config", "default_config", "quantizer_refusal", "refusal", "supports"]


@dataclass(frozen=True)
class Support:
    """Answer of `supports`: true if there is a kernel; otherwise ``reason`` says why not and what to use instead."""

    reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class _Family:
    """Kernels that share a main loop: what they serve. kernel: recipe by the name that kernels/recipes.py gives it."""

    kernel: str
    qk_format: str
    pv_format: str
    archs: tuple[str, ...]
    head_dims: range


# Warp-level mma.sync m16n8k32 with s8 and u8 operands exists on all of these; sm_100a has it only as an emulation.
_WARP_MMA = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120a")

# m16n8k64 with s4 operands: Hopper and later have no such instruction.
_INT4_MMA = ("sm_80", "sm_86", "sm_89")

# mma.sync with E4M3 operands, from sm_89 on.
_E4M3_MMA = ("sm_89", "sm_120a")

_EIGHTS = range(16, 257, 8)

_FAMILIES = (
    _Family("int8", "int8", "int8", _WARP_MMA, _EIGHTS),
    _Family("int8_fp16", "int8", "float16", _WARP_MMA, _EIGHTS),
    _Family("int8_fp8", "int8", "e4m3", _E4M3_MMA, _EIGHTS),
    _Family("fp8", "e4m3", "e4m3", _E4M3_MMA, _EIGHTS),
    _Family("int4_int8", "int4", "int8", _INT4_MMA, _EIGHTS),
    _Family("int4_fp16", "int4", "float16", _INT4_MMA, _EIGHTS),
    _Family("fp16", "float16", "float16", _WARP_MMA, _EIGHTS),
    _Family("bf16", "bfloat16", "bfloat16", _WARP_MMA, _EIGHTS),
)


_LARGEST_GRID = 65535
"""Most CTAs along y or z of a launch (CUDA C++ Programming Guide, technical specifications)."""

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


@functools.lru_cache(maxsize=1024)  # asked for again by every call of `attention`
def refusal(recipe: Recipe, arch: Arch, problem: Problem, config: TileConfig | None = None) -> str | None:
    """None if a kernel serves this call, else the reason, with what to use instead."""
    family = _family(recipe)
    if arch.name not in family.archs:
        return (
            f"recipe {recipe.name!r} has no kernel for {arch.name} ({arch.gpus}); it runs on {', '.join(family.archs)}"
        )
    if problem.dtype not in recipe.dtypes:
        others = (r.name for r in RECIPES.values() if problem.dtype in r.dtypes and not r.quantises)
        return (
            f"recipe {recipe.name!r} takes {recipe.dtypes[0]} tensors, these are {problem.dtype}; "
            f"use recipe {next(others)!r}, or convert them"
        )
    if problem.head_dim not in family.head_dims:
        offered = family.head_dims
        fits = [d for d in offered if d > problem.head_dim]
        instead = (
            f"pad Q, K and V with zeros to {fits[0]} and pass softmax_scale={problem.head_dim}**-0.5"
            if fits
            else "use torch.nn.functional.scaled_dot_product_attention"
        )
        return (
            f"head_dim={problem.head_dim} has no kernel in recipe {recipe.name!r} "
            f"(there are multiples of {offered.step} from {offered[0]} to {offered[-1]}); {instead}"
        )
    tile = config or default_config(recipe, problem, arch)
    for name, most in (("batch", _LARGEST_GRID), ("heads", _LARGEST_GRID), ("seq_q", _LARGEST_GRID * tile.rows)):
        if (value := getattr(problem, name)) > most:
            return f"{name}={value} has no kernel, a CUDA grid reaches {most}; split the call along that axis"
    return _kernel_refusal(recipe, problem.head_dim, problem.dtype, problem.causal, tile, arch)


def _family(recipe: Recipe) -> _Family:
    return next(f for f in _FAMILIES if (f.qk_format, f.pv_format) == (recipe.qk_format, recipe.pv_format))


def supports(recipe: str | Recipe, arch: str, problem: Problem, config: TileConfig | None = None) -> Support:
    """Whether a kernel serves ``problem`` with ``recipe`` on ``arch`` ("sm_80" ...), and if not, why.

    Raises ValueError for names that are not known at all.
    """
    return Support(refusal(as_recipe(recipe), arch_from_name(arch), problem, config))


def quantizer_refusal(recipe: Recipe, arch: Arch, shape: tuple[int, ...]) -> str | None:
    """None if a tensor of that ``shape`` [B, H, S, D] can be quantised for a kernel on ``arch``, else the reason."""
    if not recipe.quantises:
        return f"recipe {recipe.name!r} quantises nothing; pass q, k and v to attention as they are"
    batch, heads, _, head_dim = shape
    probe = Problem(batch=batch, heads=heads, kv_heads=heads, seq_q=1, seq_k=1, head_dim=head_dim, dtype="float16")
    return refusal(recipe, arch, probe)


@functools.lru_cache(maxsize=1024)
def default_config(recipe: Recipe, problem: Problem, arch: Arch) -> TileConfig:
    """The tile config for a problem nobody has tuned: the smallest CTA that holds all of Q, or the usual one."""
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
        needed = _shared_bytes(recipe, head_dim, tile)
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


def _shared_bytes(recipe: Recipe, head_dim: int, tile: TileConfig) -> int:
    """Bytes of dynamic shared memory that a CTA takes."""
    from cute_attn.kernels.attention_sm80 import AttentionSm80

    config = attention_config(recipe, head_dim, "float16", False, tile, has_lse=False, out_align=16)
    return AttentionSm80(config).shared_bytes


def attention_config(
    recipe: Recipe,
    head_dim: int,
    dtype: str,
    causal: bool,
    tile: TileConfig,
    *,
    has_lse: bool = False,
    varlen_k: bool = False,
    out_align: int = 16,
) -> AttentionConfig:
    """The attention kernel's own static configuration."""
    from cute_attn.kernels.attention_sm80 import AttentionConfig

    return AttentionConfig(
        head_dim=head_dim,
        out_dtype=dtype,
        causal=causal,
        has_lse=has_lse,
        out_align=out_align,
        warps=tile.warps,
        m_tiles=tile.m_tiles,
        stages=tile.stages,
        recipe=_family(recipe).kernel,
        accumulate=recipe.accumulate,
        smooth_q=recipe.smooth_q,
        smooth_v=recipe.smooth_v,
        varlen_k=varlen_k,
    )


@functools.lru_cache(maxsize=256)
def _kernel_refusal(
    recipe: Recipe, head_dim: int, dtype: str, causal: bool, tile: TileConfig, arch: Arch
) -> str | None:
    """What the kernel class itself, or the chip's shared memory, has against this tile config."""
    from cute_attn.kernels.attention_sm80 import AttentionSm80

    kernel_config = attention_config(recipe, head_dim, dtype, causal, tile, has_lse=True)
    if reason := AttentionSm80.can_implement(kernel_config):
        return f"{tile}: {reason}"
    needed = _shared_bytes(recipe, head_dim, tile)
    if needed > arch.shared_bytes:
        return (
            f"{tile} needs {needed} bytes of shared memory per CTA, {arch.name} has {arch.shared_bytes}; "
            "use fewer stages or warps"
        )
    return None
