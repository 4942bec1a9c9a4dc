"""`attention`: the call that takes the place of ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch

from cute_attn import dispatch, kernel_calls, tensors
from cute_attn.arch import Arch
from cute_attn.arguments import (
    check_flag,
    check_input,
    check_key_lengths,
    check_key_value,
    check_layout,
    check_out,
    refused,
    resolve_arch,
    same_device,
)
from cute_attn.kernel_calls import KeyValueOperands, QueryOperands
from cute_attn.problem import Problem
from cute_attn.quantize import checked_key_value, checked_query
from cute_attn.quantized import QuantizedKeyValue, QuantizedQuery
from cute_attn.recipe import Recipe, as_recipe
from cute_attn.tile_config import AnyTileConfig, TileConfig, WarpgroupTileConfig

__all__ = ["attention"]

DEFAULT_RECIPE = "int8"
_LOG2_E = math.log2(math.e)
_LARGEST_SCALE = torch.finfo(torch.float32).max / _LOG2_E


def attention(
    q: Any,
    k: Any,
    v: Any = None,
    *,
    recipe: str | Recipe | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    layout: str = "bhsd",
    return_lse: bool = False,
    key_lengths: Any = None,
    out: torch.Tensor | None = None,
    arch: str | None = None,
    config: AnyTileConfig | None = None,
) -> Any:
    """softmax(softmax_scale · Q·Kᵀ) · V, computed in low precision.

    q:             [B, Hq, Sq, D] float16 or bfloat16, or a `QuantizedQuery`
    k, v:          [B, Hkv, Sk, D], same dtype; Hq a multiple of Hkv (grouped-query attention). Or k a
                   `QuantizedKeyValue`, and v left out. Any strides with a contiguous head dim; torch tensors, or arrays
                   with ``__dlpack__`` (NumPy, CuPy, JAX), in which case the results are arrays of the same kind
    recipe:        preset name (see `recipes`) or `Recipe`; None is the recipe of the quantised inputs, or "int8"
    causal:        query i sees the keys j ≤ i + Sk − Sq (aligned bottom-right)
    softmax_scale: ≥ 0; None is D**-0.5
    layout:        "bhsd", or "bshd" for q, k, v and out as [B, S, H, D]
    return_lse:    also return the log-sum-exp of the scaled scores: float32 [B, Hq, Sq] in either layout, natural log
    key_lengths:   int32 [B]: how many tokens of k and v count in each batch element; it takes the place of Sk under
                   ``causal``. Clamped to 0…Sk without being looked at, which would mean to wait for the GPU. None: all;
                   a `QuantizedKeyValue` brings its own
    out:           tensor to fill and return, of q's shape, dtype and device; any strides with a contiguous head dim
    arch:          GPU target to compile for; None is the device's own (the emulator's: sm_80)
    config:        `TileConfig`, or on sm_90a also `WarpgroupTileConfig`; None is chosen from the problem's shape

    Returns the output, of q's shape and dtype, or (output, lse). A row that sees no key is 0, its LSE −inf. An inf or
    NaN in a row of Q makes that row NaN; one in K makes NaN of its KV head's outputs; one in V of its channel, or of
    all channels if they share a scale. Without quantisation those of K and V go where float arithmetic takes them.
    Recipe `int8` takes scores up to 2^22 in base 2; far beyond, rows are NaN.
    Runs on the current CUDA stream of q's device without synchronising it, and can be captured in a CUDA graph.

    Raises TypeError (not an array, wrong or mixed dtype), ValueError (shapes, strides, devices, unknown names),
    NotImplementedError (a combination without a kernel; the message says what to use), RuntimeError (an input requires
    grad: there is no backward).
    """
    check_layout(layout)
    check_flag(causal, "causal")
    check_flag(return_lse, "return_lse")
    chosen = _recipe(recipe, q, k)
    queries = q if isinstance(q, QuantizedQuery) else check_input(q, "q", layout)
    keys, values = _key_value(k, v, layout)
    problem = _problem(queries, keys, values, causal)
    scale = _softmax_scale(softmax_scale, problem.head_dim)
    lengths = _key_lengths(key_lengths, keys, problem.batch)
    _same_device(queries, keys, values, lengths, out)
    target, tile = _kernel(chosen, problem, config, arch, queries, keys)

    result, view, lse = _results(out, queries, problem, layout, return_lse)
    if problem.seq_k == 0:
        _fill_without_keys(view, lse)
    elif view.numel():
        kernel_calls.attention_forward(
            *_operands(queries, keys, values, lengths, chosen, target, tile),
            lengths,
            chosen,
            problem,
            tile,
            target.name,
            scale * _LOG2_E,
            view,
            lse,
        )
    if out is None:
        result = tensors.like(q, result)
    else:
        # Autograd must see that the kernel wrote to a tensor it may have saved.
        torch.autograd.graph.increment_version(out)
    return result if lse is None else (result, tensors.like(q, lse))


def _recipe(recipe: str | Recipe | None, q: Any, k: Any) -> Recipe:
    """The recipe of this call; quantised inputs must agree with it."""
    chosen = None if recipe is None else as_recipe(recipe)
    for name, x in (("k", k), ("q", q)):
        if isinstance(x, (QuantizedQuery, QuantizedKeyValue)):
            if chosen is not None and not x.recipe.quantises_like(chosen):
                raise ValueError(f"{name} was quantised as {x.recipe}, this call asks for {chosen}; quantise it again")
            chosen = chosen or x.recipe
    if isinstance(q, QuantizedQuery) and not isinstance(k, QuantizedKeyValue):
        raise TypeError("q is a QuantizedQuery, whose bias belongs to quantised keys: pass the QuantizedKeyValue as k")
    if isinstance(q, QuantizedQuery) and q.k_mean is not k.k_mean:
        raise ValueError("q was quantised for other keys than k (another K mean); use quantize_query(q, k)")
    chosen = chosen or as_recipe(DEFAULT_RECIPE)
    if chosen.smooth_q and isinstance(k, QuantizedKeyValue) and not isinstance(q, QuantizedQuery):
        raise TypeError(
            f"q is not quantised but k is, and recipe {chosen.name!r} smooths Q, which needs the unquantised k; "
            "use quantize(q, k, v), or quantize_query(q, kv, k)"
        )
    return chosen


def _key_value(k: Any, v: Any, layout: str) -> tuple[torch.Tensor | QuantizedKeyValue, torch.Tensor | None]:
    if isinstance(k, QuantizedKeyValue):
        if v is not None:
            raise TypeError("k is a QuantizedKeyValue, which holds V too: leave v out")
        return k, None
    if v is None:
        raise TypeError("v is missing; it may be left out only when k is a QuantizedKeyValue")
    return check_key_value(k, v, layout)


def _key_lengths(lengths: Any, k: torch.Tensor | QuantizedKeyValue, batch: int) -> torch.Tensor | None:
    if not isinstance(k, QuantizedKeyValue):
        return check_key_lengths(lengths, batch)
    if lengths is not None:
        raise TypeError("key_lengths was given, but k is a QuantizedKeyValue, which holds its own: leave it out")
    return k.key_lengths


def _kernel(
    recipe: Recipe,
    problem: Problem,
    config: AnyTileConfig | None,
    arch: str | None,
    q: torch.Tensor | QuantizedQuery,
    k: torch.Tensor | QuantizedKeyValue,
) -> tuple[Arch, AnyTileConfig]:
    """Target and tile config of the kernel that serves this call."""
    if config is not None and not isinstance(config, (TileConfig, WarpgroupTileConfig)):
        raise TypeError(f"config must be a TileConfig or a WarpgroupTileConfig, got {type(config).__name__}")
    target = resolve_arch(arch, _memory(q))
    if reason := dispatch.refusal(recipe, target, problem, config):
        raise refused(reason, arch, _memory(q))
    tile = config or dispatch.default_config(recipe, problem, target)
    if isinstance(k, QuantizedKeyValue):
        _check_tiles(k, recipe, target, tile)
    return target, tile


def _check_tiles(kv: QuantizedKeyValue, recipe: Recipe, arch: Arch, tile: AnyTileConfig) -> None:
    """That the kernel of this call reads such tiles as ``kv`` holds."""
    layout = dispatch.image_layout(recipe, kv.head_dim, arch, tile)
    if kv.tile != layout:
        raise ValueError(
            f"k holds tiles of {kv.tile.tokens} tokens, the kernels of {arch.name} and {tile} read {layout.tokens}; "
            f"quantise it with the recipe of this call and arch={arch.name!r}, or leave config out"
        )


def _operands(
    q: torch.Tensor | QuantizedQuery,
    k: torch.Tensor | QuantizedKeyValue,
    v: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    recipe: Recipe,
    arch: Arch,
    tile: AnyTileConfig,
) -> tuple[QueryOperands, KeyValueOperands]:
    """The kernel's operands for Q and for K and V; what the recipe wants quantised and is not yet, quantised."""
    keys = k if isinstance(k, torch.Tensor) else None
    if isinstance(k, torch.Tensor):
        assert v is not None
        if not recipe.quantises:
            assert isinstance(q, torch.Tensor)
            return QueryOperands(q), KeyValueOperands(k, v)
        k = checked_key_value(k, v, recipe, dispatch.image_layout(recipe, k.shape[3], arch, tile), arch, key_lengths)
    if isinstance(q, torch.Tensor):
        q = checked_query(q, k, keys if recipe.smooth_q else None, arch)
    return QueryOperands(q.data, q.scale, q.bias, q.delta), KeyValueOperands(k.image, k.v_scale, k.v_mean)


def _problem(
    q: torch.Tensor | QuantizedQuery, k: torch.Tensor | QuantizedKeyValue, v: torch.Tensor | None, causal: bool
) -> Problem:
    shape = q.shape
    batch, kv_heads, seq_k, head_dim = k.shape
    if shape[0] != batch or shape[3] != head_dim:
        raise ValueError(
            f"q has batch {shape[0]} and head_dim {shape[3]}, k has batch {batch} and head_dim {head_dim}; "
            "they must be equal"
        )
    for name, x in (("k", k), ("v", v)):
        if x is not None and x.dtype != q.dtype:
            raise TypeError(f"q is {q.dtype} and {name} is {x.dtype}; convert one of them")
    return Problem(batch, shape[1], kv_heads, shape[2], seq_k, head_dim, tensors.DTYPE_NAMES[q.dtype], causal)


def _softmax_scale(softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return head_dim**-0.5
    if not isinstance(softmax_scale, numbers.Real) or isinstance(softmax_scale, bool):
        raise TypeError(
            f"softmax_scale must be a number, got {type(softmax_scale).__name__}; "
            "use a Python float, or None for D**-0.5"
        )
    scale = float(softmax_scale)
    if not 0.0 <= scale <= _LARGEST_SCALE:
        raise ValueError(
            f"softmax_scale={softmax_scale!r}; use a finite number ≥ 0, at most {_LARGEST_SCALE:.2g} "
            "(negate q instead of a negative scale)"
        )
    return scale


def _memory(x: torch.Tensor | QuantizedQuery | QuantizedKeyValue) -> torch.Tensor:
    """A tensor that stands for ``x`` where device and shape are asked for."""
    if isinstance(x, QuantizedQuery):
        return x.data
    return x.image if isinstance(x, QuantizedKeyValue) else x


def _same_device(q: Any, k: Any, v: torch.Tensor | None, lengths: torch.Tensor | None, out: Any) -> None:
    written = out if isinstance(out, torch.Tensor) else None
    same_device(q=_memory(q), k=_memory(k), v=v, key_lengths=lengths, out=written)


def _results(
    out: torch.Tensor | None, q: torch.Tensor | QuantizedQuery, problem: Problem, layout: str, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The tensor to return, in the caller's layout, its [B, H, S, D] view, and the LSE if it is wanted; unwritten."""
    shape = (problem.batch, problem.heads, problem.seq_q, problem.head_dim)
    if out is not None:
        result, view = out, check_out(out, shape, q.dtype, layout)
    else:
        order = shape if layout == "bhsd" else (shape[0], shape[2], shape[1], shape[3])
        result = torch.empty(order, dtype=q.dtype, device=_memory(q).device)
        view = tensors.to_bhsd(result, layout)
    return result, view, torch.empty(shape[:3], dtype=torch.float32, device=view.device) if return_lse else None


def _fill_without_keys(out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """What a row that sees no key gets, for all rows."""
    out.zero_()
    if lse is not None:
        lse.fill_(-math.inf)
