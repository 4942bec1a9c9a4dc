"""From checked tensors to kernels: allocate results, find the loaded kernel, call it on the caller's stream."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cute_attn import jit, tensors
from cute_attn.arch import Arch
from cute_attn.attention_kernels import attention_kernel
from cute_attn.dispatch import default_config, image_layout
from cute_attn.problem import Problem
from cute_attn.recipe import Recipe
from cute_attn.tile_config import AnyTileConfig, WarpgroupTileConfig
from cute_attn.work_sharing import multiprocessors, tickets

if TYPE_CHECKING:
    from cute_attn.kernels.tile_image import TileImage

__all__ = [
    "KeyValueOperands",
    "QueryOperands",
    "attention_forward",
    "delta_scores",
    "kernels_of",
    "key_value_tiles",
    "quantizer_kernels",
    "query_rows",
]


def quantizer_kernels(
    recipe: Recipe, layout: TileImage, dtype: str, align: int, *, varlen_k: bool = False
) -> dict[str, tuple[type, Any]]:
    """Kernel class and configuration of every quantiser, in the order of their launches.

    layout: of the tile images; align: bytes by which rows of Q, K and V are aligned; varlen_k: whether batch elements
    have key lengths of their own
    """
    from cute_attn.kernels.delta_scores import DeltaConfig, DeltaScores
    from cute_attn.kernels.quantize_key_value import KeyValueTiles, TilesConfig
    from cute_attn.kernels.quantize_query import QueryConfig, QueryRows
    from cute_attn.kernels.quantize_statistics import (
        FinishConfig,
        FinishStatistics,
        KeyValueStatistics,
        StatisticsConfig,
    )
    from cute_attn.kernels.rows import QuantizerConfig

    rows = QuantizerConfig(layout.head_dim, dtype, align)
    smooth_v = {"smooth_v": recipe.smooth_v, "varlen": varlen_k}
    image = {name: getattr(layout, name) for name in ("values", "keys", "tokens", "sum_rows")}
    kernels: dict[str, tuple[type, Any]] = {
        "key_value_statistics": (KeyValueStatistics, StatisticsConfig(rows, **smooth_v)),
        "finish_statistics": (
            FinishStatistics,
            FinishConfig(
                layout.head_dim, recipe.v_scale, recipe.pv_format, **smooth_v, largest_value=recipe.largest_value
            ),
        ),
        "key_value_tiles": (KeyValueTiles, TilesConfig(rows, **image, k_scale=recipe.qk_scale, **smooth_v)),
        "query_rows": (QueryRows, QueryConfig(rows, recipe.qk_format, recipe.qk_scale, smooth_q=recipe.smooth_q)),
    }
    if recipe.smooth_q:
        kernels["delta_scores"] = (DeltaScores, DeltaConfig(rows, varlen_k))
    return kernels


def kernels_of(
    problem: Problem, recipe: Recipe, arch: Arch, tile: AnyTileConfig | None = None
) -> dict[str, tuple[type, Any]]:
    """Kernel class and configuration of everything that one `attention` call launches, for 16-byte aligned tensors."""
    tile = tile or default_config(recipe, problem, arch)
    attention = attention_kernel(recipe, problem.head_dim, problem.dtype, problem.causal, tile)
    quantizers = {}
    if recipe.quantises:
        layout = image_layout(recipe, problem.head_dim, arch, tile)
        quantizers = quantizer_kernels(recipe, layout, problem.dtype, 16)
    return {**quantizers, "attention": attention}


@functools.lru_cache(maxsize=256)
def _quantizers(
    names: tuple[str, ...],
    recipe: Recipe,
    layout: TileImage,
    dtype: torch.dtype,
    align: int,
    varlen_k: bool,
    arch: str,
    backend: str,
) -> tuple[Callable[..., Any], ...]:
    """The loaded quantisers of those names."""
    kernels = quantizer_kernels(recipe, layout, tensors.DTYPE_NAMES[dtype], align, varlen_k=varlen_k)
    return tuple(jit.load(*kernels[name], arch, backend) for name in names)


def key_value_tiles(
    k: torch.Tensor,
    v: torch.Tensor,
    recipe: Recipe,
    layout: TileImage,
    arch: str,
    key_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """image, v_scale, k_mean and v_mean of K and V [B, Hkv, Sk, D], as `QuantizedKeyValue` describes them."""
    from cute_attn.kernels.quantize_statistics import CHUNK_TOKENS, partial_rows

    batch, heads, seq_k, head_dim = k.shape
    align = min(tensors.alignment(k), tensors.alignment(v))
    names = ("key_value_statistics", "finish_statistics", "key_value_tiles")
    varlen_k = key_lengths is not None
    statistics, finish, tiles = _quantizers(names, recipe, layout, k.dtype, align, varlen_k, arch, jit.backend())
    chunks, tile_count = -(-seq_k // CHUNK_TOKENS), -(-seq_k // layout.tokens)
    rows = partial_rows(recipe.smooth_v)

    # One allocation per result: slicing a common one would take longer than the caching allocator does.
    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=k.device)

    partial = floats(batch, heads, chunks, rows, head_dim)
    k_mean, v_scale = floats(batch, heads, head_dim), floats(batch, heads, head_dim)
    v_mean = floats(batch, heads, head_dim) if recipe.smooth_v else None
    image = torch.empty((batch, heads, tile_count, layout.nbytes), dtype=torch.uint8, device=k.device)
    statistics(k, v, partial, key_lengths)
    finish(partial, k_mean, v_scale, v_mean, seq_k, key_lengths)
    tiles(k, v, k_mean, v_scale, v_mean, image, key_lengths)
    return image, v_scale, k_mean, v_mean


def query_rows(
    q: torch.Tensor, k_mean: torch.Tensor, recipe: Recipe, layout: TileImage, arch: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """data, scale, bias and q_mean of Q [B, Hq, Sq, D], as `QuantizedQuery` describes them."""
    from cute_attn.kernels.quantize_query import BLOCK_TOKENS

    batch, heads, seq_q, head_dim = q.shape
    align = tensors.alignment(q)
    (kernel,) = _quantizers(("query_rows",), recipe, layout, q.dtype, align, False, arch, jit.backend())
    data = torch.empty((batch, heads, seq_q, layout.key_bytes), dtype=torch.int8, device=q.device)
    scale, bias = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    q_mean = None
    if recipe.smooth_q:
        q_mean = torch.empty((batch, heads, -(-seq_q // BLOCK_TOKENS), head_dim), dtype=q.dtype, device=q.device)
    if data.numel():
        kernel(q, k_mean, data, scale, bias, q_mean)
    return data, scale, bias, q_mean


def delta_scores(
    q_mean: torch.Tensor,
    k: torch.Tensor,
    k_mean: torch.Tensor,
    recipe: Recipe,
    layout: TileImage,
    arch: str,
    key_lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """delta of q_mean and K [B, Hkv, Sk, D], as `QuantizedQuery` describes it."""
    shape = (*q_mean.shape[:3], -(-k.shape[2] // layout.tokens) * layout.tokens)
    delta = torch.empty(shape, dtype=torch.float32, device=k.device)
    varlen_k, align = key_lengths is not None, tensors.alignment(k)
    (kernel,) = _quantizers(("delta_scores",), recipe, layout, k.dtype, align, varlen_k, arch, jit.backend())
    if delta.numel():
        kernel(q_mean, k, k_mean, key_lengths, delta)
    return delta


@dataclass(frozen=True)
class QueryOperands:
    """What the attention kernel reads of Q: `QuantizedQuery`'s tensors, or q [B, Hq, Sq, D] alone if unquantised."""

    data: torch.Tensor
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    delta: torch.Tensor | None = None


@dataclass(frozen=True)
class KeyValueOperands:
    """What it reads of K and V: `QuantizedKeyValue`'s image, v_scale and v_mean, or k and v [B, Hkv, Sk, D]."""

    keys: torch.Tensor
    values: torch.Tensor
    v_mean: torch.Tensor | None = None


@functools.lru_cache(maxsize=256)
def _attention_kernel(
    recipe: Recipe,
    head_dim: int,
    dtype: torch.dtype,
    causal: bool,
    has_lse: bool,
    varlen_k: bool,
    align: int,
    tile: AnyTileConfig,
    arch: str,
    backend: str,
) -> Callable[..., Any]:
    name = tensors.DTYPE_NAMES[dtype]
    options: dict[str, Any] = {"has_lse": has_lse, "varlen_k": varlen_k, "out_align": align}
    kernel_class, config = attention_kernel(recipe, head_dim, name, causal, tile, **options)
    kernel = jit.load(kernel_class, config, arch, backend)
    return _persistent(kernel, kernel_class(config).draws) if isinstance(tile, WarpgroupTileConfig) else kernel


def _persistent(kernel: Callable[..., Any], draws: bool) -> Callable[..., Any]:
    """``kernel`` with the counter, if it draws its blocks, and the number of CTAs that persistent kernels take last."""

    def run(q: torch.Tensor, *others: Any) -> None:
        kernel(q, *others, tickets(q.device) if draws else None, multiprocessors(q.device))

    return run


def attention_forward(
    query: QueryOperands,
    key_value: KeyValueOperands,
    key_lengths: torch.Tensor | None,
    recipe: Recipe,
    problem: Problem,
    tile: AnyTileConfig,
    arch: str,
    softmax_scale_log2: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Fills ``out`` [B, Hq, Sq, D] and, if given, ``lse`` float32 [B, Hq, Sq].

    key_lengths: int32 [B] or None; softmax_scale_log2: softmax_scale · log2(e). Unquantised q, k and v are copied where
    rows are not aligned to 16 bytes, or where they may share memory with ``out``.
    """
    kernel = _attention_kernel(
        recipe,
        problem.head_dim,
        out.dtype,
        problem.causal,
        lse is not None,
        key_lengths is not None,
        tensors.alignment(out),
        tile,
        arch,
        jit.backend(),
    )
    q, keys, values = query.data, key_value.keys, key_value.values
    if not recipe.quantises:
        in_place = q.data_ptr() == out.data_ptr() and q.stride() == out.stride()  # a CTA's rows are read before written
        q = _aligned(q if in_place else _apart(q, out))
        keys, values = _aligned(_apart(keys, out)), _aligned(_apart(values, out))
    kernel(
        q,
        query.scale,
        query.bias,
        keys,
        values,
        query.delta,
        key_value.v_mean,
        key_lengths,
        out,
        lse,
        problem.seq_k,
        softmax_scale_log2,
    )


def _apart(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy if it may share memory with ``out``, which one CTA writes while another still reads ``x``."""
    return x.clone(memory_format=torch.contiguous_format) if tensors.may_overlap(x, out) else x


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy whose rows are aligned to 16 bytes, which cp.async needs.

    Of a single token, too: the address of the next one is computed, though nothing is read there.
    """
    step = x.stride(2) * x.element_size()
    return x if tensors.alignment(x) == 16 and step % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
