"""The typed quantised tensors that `quantize` makes and `attention` takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from cute_attn.recipe import Recipe

if TYPE_CHECKING:
    from cute_attn.kernels.tile_image import TileImage

__all__ = ["Quantized", "QuantizedKeyValue", "QuantizedQuery"]


@dataclass(frozen=True)
class QuantizedQuery:
    """Q in INT8, INT4 or E4M3, one scale per token.

    data:   int8 [B, Hq, Sq, bytes]: the head dim padded with zeros as ``TileImage.key_bytes`` says; INT4 is two
            elements a byte, the even one in the low half; E4M3 is its bytes
    scale:  float32 [B, Hq, Sq]; Q − q_mean ≈ data · scale, equal within the recipe's groups. Not finite where the row
            held an inf or NaN
    bias:   float32 [B, Hq, Sq]: q · k_mean, what K's smoothing took off each row's scores before softmax_scale
    k_mean: the ``k_mean`` of the `QuantizedKeyValue` that ``bias`` was computed for
    head_dim: D
    dtype:  element type that Q had: torch.float16 or torch.bfloat16, and that the output will have
    recipe: the recipe it was quantised for
    q_mean: [B, Hq, ceil(Sq/128), D] in ``dtype``: mean of every 128 rows; None unless the recipe smooths Q
    delta:  float32 [B, Hq, ceil(Sq/128), 64·ceil(Sk/64)]: q_mean · (k − k_mean), which smoothing Q took off the scores
            before softmax_scale; None unless the recipe smooths Q
    """

    data: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    k_mean: torch.Tensor
    head_dim: int
    dtype: torch.dtype
    recipe: Recipe
    q_mean: torch.Tensor | None = None
    delta: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, Hq, Sq, D]."""
        batch, heads, tokens, _ = self.data.shape
        return batch, heads, tokens, self.head_dim

    def to_plain(self) -> torch.Tensor:
        """What was kept of Q: data · scale, its blocks' means added back, float32 [B, Hq, Sq, D]."""
        from cute_attn.kernels.quantize_query import BLOCK_TOKENS
        from cute_attn.tile_images import FORMAT_DTYPES, unpack_rows

        data = self.data.view(FORMAT_DTYPES[self.recipe.qk_format])
        plain = unpack_rows(data, self.head_dim, self.recipe.qk_format).float() * self.scale[..., None]
        if self.q_mean is not None:
            plain += self.q_mean.float().repeat_interleave(BLOCK_TOKENS, 2)[:, :, : plain.shape[2]]
        return plain


@dataclass(frozen=True)
class QuantizedKeyValue:
    """K and V as tile images: blocks of 64 or 128 quantised tokens in the order in which the MMA reads them.

    image:       uint8 [B, Hkv, ceil(Sk/tokens), bytes], tokens those of `tile`
    v_scale:     float32 [B, Hkv, D]: scale of V per channel (all equal if the recipe scales per tensor)
    k_mean:      float32 [B, Hkv, D]: K's mean over tokens, subtracted before quantisation
    seq_k:       tokens Sk; the rest of the last tile is zeros
    dtype:       element type that K and V had
    recipe:      the recipe it was quantised for; it decides the formats in ``image``
    tile:        layout of one tile of ``image``: kernels of sm_90a read tiles of 128 tokens, those of others 64
    v_mean:      float32 [B, Hkv, D]: V's mean over tokens, subtracted before quantisation; None unless the recipe
                 smooths V
    key_lengths: int32 [B]: how many of the tokens count in each batch element; None: all

    Raises ValueError when ``image`` has not the tiles of ``seq_k`` tokens, or not the layout that ``recipe`` reads: a
    kernel would read past its end.
    """

    image: torch.Tensor
    v_scale: torch.Tensor
    k_mean: torch.Tensor
    seq_k: int
    dtype: torch.dtype
    recipe: Recipe
    tile: TileImage
    v_mean: torch.Tensor | None = None
    key_lengths: torch.Tensor | None = None

    def __post_init__(self) -> None:
        tile = replace(
            self.tile, head_dim=self.head_dim, values=self.recipe.pv_format, keys=self.recipe.qk_format
        )  # what the kernel will read
        if self.tile != tile or self.image.shape[3] != tile.nbytes:
            raise ValueError(
                f"image has tiles of {self.image.shape[3]} bytes; {self.head_dim} channels in recipe "
                f"{self.recipe.name!r} take {tile.nbytes}; use quantize_key_value with the recipe of the call"
            )
        if -(-self.seq_k // tile.tokens) != self.image.shape[2]:
            raise ValueError(
                f"seq_k={self.seq_k} does not fit an image of {self.image.shape[2]} tiles of {tile.tokens} tokens; "
                "use quantize_key_value"
            )

    @property
    def head_dim(self) -> int:
        return self.v_scale.shape[-1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, Hkv, Sk, D]."""
        batch, heads, _, _ = self.image.shape
        return batch, heads, self.seq_k, self.head_dim

    def to_plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What was kept of K and of V, their means added back: two float32 tensors [B, Hkv, Sk, D].

        Tokens beyond ``key_lengths`` come out as the means.
        """
        from cute_attn.tile_images import unpack_tile_images

        tile = self.tile
        k, k_scale, v = unpack_tile_images(
            self.image, self.head_dim, self.seq_k, tile.values, tile.keys, tile.tokens, tile.sum_rows
        )
        keys = k.float() * k_scale[..., None] + self.k_mean[:, :, None, :]
        values = v.float() * self.v_scale[:, :, None, :]
        return keys, values if self.v_mean is None else values + self.v_mean[:, :, None, :]


class Quantized(NamedTuple):
    """Result of `quantize`; ``attention(*quantize(q, k, v))`` takes it as it is."""

    q: QuantizedQuery
    kv: QuantizedKeyValue
