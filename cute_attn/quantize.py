"""`quantize`: Q, K and V as typed quantised tensors that `attention` takes, for caches and repeated use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cute_attn import kernel_calls
from cute_attn.arch import Arch
from cute_attn.arguments import check_input, check_key_lengths, check_key_value, refused, resolve_arch, same_device
from cute_attn.dispatch import image_layout, quantizer_refusal
from cute_attn.quantized import Quantized, QuantizedKeyValue, QuantizedQuery
from cute_attn.recipe import Recipe, as_recipe

if TYPE_CHECKING:
    from cute_attn.kernels.tile_image import TileImage

__all__ = ["quantize", "quantize_key_value", "quantize_query"]


def quantize(
    q: Any,
    k: Any,
    v: Any,
    *,
    recipe: str | Recipe = "int8",
    layout: str = "bhsd",
    key_lengths: Any = None,
    arch: str | None = None,
) -> Quantized:
    """Quantise Q, K and V once, to use them several times.

    q:           [B, Hq, Sq, D]; k, v: [B, Hkv, Sk, D] ("bhsd"), or [B, S, H, D] ("bshd"); float16 or bfloat16, any
                 strides with a contiguous head dim; torch tensors, or arrays with ``__dlpack__``
    recipe:      preset name or `Recipe`
    layout:      "bhsd" or "bshd"
    key_lengths: int32 [B]: tokens of K and V that count in each batch element (means and scales are over those); as in
                 `attention`
    arch:        GPU target; None is the device's own. sm_90a reads tiles of another size than the others

    Raises what `attention` raises for the same arguments.
    """
    recipe = as_recipe(recipe)
    kv = quantize_key_value(k, v, recipe=recipe, layout=layout, key_lengths=key_lengths, arch=arch)
    return Quantized(quantize_query(q, kv, k if recipe.smooth_q else None, layout=layout, arch=arch), kv)


def quantize_key_value(
    k: Any,
    v: Any,
    *,
    recipe: str | Recipe = "int8",
    layout: str = "bhsd",
    key_lengths: Any = None,
    arch: str | None = None,
) -> QuantizedKeyValue:
    """K and V as tile images. Arguments and errors as in `quantize`; at least one token is needed.

    The result keeps a copy of ``key_lengths``: tokens that were not quantised must not be seen when the caller's grow.
    """
    recipe = as_recipe(recipe)
    k, v = check_key_value(k, v, layout)
    if k.dtype != v.dtype:
        raise TypeError(f"k is {k.dtype} and v is {v.dtype}; convert one of them")
    lengths = check_key_lengths(key_lengths, k.shape[0])
    same_device(k=k, v=v, key_lengths=lengths)
    if 0 in k.shape:
        raise ValueError(f"k has shape {tuple(k.shape)} as [B, H, S, D]; there is nothing to quantise")
    target = resolve_arch(arch, k)
    if reason := quantizer_refusal(recipe, target, k.shape):
        raise refused(reason, arch, k)
    layout = image_layout(recipe, k.shape[3], target)
    return checked_key_value(k, v, recipe, layout, target, None if lengths is None else lengths.clone())


def checked_key_value(
    k: torch.Tensor,
    v: torch.Tensor,
    recipe: Recipe,
    layout: TileImage,
    arch: Arch,
    key_lengths: torch.Tensor | None,
) -> QuantizedKeyValue:
    """`quantize_key_value` of arguments that are known to be right, [B, Hkv, Sk, D], to tile images of ``layout``."""
    image, v_scale, k_mean, v_mean = kernel_calls.key_value_tiles(k, v, recipe, layout, arch.name, key_lengths)
    return QuantizedKeyValue(image, v_scale, k_mean, k.shape[2], k.dtype, recipe, layout, v_mean, key_lengths)


def quantize_query(
    q: Any, kv: QuantizedKeyValue, k: Any = None, *, layout: str = "bhsd", arch: str | None = None
) -> QuantizedQuery:
    """Q for the keys and values in ``kv``, whose mean of K decides the LSE's correction.

    k: the keys that ``kv`` was quantised from, if its recipe smooths Q: what that takes off the scores is computed from
       them. Other recipes need none and refuse it

    Other arguments and errors as in `quantize`.
    """
    if not isinstance(kv, QuantizedKeyValue):
        raise TypeError(f"kv must be a QuantizedKeyValue (from quantize_key_value), got {type(kv).__name__}")
    q = check_input(q, "q", layout)
    keys = _smoothed_keys(k, kv, layout)
    same_device(q=q, kv=kv.image, k=keys)
    if (q.shape[0], q.shape[3]) != (kv.shape[0], kv.head_dim) or not q.shape[1] or q.shape[1] % kv.shape[1]:
        raise ValueError(
            f"q has shape {tuple(q.shape)} as [B, H, S, D], but kv holds batch {kv.shape[0]}, "
            f"{kv.shape[1]} heads, head_dim {kv.head_dim}; batch and head_dim must be equal, and the query heads "
            "a multiple of the key/value heads"
        )
    if q.dtype != kv.dtype:
        raise TypeError(f"q is {q.dtype} and kv was quantised from {kv.dtype}; convert one of them")
    target = resolve_arch(arch, q)
    if reason := quantizer_refusal(kv.recipe, target, q.shape):
        raise refused(reason, arch, q)
    return checked_query(q, kv, keys, target)


def _smoothed_keys(k: Any, kv: QuantizedKeyValue, layout: str) -> torch.Tensor | None:
    """``k`` as [B, Hkv, Sk, D] if kv's recipe needs it, None if not; raises where it is missing, wrong, or too much."""
    if not kv.recipe.smooth_q:
        if k is not None:
            raise TypeError(f"k was given, but recipe {kv.recipe.name!r} does not smooth Q; leave it out")
        return None
    if k is None:
        raise TypeError(f"k is missing: recipe {kv.recipe.name!r} smooths Q; pass the k that kv was quantised from")
    keys = check_input(k, "k", layout)
    if tuple(keys.shape) != kv.shape or keys.dtype != kv.dtype:
        raise ValueError(
            f"k is {keys.dtype} of shape {tuple(keys.shape)} as [B, H, S, D], kv was quantised from {kv.dtype} of "
            f"shape {kv.shape}; pass the k that kv was quantised from"
        )
    return keys


def checked_query(q: torch.Tensor, kv: QuantizedKeyValue, k: torch.Tensor | None, arch: Arch) -> QuantizedQuery:
    """`quantize_query` of arguments that are known to be right, q as [B, Hq, Sq, D], k as the recipe needs it."""
    data, scale, bias, q_mean = kernel_calls.query_rows(q, kv.k_mean, kv.recipe, kv.tile, arch.name)
    delta = None
    if q_mean is not None:
        assert k is not None
        delta = kernel_calls.delta_scores(q_mean, k, kv.k_mean, kv.recipe, kv.tile, arch.name, kv.key_lengths)
    return QuantizedQuery(data, scale, bias, kv.k_mean, q.shape[3], q.dtype, kv.recipe, q_mean, delta)
