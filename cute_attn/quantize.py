"""`quantize`: Q, K and V as typed quantised tensors that `attention` takes, for caches and repeated use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cute_attn import kernel_calls
from cute_attn.arch import Arch
from cute_attn.arguments import check_input, check_key_value, resolve_arch, same_device
from cute_attn.dispatch import quantizer_refusal
from cute_attn.recipe import Recipe, as_recipe

__all__ = [
    "Quantized",
    "QuantizedKeyValue",
    "QuantizedQuery",
    "quantize",
    "quantize_key_value",
    "quantize_query",
]


@dataclass(frozen=True)
class QuantizedQuery:
    """Q in INT8, one scale per token.

    data:   int8 [B, Hq, Sq, D]
    scale:  float32 [B, Hq, Sq]; Q ≈ data · scale. Not finite where the row held an inf or NaN
    bias:   float32 [B, Hq, Sq]: q · k_mean, what K's smoothing took off each row's scores before softmax_scale
    k_mean: the ``k_mean`` of the `QuantizedKeyValue` that ``bias`` was computed for
    dtype:  element type that Q had: torch.float16 or torch.bfloat16, and that the output will have
    recipe: the recipe it was quantised for
    """

    data: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    k_mean: torch.Tensor
    dtype: torch.dtype
    recipe: Recipe

    def to_plain(self) -> torch.Tensor:
        """What was kept of Q: data · scale, float32 [B, Hq, Sq, D]."""
        return self.data.float() * self.scale[..., None]


@dataclass(frozen=True)
class QuantizedKeyValue:
    """K in INT8 and V in INT8 or float16 as tile images: blocks of 64 tokens in the order in which the MMA reads them.

    image:   uint8 [B, Hkv, ceil(Sk/64), bytes]; its layout is
             ``cute_attn.kernels.tile_image.TileImage(head_dim, values)``
    v_scale: float32 [B, Hkv, D]: scale of V per channel (all equal if the recipe scales per tensor)
    k_mean:  float32 [B, Hkv, D]: K's mean over tokens, subtracted before quantisation
    seq_k:   tokens; the rest of the last tile is zeros
    dtype:   element type that K and V had
    recipe:  the recipe it was quantised for
    values:  format of V in ``image``: "int8" or "float16"

    Raises ValueError when ``image`` has not the tiles of ``seq_k`` tokens or not that layout, or when ``recipe`` reads
    another one: a kernel would read past its end.
    """

    image: torch.Tensor
    v_scale: torch.Tensor
    k_mean: torch.Tensor
    seq_k: int
    dtype: torch.dtype
    recipe: Recipe
    values: str

    def __post_init__(self) -> None:
        from cute_attn.kernels.tile_image import TILE_TOKENS, TileImage

        if self.values != self.recipe.pv_format:
            raise ValueError(
                f"image holds V in {self.values}, and recipe {self.recipe.name!r} reads it in {self.recipe.pv_format}; "
                "use quantize_key_value with the recipe of the call"
            )
        if self.image.shape[3] != (nbytes := TileImage(self.head_dim, self.values).nbytes):
            raise ValueError(
                f"image has tiles of {self.image.shape[3]} bytes; {self.head_dim} channels with V in {self.values} "
                f"take {nbytes}; use quantize_key_value"
            )
        if -(-self.seq_k // TILE_TOKENS) != self.image.shape[2]:
            raise ValueError(
                f"seq_k={self.seq_k} does not fit an image of {self.image.shape[2]} tiles of {TILE_TOKENS} tokens; "
                "use quantize_key_value"
            )

    @property
    def head_dim(self) -> int:
        return self.v_scale.shape[-1]

    def to_plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What was kept of K (its mean added back) and of V: two float32 tensors [B, Hkv, Sk, D]."""
        from cute_attn.tile_images import unpack_tile_images

        k, k_scale, v = unpack_tile_images(self.image, self.head_dim, self.seq_k, self.values)
        keys = k.float() * k_scale[..., None] + self.k_mean[:, :, None, :]
        return keys, v.float() * self.v_scale[:, :, None, :]


class Quantized(NamedTuple):
    """Result of `quantize`; ``attention(*quantize(q, k, v))`` takes it as it is."""

    q: QuantizedQuery
    kv: QuantizedKeyValue


def quantize(
    q: Any, k: Any, v: Any, *, recipe: str | Recipe = "int8", layout: str = "bhsd", arch: str | None = None
) -> Quantized:
    """Quantise Q, K and V once, to use them several times.

    q:       [B, Hq, Sq, D]; k, v: [B, Hkv, Sk, D] ("bhsd"), or [B, S, H, D] ("bshd"); float16 or bfloat16, any strides
             with a contiguous head dim; torch tensors, or arrays with ``__dlpack__``
    recipe:  preset name or `Recipe`
    layout:  "bhsd" or "bshd"
    arch:    GPU target; None is the device's own

    Raises what `attention` raises for the same arguments.
    """
    kv = quantize_key_value(k, v, recipe=recipe, layout=layout, arch=arch)
    return Quantized(quantize_query(q, kv, layout=layout, arch=arch), kv)


def quantize_key_value(
    k: Any, v: Any, *, recipe: str | Recipe = "int8", layout: str = "bhsd", arch: str | None = None
) -> QuantizedKeyValue:
    """K and V as tile images. Arguments and errors as in `quantize`; at least one token is needed."""
    recipe = as_recipe(recipe)
    k, v = check_key_value(k, v, layout)
    if k.dtype != v.dtype:
        raise TypeError(f"k is {k.dtype} and v is {v.dtype}; convert one of them")
    same_device(k=k, v=v)
    if 0 in k.shape:
        raise ValueError(f"k has shape {tuple(k.shape)} as [B, H, S, D]; there is nothing to quantise")
    target = resolve_arch(arch, k)
    if reason := quantizer_refusal(recipe, target, k.shape):
        raise NotImplementedError(reason)
    return checked_key_value(k, v, recipe, target)


def checked_key_value(k: torch.Tensor, v: torch.Tensor, recipe: Recipe, arch: Arch) -> QuantizedKeyValue:
    """`quantize_key_value` of arguments that are known to be right, [B, Hkv, Sk, D]."""
    image, v_scale, k_mean = kernel_calls.key_value_tiles(k, v, recipe, arch.name)
    return QuantizedKeyValue(image, v_scale, k_mean, k.shape[2], k.dtype, recipe, recipe.pv_format)


def quantize_query(q: Any, kv: QuantizedKeyValue, *, layout: str = "bhsd", arch: str | None = None) -> QuantizedQuery:
    """Q for the keys and values in ``kv`` (whose mean of K decides the LSE's correction). Errors as in `quantize`."""
    if not isinstance(kv, QuantizedKeyValue):
        raise TypeError(f"kv must be a QuantizedKeyValue (from quantize_key_value), got {type(kv).__name__}")
    q = check_input(q, "q", layout)
    same_device(q=q, kv=kv.image)
    if (
        (q.shape[0], q.shape[3]) != (kv.image.shape[0], kv.head_dim)
        or not q.shape[1]
        or (q.shape[1] % kv.image.shape[1])
    ):
        raise ValueError(
            f"q has shape {tuple(q.shape)} as [B, H, S, D], but kv holds batch {kv.image.shape[0]}, "
            f"{kv.image.shape[1]} heads, head_dim {kv.head_dim}; batch and head_dim must be equal, and the query heads "
            "a multiple of the key/value heads"
        )
    if q.dtype != kv.dtype:
        raise TypeError(f"q is {q.dtype} and kv was quantised from {kv.dtype}; convert one of them")
    target = resolve_arch(arch, q)
    if reason := quantizer_refusal(kv.recipe, target, q.shape):
        raise NotImplementedError(reason)
    return checked_query(q, kv, target)


def checked_query(q: torch.Tensor, kv: QuantizedKeyValue, arch: Arch) -> QuantizedQuery:
    """`quantize_query` of arguments that are known to be right, q as [B, Hq, Sq, D]."""
    data, scale, bias = kernel_calls.query_rows(q, kv.k_mean, kv.recipe, arch.name)
    return QuantizedQuery(data, scale, bias, kv.k_mean, q.dtype, kv.recipe)
