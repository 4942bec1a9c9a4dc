"""The kernels that the page is about, and the ranges of bytes in their KV tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cute_attn.arch import ARCHS
from cute_attn.attention_kernels import attention_kernel
from cute_attn.dispatch import default_config, refusal
from cute_attn.kernels.attention_sm80 import AttentionConfig, AttentionSm80
from cute_attn.kernels.tile_image import TILE_TOKENS, TileImage
from cute_attn.problem import Problem
from cute_attn.recipe import recipes

from .fragments import F16, S4, S8, U8, Mma

__all__ = ["ARCH_NAMES", "HEAD_DIM", "HEAD_DIMS", "LOOP_NAMES", "NAMES", "Part", "config_of", "has", "mmas_of", "parts"]

NAMES = ("int8", "int8_fp16", "int4_int8", "int4_fp16", "bf16")
"""Recipes that the page tells apart; `fp16` lies as `bf16` does."""

LOOP_NAMES = ("int8", "int8_fp16", "int4_int8", "bf16")
"""Those whose main loop it shows: that of `int4_fp16` has the Q·Kᵀ of `int4_int8` and the P·V of `int8_fp16`."""

HEAD_DIM = 128
"""What figures and passports are drawn for."""

HEAD_DIMS = (64, 128, 256)
"""What budgets of registers are given for."""

ARCH_NAMES = ("sm_80", "sm_89", "sm_120a")
"""sm_86 has the limits of sm_89; what runs on sm_90a are other kernels."""

_LONG = 4096


def config_of(name: str, head_dim: int = HEAD_DIM, arch: str = "sm_80") -> AttentionConfig:
    """The kernel that `attention` launches for a long sequence without a mask."""
    recipe, problem = recipes()[name], _problem(name, head_dim)
    tile = default_config(recipe, problem, ARCHS[arch])
    return attention_kernel(recipe, head_dim, problem.dtype, False, tile)[1]


def _problem(name: str, head_dim: int) -> Problem:
    return Problem(1, 1, 1, _LONG, _LONG, head_dim, recipes()[name].dtypes[0], False)


def has(name: str, arch: str) -> bool:
    """Whether the recipe has a kernel for ``arch``."""
    return refusal(recipes()[name], ARCHS[arch], _problem(name, HEAD_DIM)) is None


def mmas_of(config: AttentionConfig) -> tuple[Mma, Mma]:
    """MMAs of Q·Kᵀ and of P·V."""
    image = AttentionSm80(config).image
    if not isinstance(image, TileImage):
        return F16, F16
    return S4 if image.keys == "int4" else S8, U8 if image.values == "int8" else F16


@dataclass(frozen=True)
class Part:
    """Bytes [begin, end) of a stage."""

    name: str
    begin: int
    end: int
    what: str


def parts(kernel: AttentionSm80) -> tuple[Part, ...]:
    """A stage from its first to its last byte: the KV tile, and delta if Q is smoothed."""
    image: Any = kernel.image
    if not isinstance(image, TileImage):
        return (
            Part("K", image.k_offset, image.v_offset, "rows of K as they come"),
            Part("V", image.v_offset, image.nbytes, "rows of V as they come"),
        )
    scale, half = image.scale_offset, 4 * TILE_TOKENS
    delta = (Part("Δ", image.nbytes, kernel.stage_bytes, "delta"),) if kernel.delta_blocks else ()
    return (
        Part("K", image.k_offset, image.v_offset, f"K, {image.keys}"),
        Part("Vᵀ", image.v_offset, scale, f"V transposed, {image.values}"),
        Part("c", scale, scale + half, "K's scales"),
        Part("−M·c", scale + half, image.nbytes, "scales times −SCORE_MAGIC"),
        *delta,
    )
