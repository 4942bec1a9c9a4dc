"""Head dims that do not fill what the MMAs and copies take at once: what is filled with zeros, what is left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cute_attn.kernels.attention_sm80 import AttentionSm80
from cute_attn.kernels.epilogue import OUTPUT_VECTOR
from cute_attn.kernels.tile_image import KEY_BITS, TILE_TOKENS, VALUE_BYTES, TileImage

from .permutations import QUAD

__all__ = ["Padding", "padding"]

_CHUNK = 16
_ROW_BYTES = 2  # of an unquantised element


@dataclass(frozen=True)
class Padding:
    """Of one KV tile, and of one row of the output.

    key_dims, key_bytes, value_channels, nbytes: of the tile, with the padding
    share:  of its bytes that no element of K or V and no scale lies in
    chunks: of 16 bytes that are read of a row of K and V, of those that its planes have; "–" in tile images, which are
            read whole
    runs:   lanes of a quad that store, by group of n8 tiles
    """

    key_dims: int
    key_bytes: int
    value_channels: int
    nbytes: int
    share: float
    chunks: str
    runs: str


def padding(kernel: AttentionSm80) -> Padding:
    image: Any = kernel.image
    head_dim = kernel.config.head_dim
    if isinstance(image, TileImage):
        bits = KEY_BITS[image.keys] + 8 * VALUE_BYTES[image.values]
        filled, chunks = image.nbytes - image.scale_offset, "–"
    else:
        bits, filled = 2 * 8 * _ROW_BYTES, 0
        chunks = f"{_ROW_BYTES * head_dim // _CHUNK} of {image.key_bytes // _CHUNK}"
    filled += TILE_TOKENS * head_dim * bits // 8
    return Padding(
        key_dims=image.key_dims,
        key_bytes=image.key_bytes,
        value_channels=image.value_channels,
        nbytes=image.nbytes,
        share=1 - filled / image.nbytes,
        chunks=chunks,
        runs=_runs(head_dim // OUTPUT_VECTOR),
    )


def _runs(runs: int) -> str:
    """As many full groups of `QUAD` lanes as there are, and the lanes of the last one."""
    full, rest = divmod(runs, QUAD)
    return " + ".join([f"{full} × {QUAD}"] * bool(full) + [str(rest)] * bool(rest))
