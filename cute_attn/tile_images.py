"""KV tile images from and to plain tensors, by the same layouts that the kernels use."""

from __future__ import annotations

from functools import lru_cache

import torch

from cute_attn.kernels.tile_image import SCORE_MAGIC, TILE_TOKENS, VALUE_BYTES, TileImage

__all__ = ["FORMAT_DTYPES", "pack_rows", "pack_tile_images", "unpack_rows", "unpack_tile_images"]

FORMAT_DTYPES = {
    "int8": torch.int8,
    "int4": torch.int8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
}
"""Element types of plain tensors by the names of recipes' formats; INT4 is one integer a byte."""


@lru_cache(maxsize=16)
def _places(layout: TileImage) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the bytes of K's and V's tokens lie inside a tile: int64 [tokens, key_bytes], [tokens, D · bytes of V]."""
    tokens = range(layout.tokens)
    k = [[layout.k_offset + layout.k(t, byte) for byte in range(layout.key_bytes)] for t in tokens]
    element = range(VALUE_BYTES[layout.values])
    v = [[layout.v_offset + layout.v(d, t) + byte for d in range(layout.head_dim) for byte in element] for t in tokens]
    return torch.tensor(k), torch.tensor(v)


def pack_rows(x: torch.Tensor, keys: str) -> torch.Tensor:
    """Elements [..., D] of `FORMAT_DTYPES` as rows [..., bytes] of Q or K: INT4 two a byte, zeros after D."""
    padded = x.new_zeros(*x.shape[:-1], TileImage(x.shape[-1], keys=keys).key_dims)
    padded[..., : x.shape[-1]] = x
    return padded if keys != "int4" else (padded[..., 0::2] & 15) | (padded[..., 1::2] << 4)


def unpack_rows(data: torch.Tensor, head_dim: int, keys: str) -> torch.Tensor:
    """The inverse of `pack_rows`."""
    if keys == "int4":
        data = torch.stack([data << 4 >> 4, data >> 4], -1).flatten(-2)
    return data[..., :head_dim].contiguous()


def unpack_tile_images(
    image: torch.Tensor,
    head_dim: int,
    seq_k: int,
    values: str = "int8",
    keys: str = "int8",
    tokens: int = TILE_TOKENS,
    sum_rows: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k [B, Hkv, Sk, D], k_scale float32 [B, Hkv, Sk] and v [B, Hkv, Sk, D] of image uint8 [B, Hkv, T, bytes].

    The others are `TileImage`'s fields; k and v have the dtypes that `FORMAT_DTYPES` names for their formats.

    Raises ValueError if the image is not ceil(Sk/tokens) tiles of that layout.
    """
    batch, heads, tiles, nbytes = image.shape
    layout = TileImage(head_dim, values, keys, tokens, sum_rows)
    if layout.nbytes != nbytes or tiles != -(-seq_k // tokens):
        raise ValueError(
            f"image of shape {tuple(image.shape)} does not hold {seq_k} tokens of {head_dim} channels, "
            f"K in {keys} and V in {values}"
        )
    k_places, v_places = (p.to(image.device) for p in _places(layout))

    def plain(places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rows = image[..., places.flatten()].reshape(batch, heads, tiles * tokens, -1)
        return rows[:, :, :seq_k].contiguous().view(dtype)

    k = unpack_rows(plain(k_places, FORMAT_DTYPES[keys]), head_dim, keys)
    scales = image[..., layout.scale_offset :].contiguous().view(torch.float32)[..., :tokens]
    k_scale = scales.flatten(2)[..., :seq_k].contiguous()
    return k, k_scale, plain(v_places, FORMAT_DTYPES[values])


def pack_tile_images(
    k: torch.Tensor,
    k_scale: torch.Tensor,
    v: torch.Tensor,
    keys: str = "int8",
    tokens: int = TILE_TOKENS,
    sum_rows: int = 0,
) -> torch.Tensor:
    """The inverse of `unpack_tile_images`: image uint8 [B, Hkv, ceil(Sk/tokens), bytes], zeros past the end.

    k: in the dtype of ``keys``, with "int4" in −8…7; v: in one of `FORMAT_DTYPES`, which decides the image's layout
    """
    batch, heads, seq_k, head_dim = k.shape
    values = next(name for name in VALUE_BYTES if FORMAT_DTYPES[name] == v.dtype)
    layout = TileImage(head_dim, values, keys, tokens, sum_rows)
    tiles = -(-seq_k // tokens)
    image = torch.zeros(batch, heads, tiles, layout.nbytes, dtype=torch.uint8, device=k.device)

    def tiled(x: torch.Tensor) -> torch.Tensor:
        padded = x.new_zeros(batch, heads, tiles * tokens, *x.shape[3:])
        padded[:, :, :seq_k] = x
        return padded.reshape(batch, heads, tiles, -1)

    for x, places in zip((pack_rows(k, keys), v), _places(layout), strict=True):
        image[..., places.to(k.device).flatten()] = tiled(x.contiguous().view(torch.uint8))
    scale = tiled(k_scale)
    rows = [scale, -SCORE_MAGIC * scale] if layout.shifted_scales else [scale]
    image[..., layout.scale_offset :] = torch.cat(rows, -1).contiguous().view(torch.uint8)
    if sum_rows:
        row_bytes, planes = layout.ones.extents()
        ones = [layout.ones_offset + layout.ones(byte, plane) for plane in range(planes) for byte in range(row_bytes)]
        pattern = torch.ones(len(ones) // v.element_size(), dtype=torch.float32).to(v.dtype).view(torch.uint8)
        image[..., torch.tensor(ones, device=k.device)] = pattern.to(k.device)
    return image
