"""From checked tensors to kernels: allocate results, find the loaded kernel, call it on the caller's stream."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from cute_attn import jit, tensors
from cute_attn.arch import Arch
from cute_attn.dispatch import attention_config, default_config
from cute_attn.problem import Problem
from cute_attn.recipe import Recipe
from cute_attn.tile_config import TileConfig

__all__ = ["attention_forward", "kernels_of", "key_value_tiles", "quantizer_kernels", "query_rows"]


def quantizer_kernels(recipe: Recipe, head_dim: int, dtype: str, align: int) -> dict[str, tuple[type, Any]]:
    """Kernel class and configuration of every quantiser, in the order of their launches.

    align: bytes by which rows of Q, K and V are aligned
    """
    from cute_attn.kernels.quantize_key_value import KeyValueTiles, TilesConfig
    from cute_attn.kernels.quantize_query import QueryConfig, QueryRows
    from cute_attn.kernels.quantize_statistics import (
        FinishConfig,
        FinishStatistics,
        KeyValueStatistics,
        StatisticsConfig,
    )
    from cute_attn.kernels.rows import QuantizerConfig

    rows = QuantizerConfig(head_dim, dtype, align)
    return {
        "key_value_statistics": (KeyValueStatistics, StatisticsConfig(rows)),
        "finish_statistics": (FinishStatistics, FinishConfig(head_dim, recipe.v_scale, recipe.pv_format)),
        "key_value_tiles": (KeyValueTiles, TilesConfig(rows, recipe.pv_format)),
        "query_rows": (QueryRows, QueryConfig(rows)),
    }


def kernels_of(problem: Problem, recipe: Recipe, arch: Arch) -> dict[str, tuple[type, Any]]:
    """Kernel class and configuration of everything that one `attention` call launches, for 16-byte aligned tensors."""
    from cute_attn.kernels.attention_sm80 import AttentionSm80

    tile = default_config(recipe, problem, arch)
    config = attention_config(
        recipe, problem.head_dim, problem.dtype, problem.causal, tile, has_lse=False, out_align=16
    )
    quantizers = quantizer_kernels(recipe, problem.head_dim, problem.dtype, 16) if recipe.quantises else {}
    return {**quantizers, "attention": (AttentionSm80, config)}


@functools.lru_cache(maxsize=256)
def _key_value_kernels(
    recipe: Recipe, head_dim: int, dtype: torch.dtype, align: int, arch: str, backend: str
) -> tuple[Callable[..., Any], ...]:
    kernels = quantizer_kernels(recipe, head_dim, tensors.DTYPE_NAMES[dtype], align)
    names = ("key_value_statistics", "finish_statistics", "key_value_tiles")
    return tuple(jit.load(*kernels[name], arch, backend) for name in names)


def key_value_tiles(
    k: torch.Tensor, v: torch.Tensor, recipe: Recipe, arch: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """image, v_scale and k_mean of K and V [B, Hkv, Sk, D], as `QuantizedKeyValue` describes them."""
    from cute_attn.kernels.quantize_statistics import CHUNK_TOKENS, partial_rows
    from cute_attn.kernels.tile_image import TILE_TOKENS, TileImage

    batch, heads, seq_k, head_dim = k.shape
    align = min(tensors.alignment(k), tensors.alignment(v))
    statistics, finish, tiles = _key_value_kernels(recipe, head_dim, k.dtype, align, arch, jit.backend())
    device, chunks, tile_count = k.device, -(-seq_k // CHUNK_TOKENS), -(-seq_k // TILE_TOKENS)
    # One allocation per result: slicing a common one would take longer than the caching allocator does.
    partial = torch.empty(
        (batch, heads, chunks, partial_rows(smooth_v=False), head_dim), dtype=torch.float32, device=device
    )
    k_mean, v_scale = (torch.empty((batch, heads, head_dim), dtype=torch.float32, device=device) for _ in range(2))
    nbytes = TileImage(head_dim, recipe.pv_format).nbytes
    image = torch.empty((batch, heads, tile_count, nbytes), dtype=torch.uint8, device=device)
    statistics(k, v, partial, None)
    finish(partial, k_mean, v_scale, None, seq_k, None)
    tiles(k, v, k_mean, v_scale, None, image, None)
    return image, v_scale, k_mean


@functools.lru_cache(maxsize=256)
def _query_kernel(
    recipe: Recipe, head_dim: int, dtype: torch.dtype, align: int, arch: str, backend: str
) -> Callable[..., Any]:
    kernels = quantizer_kernels(recipe, head_dim, tensors.DTYPE_NAMES[dtype], align)
    return jit.load(*kernels["query_rows"], arch, backend)


def query_rows(
    q: torch.Tensor, k_mean: torch.Tensor, recipe: Recipe, arch: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """data, scale and bias of Q [B, Hq, Sq, D], as `QuantizedQuery` describes them."""
    kernel = _query_kernel(recipe, q.shape[3], q.dtype, tensors.alignment(q), arch, jit.backend())
    data = torch.empty(q.shape, dtype=torch.int8, device=q.device)
    scale, bias = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    if data.numel():
        kernel(q, k_mean, data, scale, bias, None)
    return data, scale, bias


@functools.lru_cache(maxsize=256)
def _attention_kernel(
    recipe: Recipe,
    head_dim: int,
    dtype: torch.dtype,
    causal: bool,
    has_lse: bool,
    align: int,
    tile: TileConfig,
    arch: str,
    backend: str,
) -> Callable[..., Any]:
    from cute_attn.kernels.attention_sm80 import AttentionSm80

    name = tensors.DTYPE_NAMES[dtype]
    config = attention_config(recipe, head_dim, name, causal, tile, has_lse=has_lse, out_align=align)
    return jit.load(AttentionSm80, config, arch, backend)


def attention_forward(
    query: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    key_value: tuple[torch.Tensor, torch.Tensor],
    recipe: Recipe,
    problem: Problem,
    tile: TileConfig,
    arch: str,
    softmax_scale_log2: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Fills ``out`` [B, Hq, Sq, D] and, if given, ``lse`` float32 [B, Hq, Sq].

    query: data, scale, bias; key_value: image, v_scale; softmax_scale_log2: softmax_scale · log2(e). With a recipe that
    quantises nothing: q, None, None; and k, v as [B, Hkv, Sk, D]; copied where rows are not aligned to 16 bytes.
    """
    kernel = _attention_kernel(
        recipe,
        problem.head_dim,
        out.dtype,
        problem.causal,
        lse is not None,
        tensors.alignment(out),
        tile,
        arch,
        jit.backend(),
    )
    if not recipe.quantises:
        query, key_value = (_aligned(query[0]), None, None), (_aligned(key_value[0]), _aligned(key_value[1]))
    kernel(*query, *key_value, out, lse, problem.seq_k, softmax_scale_log2)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy whose rows are aligned to 16 bytes, which cp.async needs."""
    return x if tensors.alignment(x) == 16 else x.clone(memory_format=torch.contiguous_format)
