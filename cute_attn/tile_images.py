"""KV tile images from and to plain tensors, by the same layouts that the kernels use."""

from __future__ import annotations

from functools import lru_cache

import torch

from cute_attn.kernels.tile_image import SCORE_MAGIC, TILE_TOKENS, VALUE_BYTES, TileImage

__all__ = ["pack_rows", "pack_tile_images", "unpack_rows", "unpack_tile_images"]


@lru_cache(maxsize=16)
def _places(layout: TileImage) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the bytes of K's and of V's tokens lie inside a tile: int64 [64, key_bytes] and [64, D · bytes of V]."""
    tokens = range(TILE_TOKENS)
    k = [[layout.k_offset + layout.k(t, byte) for byte in range(layout.key_bytes)] for t in tokens]
    element = range(VALUE_BYTES[layout.values])
    v = [[layout.v_offset + layout.v(d, t) + byte for d in range(layout.head_dim) for byte in element] for t in tokens]
    return torch.tensor(k), torch.tensor(v)


def pack_rows(x: torch.Tensor, keys: str) -> torch.Tensor:
    """Integers int8 [..., D], one a byte, as rows int8 [..., bytes] of Q or K: INT4 two a byte, zeros after D."""
    x = torch.nn.functional.pad(x, (0, TileImage(x.shape[-1], keys=keys).key_dims - x.shape[-1]))
    return x if keys == "int8" else (x[..., 0::2] & 15) | (x[..., 1::2] << 4)


def unpack_rows(data: torch.Tensor, head_dim: int, keys: str) -> torch.Tensor:
    """The inverse of `pack_rows`."""
    if keys == "int4":
        data = torch.stack([data << 4 >> 4, data >> 4], -1).flatten(-2)
    return data[..., :head_dim].contiguous()


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

    k = unpack_rows(plain(k_places, torch.int8), head_dim, keys)
    scales = image[..., layout.scale_offset :].contiguous().view(torch.float32)[..., :TILE_TOKENS]
    k_scale = scales.flatten(2)[..., :seq_k].contiguous()
    return k, k_scale, plain(v_places, getattr(torch, values))


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

    for x, places in zip((pack_rows(k, keys), v), _places(layout), strict=True):
        image[..., places.to(k.device).flatten()] = tiled(x.contiguous()).view(torch.uint8)
    scale = tiled(k_scale)
    both = torch.cat([scale, -SCORE_MAGIC * scale], -1).contiguous()
    image[..., layout.scale_offset :] = both.view(torch.uint8)
    return image
