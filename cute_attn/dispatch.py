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

_EIGHTS = range(16, 257, 8)

_FAMILIES = (
    _Family("int8", "int8", "int8", _WARP_MMA, _EIGHTS),
    _Family("int8_fp16", "int8", "float16", _WARP_MMA, _EIGHTS),
    _Family("int4_int8", "int4", "int8", _INT4_MMA, _EIGHTS),
    _Family("int4_fp16", "int4", "float16", _INT4_MMA, _EIGHTS),
    _Family("fp16", "float16", "float16", _WARP_MMA, _EIGHTS),
    _Family("bf16", "bfloat16", "bfloat16", _WARP_MMA, _EIGHTS),
)


_LARGEST_GRID = 65535
"""Most CTAs along y or z of a launch (CUDA C++ Programming Guide, technical specifications)."""

_LARGE_TILES = {
    # 32-row warps spill there, in the masked loop above all. 16-row warps read shared memory twice as often, 22 cycles
    # per 32 scores, which hide behind this chip's 33 of tensor work.
    ("int8", "sm_120a", 128): TileConfig(warps=8, m_tiles=1),
    ("int8_fp16", "sm_120a", 128): TileConfig(warps=8, m_tiles=1),
    ("fp16", "sm_120a", 128): TileConfig(warps=8, m_tiles=1),
    ("bf16", "sm_120a", 128): TileConfig(warps=8, m_tiles=1),
    # Two stages of V in float16 leave these chips' 100 KiB room for one CTA: eight warps, as many as registers allow.
    ("int8_fp16", "sm_86", 128): TileConfig(warps=8),
    ("int8_fp16", "sm_89", 128): TileConfig(warps=8),
}
"""Tile config for long sequences by (kernel, arch, head dim), where it is not ``TileConfig()``."""


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
    full = _LARGE_TILES.get((_family(recipe).kernel, arch.name, problem.head_dim), TileConfig())
    smaller = (TileConfig(warps=1, m_tiles=1), TileConfig(warps=2, m_tiles=1), replace(full, warps=full.warps // 2))
    return next((tile for tile in smaller if problem.seq_q <= tile.rows), full)


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
    needed = AttentionSm80(kernel_config).shared_bytes
    if needed > arch.shared_bytes:
        return (
            f"{tile} needs {needed} bytes of shared memory per CTA, {arch.name} has {arch.shared_bytes}; "
            "use fewer stages or warps"
        )
    return None
