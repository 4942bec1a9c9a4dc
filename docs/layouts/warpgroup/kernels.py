"""The kernels that the page is about: those that `attention` launches for a long sequence without a mask."""

from __future__ import annotations

from functools import cache
from itertools import product

from cute_attn import jit
from cute_attn.arch import ARCHS
from cute_attn.attention_kernels import attention_kernel
from cute_attn.dispatch import default_config, refusal
from cute_attn.jit import Program
from cute_attn.kernels.attention_sm90 import AttentionSm90
from cute_attn.kernels.tile_image import TileImage
from cute_attn.kernels.warpgroup_recipes import WARPGROUP_RECIPES
from cute_attn.problem import Problem
from cute_attn.recipe import Recipe, recipes
from cute_attn.report import KernelReport, report
from cute_attn.tile_config import WarpgroupTileConfig

__all__ = [
    "ARCH", "HEAD_DIM", "HEAD_DIMS", "NAMES", "SHOWN", "elsewhere", "image_of", "kernel_of", "kernel_report",
    "program_of",
]  # fmt: skip

ARCH = "sm_90a"

NAMES = tuple(WARPGROUP_RECIPES)

SHOWN = ("int8_fp8", "bf16")
"""Recipes whose tensors have passports: one whose tiles are images, one whose tiles come from ordinary tensors."""

HEAD_DIM = 128
"""What figures and passports are drawn for."""

HEAD_DIMS = (64, 128, 256)
"""What budgets and costs are given for."""

_LONG = 4096


def _problem(recipe: Recipe, head_dim: int) -> Problem:
    return Problem(1, 1, 1, _LONG, _LONG, head_dim, recipe.dtypes[0], False)


@cache
def kernel_of(name: str, head_dim: int = HEAD_DIM) -> AttentionSm90:
    recipe = recipes()[name]
    problem = _problem(recipe, head_dim)
    tile = default_config(recipe, problem, ARCHS[ARCH])
    return AttentionSm90(attention_kernel(recipe, head_dim, problem.dtype, False, tile)[1])


def image_of(name: str) -> TileImage:
    """The tile image of a recipe that quantises."""
    image = kernel_of(name).image
    assert isinstance(image, TileImage)
    return image


def program_of(name: str, head_dim: int = HEAD_DIM) -> Program:
    return jit.build(AttentionSm90, kernel_of(name, head_dim).config, ARCH)


@cache
def kernel_report(name: str, head_dim: int) -> KernelReport:
    image = kernel_of(name, head_dim).image
    (kernel,) = report(program_of(name, head_dim), image.key_dims, image.value_channels)
    return kernel


_VARIED = {
    "qk_scale": ("token", "thread", "warp", "block"),
    "smooth_q": (False, True),
    "smooth_v": (False, True),
    "v_scale": ("channel", "tensor"),
    "accumulate": ("int32", "float32", "float16", "float16+float32", "float32+float32"),
}


def elsewhere() -> dict[tuple[str, str], dict[str, list[str]]]:
    """(field, value) -> presets that the warpgroup MMAs do not serve if that field is changed so, by what becomes of
    them on sm_90a: "warp MMA" or "refused"."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for (field, values), name in product(_VARIED.items(), NAMES):
        for value in values:
            try:
                recipe = recipes()[name].replace(**{field: value})
            except ValueError:  # not offered with these formats
                continue
            problem = _problem(recipe, HEAD_DIM)
            if refusal(recipe, ARCHS[ARCH], problem) is not None:
                fate = "refused"
            elif not isinstance(default_config(recipe, problem, ARCHS[ARCH]), WarpgroupTileConfig):
                fate = "warp MMA"
            else:
                continue
            found.setdefault((field, repr(value)), {}).setdefault(fate, []).append(name)
    return found
