"""Which kernel serves a (recipe, problem, arch): one table, and one reason for every refusal."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cute_attn.arch import ARCHS, Arch, arch_from_name
from cute_attn.attention_kernels import attention_kernel, shared_bytes
from cute_attn.default_tiles import warp_tile, warpgroup_tile
from cute_attn.problem import Problem
from cute_attn.recipe import RECIPES, Recipe, as_recipe
from cute_attn.tile_config import AnyTileConfig, TileConfig, WarpgroupTileConfig

if TYPE_CHECKING:
    from cute_attn.kernels.tile_image import TileImage

__all__ = ["Support", "default_config", "image_layout", "quantizer_refusal", "refusal", "supports"]


@dataclass(frozen=True)
class Support:
    """Answer of `supports`: true if there is a kernel; otherwise ``reason`` says why not and what to use instead."""

    reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class _Family:
    """Kernels that share a main loop, and the formats and chips they serve.

    tile: the class of their tile configs
    only: fields of a recipe of which not every value is served, and the values that are
    """

    tile: type[AnyTileConfig]
    qk_format: str
    pv_format: str
    archs: tuple[str, ...]
    head_dims: range = range(16, 257, 8)
    only: tuple[tuple[str, tuple[object, ...]], ...] = ()

    def has_formats(self, recipe: Recipe) -> bool:
        return (self.qk_format, self.pv_format) == (recipe.qk_format, recipe.pv_format)

    def lacks(self, recipe: Recipe) -> list[str]:
        """Fields of a recipe in these formats whose values are not served, as "field=value"."""
        return [f"{field}={getattr(recipe, field)!r}" for field, v in self.only if getattr(recipe, field) not in v]

    def serves(self, recipe: Recipe) -> bool:
        return self.has_formats(recipe) and not self.lacks(recipe)


# Warp-level mma.sync m16n8k32 with s8 and u8 operands exists on all of these; sm_100a has it only as an emulation.
_WARP_MMA = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120a")

# m16n8k64 with s4 operands: Hopper and later have no such instruction.
_INT4_MMA = ("sm_80", "sm_86", "sm_89")

# mma.sync with E4M3 operands: on sm_90a ptxas makes conversions and float16 MMAs of it.
_E4M3_MMA = ("sm_89", "sm_120a")

# Warpgroup MMAs exist on Hopper alone. There, nothing adds what smoothing Q takes off the scores, and sums are float32.
_WGMMA = ("sm_90a",)
_NO_DELTA = ("smooth_q", (False,))
_NO_LINE = ("exponent", ("exact",))


def _accumulates_in(accumulator: str) -> tuple[str, tuple[object, ...]]:
    return "accumulate", (accumulator,)


_FAMILIES = (
    _Family(WarpgroupTileConfig, "int8", "e4m3", _WGMMA, only=(_NO_DELTA, _accumulates_in("float32+float32"))),
    _Family(WarpgroupTileConfig, "e4m3", "e4m3", _WGMMA, only=(_NO_DELTA, _accumulates_in("float32+float32"))),
    _Family(WarpgroupTileConfig, "int8", "int8", _WGMMA, only=(_NO_DELTA,)),
    _Family(WarpgroupTileConfig, "int8", "float16", _WGMMA, only=(_NO_DELTA, _accumulates_in("float32"))),
    _Family(WarpgroupTileConfig, "float16", "float16", _WGMMA),
    _Family(WarpgroupTileConfig, "bfloat16", "bfloat16", _WGMMA),
    _Family(TileConfig, "int8", "int8", _WARP_MMA),
    _Family(TileConfig, "int8", "float16", _WARP_MMA),
    _Family(TileConfig, "int8", "e4m3", _E4M3_MMA, only=(_NO_LINE,)),
    _Family(TileConfig, "e4m3", "e4m3", _E4M3_MMA, only=(_NO_LINE,)),
    _Family(TileConfig, "int4", "int8", _INT4_MMA),
    _Family(TileConfig, "int4", "float16", _INT4_MMA),
    _Family(TileConfig, "float16", "float16", _WARP_MMA),
    _Family(TileConfig, "bfloat16", "bfloat16", _WARP_MMA),
)
"""Where two serve the same formats on the same chip, the first one does unless a tile config asks for the other."""


_LARGEST_GRID = 65535
"""Most CTAs along y or z of a launch (CUDA C++ Programming Guide, technical specifications)."""


@functools.lru_cache(maxsize=1024)  # asked for again by every call of `attention`
def refusal(recipe: Recipe, arch: Arch, problem: Problem, config: AnyTileConfig | None = None) -> str | None:
    """None if a kernel serves this call, else the reason, with what to use instead."""
    families = _families(recipe, arch)
    if not families:
        archs = (name for name in ARCHS if any(f.serves(recipe) and name in f.archs for f in _FAMILIES))
        lacking = [
            what for f in _FAMILIES if f.has_formats(recipe) and arch.name in f.archs for what in f.lacks(recipe)
        ]
        given = f" with {', '.join(dict.fromkeys(lacking))}" if lacking else ""
        where = f"{arch.name} ({arch.gpus})"
        return f"recipe {recipe.name!r}{given} has no kernel for {where}; it runs on {', '.join(archs)}"
    family = next((f for f in families if config is None or type(config) is f.tile), None)
    if family is None:
        offered = " or ".join(f.tile.__name__ for f in families)
        return f"{config} is not for the kernels of recipe {recipe.name!r} on {arch.name}; use a {offered}, or None"
    if problem.dtype not in recipe.dtypes:
        others = (r.name for r in RECIPES.values() if problem.dtype in r.dtypes and not r.quantises)
        return (
            f"recipe {recipe.name!r} takes {recipe.dtypes[0]} tensors, these are {problem.dtype}; "
            f"use recipe {next(others)!r}, or convert them"
        )
    if problem.head_dim not in family.head_dims:
        dims = family.head_dims
        fits = [d for d in dims if d > problem.head_dim]
        instead = (
            f"pad Q, K and V with zeros to {fits[0]} and pass softmax_scale={problem.head_dim}**-0.5"
            if fits
            else "use torch.nn.functional.scaled_dot_product_attention"
        )
        return (
            f"head_dim={problem.head_dim} has no kernel in recipe {recipe.name!r} "
            f"(there are multiples of {dims.step} from {dims[0]} to {dims[-1]}); {instead}"
        )
    tile = config or default_config(recipe, problem, arch)
    largest = {"batch": _LARGEST_GRID, "heads": _LARGEST_GRID}
    if isinstance(tile, TileConfig):  # the others' blocks of rows lie along x
        largest["seq_q"] = _LARGEST_GRID * tile.rows
    for name, most in largest.items():
        if (value := getattr(problem, name)) > most:
            return f"{name}={value} has no kernel, a CUDA grid reaches {most}; split the call along that axis"
    return _kernel_refusal(recipe, problem.head_dim, problem.dtype, problem.causal, tile, arch)


@functools.lru_cache(maxsize=1024)
def _families(recipe: Recipe, arch: Arch) -> tuple[_Family, ...]:
    return tuple(f for f in _FAMILIES if f.serves(recipe) and arch.name in f.archs)


def supports(recipe: str | Recipe, arch: str, problem: Problem, config: AnyTileConfig | None = None) -> Support:
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
def default_config(recipe: Recipe, problem: Problem, arch: Arch) -> AnyTileConfig:
    """The tile config for a problem nobody has tuned."""
    kinds = [family.tile for family in _families(recipe, arch)]
    choose = warpgroup_tile if kinds and kinds[0] is WarpgroupTileConfig else warp_tile
    return choose(recipe, problem, arch)


@functools.lru_cache(maxsize=1024)
def image_layout(recipe: Recipe, head_dim: int, arch: Arch, config: AnyTileConfig | None = None) -> TileImage:
    """The tile images that the kernels of ``recipe`` on ``arch`` read, or those of the tile config ``config``."""
    from cute_attn.kernels.tile_image import TileImage

    tile = config or _families(recipe, arch)[0].tile
    return TileImage(head_dim, recipe.pv_format, recipe.qk_format, tile.tile_tokens, tile.sum_rows)


@functools.lru_cache(maxsize=256)
def _kernel_refusal(
    recipe: Recipe, head_dim: int, dtype: str, causal: bool, tile: AnyTileConfig, arch: Arch
) -> str | None:
    """What the kernel class itself, or the chip's shared memory, has against this tile config."""
    kernel_class, kernel_config = attention_kernel(recipe, head_dim, dtype, causal, tile, has_lse=True)
    if reason := kernel_class.can_implement(kernel_config):
        return f"{tile}: {reason}"
    needed = shared_bytes(recipe, head_dim, tile)
    if needed > arch.shared_bytes:
        return (
            f"{tile} needs {needed} bytes of shared memory per CTA, {arch.name} has {arch.shared_bytes}; "
            "use fewer stages or warps"
        )
    return None
