"""KV tile images from and to plain tensors, by the same layouts that the kernels use."""

from __future__ import annotations

from functools import lru_cache

import torch

from cute_attn.kernels.tile_image import SCORE_MAGIC, TILE_TOKENS, VALUE_BYTES, TileImage

__all__ = ["pack_tile_images", "unpack_tile_images"]


@lru_cache(maxsize=16)
def _places(layout: TileImage) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the bytes of K's and of V's tokens lie inside a tile: int64 [64, key_bytes] and [64, D · bytes of V]."""
    tokens = range(TILE_TOKENS)
    k = [[layout.k_offset + layout.k(t, byte) for byte in range(layout.key_bytes)] for t in tokens]
    element = range(VALUE_BYTES[layout.values])
    v = [[layout.v_offset + layout.v(d, t) + byte for d in range(layout.head_dim) for byte in element] for t in tokens]
    return torch.tensor(k), torch.tensor(v)


def unpack_tile_images(
    image: torch.Tensor, head_dim: int, seq_k: int, values: str = "int8", keys: str = "int8"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k int8 [B, Hkv, Sk, D], k_scale float32 [B, Hkv, Sk] and v [B, Hkv, Sk, D] of image uint8 [B, Hkv, T, bytes].

    values: format of V in the image and in the result, "int8" or "float16"; keys: format of K in the image, "int8" or
    "int4"

    Raises ValueError if the image is not ceil(Sk/64) tiles of that head dim and these formats.
    """
    batch, heads, tiles, nbytes = image.shape
    layout = TileImage(head_dim, values, keys)
    if layout.nbytes != nbytes or tiles != -(-seq_k // TILE_TOKENS):
        raise ValueError(
            f"image of shape {tuple(image.shape)} does not hold {seq_k} tokens of {head_dim} channels, "
            f"K in {keys} and V in {values}"
        )
    k_places, v_places = (p.to(image.device) for p in _places(layout))

    def plain(places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        tokens = image[..., places.flatten()].reshape(batch, heads, tiles * TILE_TOKENS, -1)
        return tokens[:, :, :seq_k].contiguous().view(dtype)

    k = plain(k_places, torch.int8)
    if keys == "int4":
        k = torch.stack([k << 4 >> 4, k >> 4], -1).flatten(-2)
    scales = image[..., layout.scale_offset :].contiguous().view(torch.float32)[..., :TILE_TOKENS]
    k_scale = scales.flatten(2)[..., :seq_k].contiguous()
    return k[..., :head_dim].contiguous(), k_scale, plain(v_places, getattr(torch, values))


def pack_tile_images(k: torch.Tensor, k_scale: torch.Tensor, v: torch.Tensor, keys: str = "int8") -> torch.Tensor:
    """The inverse of `unpack_tile_images`: image uint8 [B, Hkv, ceil(Sk/64), bytes], zeros past the end.

    k: int8, with keys="int4" in −8…7; v: int8 or float16, which decides the image's layout
    """
    batch, heads, seq_k, head_dim = k.shape
    layout = TileImage(head_dim, str(v.dtype).removeprefix("torch."), keys)
    tiles = -(-seq_k // TILE_TOKENS)
    image = torch.zeros(batch, heads, tiles, layout.nbytes, dtype=torch.uint8, device=k.device)

    def tiled(x: torch.Tensor) -> torch.Tensor:
        padded = x.new_zeros(batch, heads, tiles * TILE_TOKENS, *x.shape[3:])
        padded[:, :, :seq_k] = x
        return padded.reshape(batch, heads, tiles, -1)

    k = torch.nn.functional.pad(k, (0, layout.key_dims - head_dim))
    if keys == "int4":
        k = (k[..., 0::2] & 15) | (k[..., 1::2] << 4)
    for x, places in zip((k, v), _places(layout), strict=True):
        image[..., places.to(k.device).flatten()] = tiled(x.contiguous()).view(torch.uint8)
    scale = tiled(k_scale)
    both = torch.cat([scale, -SCORE_MAGIC * scale], -1).contiguous()
    image[..., layout.scale_offset :] = both.view(torch.uint8)
    return image
