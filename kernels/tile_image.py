"""KV tile images: where each byte of some quantised keys and values lies, for the MMAs of every architecture.

A tile image is one contiguous block per `tokens` tokens (64 for warp MMAs, 128 for warpgroup MMAs) that holds K, V and
K's scales in the order in which the MMA reads them, so that an attention kernel copies whole blocks and permutes
nothing. K is INT8, INT4 or E4M3, in rows of ``key_bytes`` bytes; V is INT8 or E4M3 (b = 1 byte an element) or float16
(b = 2), ``value_channels`` rows, and after them ``sum_rows`` rows of ones.

    byte 0                 K: planes of 32 bytes a token        [key_bytes/32][tokens rows][32 B]
    v_offset               V transposed: planes of 32/b tokens  [tokens·b/32][value_channels + sum_rows rows][32 B]
    scale_offset           scale c of every key token           [tokens] float32, natural token order
    after the scales       −12582912·c of every key token       [tokens] float32, natural token order; `shifted_scales`

Head dims that do not fill the MMA's k or a lane's run of channels are padded with zeros: K to a multiple of 32 dims in
INT8 and E4M3 and of 64 in INT4, 32 bytes in each, V to one of 32 channels.

INT4 puts dim 2i into the low and dim 2i+1 into the high half of byte i. The fragments of m16n8k64 with s4 operands are
then, byte for byte, those of m16n8k32 with s8 operands, and every address is the same.

Swizzle<1,4,3> exchanges the two 16-byte chunks of a 32-byte row where bit 2 of the row is set: the eight rows that one
ldmatrix phase reads then fall into eight different groups of four banks. It is also what the tensor cores of sm_90a
call the 32-byte swizzle: eight rows of a plane are one K-major core of 256 bytes, a plane is the K extent of one wgmma
instruction, and the next eight rows follow at once (PTX ISA, "Asynchronous warpgroup level matrix shared memory
layout"). So both kinds of MMA read the same planes.

The permutations are chosen so that no register is ever moved between lanes. A warpgroup's accumulators and register
operands are those of m16n8 and m16n8k32 in each of its warps, so they hold for it, too:

* K: within 16 tokens, column j of n8 tile n of the Q·Kᵀ accumulator is token 4·(j>>1) + 2·n + (j&1). A lane needs the
  scales of four neighbouring tokens, one 16-byte load, and its accumulators are, as they lie, its A operand of P·V:
  of the 8-bit MMA with the tokens of V in natural order, and
* of the 16-bit MMA with the tokens of V in the columns' order: token 4t+2n+e is element 8n+2t+e of its 16.
* V: within 32 channels, column 2t+e of n8 tile n of the P·V accumulator is channel 8t+2n+e, so that the four n8 tiles
  of a lane hold 8 consecutive channels of the output: one 16-byte store of 16-bit floats.
* The rows of ones make one more n8 tile of P·V, which holds the sums of P's rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import cutlass.cute as cute

__all__ = ["KEY_BITS", "SCORE_MAGIC", "TILE_TOKENS", "VALUE_BYTES", "StaticLayout", "TileImage"]

TILE_TOKENS = 64
"""Tokens of a tile of the warp-MMA kernels."""

SCORE_MAGIC = 12582912.0
"""1.5·2^23, float32 bits 0x4B400000: an int32 accumulator that starts there reads as the float SCORE_MAGIC + S."""

KEY_BITS = {"int8": 8, "int4": 4, "e4m3": 8}
"""Bits of an element of K, by its format."""

VALUE_BYTES = {"int8": 1, "float16": 2, "e4m3": 1}
"""Bytes of an element of V, by its format."""

_CHUNK_SWIZZLE = (1, 4, 3)
_ROW_BYTES = 32
_LARGEST_HEAD_DIM = 256

Nested = int | tuple["Nested", ...]


def _evaluate(index: int, shape: Nested, stride: Nested) -> int:
    """CuTe's map of a one-dimensional coordinate through one mode, leftmost submode fastest."""
    if isinstance(shape, int):
        assert isinstance(stride, int)
        return index * stride
    assert isinstance(stride, tuple)
    offset = 0
    for extent, step in zip(shape, stride, strict=True):
        size = _size(extent)
        offset += _evaluate(index % size, extent, step)
        index //= size
    return offset


def _size(shape: Nested) -> int:
    return shape if isinstance(shape, int) else prod(_size(mode) for mode in shape)


@dataclass(frozen=True)
class StaticLayout:
    """A CuTe layout as plain numbers: Swizzle<bits, base, shift> ∘ (shape : stride), both usable without a compiler.

    Calling it with one integer coordinate per top-level mode gives the offset; `cute()` gives the same to a kernel.
    """

    shape: tuple[Nested, ...]
    stride: tuple[Nested, ...]
    swizzle: tuple[int, int, int] | None = None

    def extents(self) -> tuple[int, ...]:
        """Size of every top-level mode."""
        return tuple(_size(mode) for mode in self.shape)

    def __call__(self, *coordinate: int) -> int:
        """Offset of ``coordinate``. Raises IndexError outside the layout's domain."""
        extents = self.extents()
        if len(coordinate) != len(extents) or any(not 0 <= c < e for c, e in zip(coordinate, extents, strict=True)):
            raise IndexError(f"coordinate {coordinate} is outside {extents}")
        offset = sum(_evaluate(c, s, d) for c, s, d in zip(coordinate, self.shape, self.stride, strict=True))
        if self.swizzle is None:
            return offset
        bits, base, shift = self.swizzle
        return offset ^ ((offset >> shift) & (((1 << bits) - 1) << base))

    def cute(self) -> Any:
        """The layout as a `cute.Layout`, or `cute.ComposedLayout` if swizzled; only while a kernel is being traced."""
        layout = cute.make_layout(self.shape, stride=self.stride)
        if self.swizzle is None:
            return layout
        return cute.make_composed_layout(cute.make_swizzle(*self.swizzle), 0, layout)


@dataclass(frozen=True)
class TileImage:
    """Layout of one KV tile image; see the module's text for the picture.

    head_dim: D, any multiple of 8 up to 256; values: format of V, one of `VALUE_BYTES`; keys: format of K, one of
    `KEY_BITS`; tokens: 64 or 128; sum_rows: rows of ones behind V, 0 or 8. All offsets are bytes from the start of the
    tile, which is 16-byte aligned in global and 256-byte aligned in shared memory (the swizzle looks at address bit 7).
    """

    head_dim: int
    values: str = "int8"
    keys: str = "int8"
    tokens: int = TILE_TOKENS
    sum_rows: int = 0

    def __post_init__(self) -> None:
        if reason := self.can_implement(self.head_dim, self.values, self.keys, self.tokens, self.sum_rows):
            raise ValueError(reason)

    @staticmethod
    def can_implement(
        head_dim: int, values: str = "int8", keys: str = "int8", tokens: int = TILE_TOKENS, sum_rows: int = 0
    ) -> str | None:
        """None, or why there is no such tile image."""
        if values not in VALUE_BYTES:
            return f"values {values} is not one of {', '.join(VALUE_BYTES)}"
        if keys not in KEY_BITS:
            return f"keys {keys} is not one of {', '.join(KEY_BITS)}"
        if head_dim % 8 or not 0 < head_dim <= _LARGEST_HEAD_DIM:
            return f"head dim {head_dim} is not a multiple of 8 from 8 to {_LARGEST_HEAD_DIM}"
        if tokens not in (64, 128):
            return f"tokens {tokens} is not one of 64, 128"
        if sum_rows not in (0, 8):
            return f"sum_rows {sum_rows} is not one of 0, 8"
        return None

    @property
    def key_dims(self) -> int:
        """Dims of K with the padding: whole rows of 32 bytes."""
        return self.key_bytes * 8 // KEY_BITS[self.keys]

    @property
    def key_bytes(self) -> int:
        """Bytes of one token of K with the padding, a multiple of 32."""
        return -(-self.head_dim * KEY_BITS[self.keys] // 8 // _ROW_BYTES) * _ROW_BYTES

    @property
    def value_channels(self) -> int:
        """Channels of V with the padding, a multiple of 32."""
        return -(-self.head_dim // 32) * 32

    @property
    def value_rows(self) -> int:
        """Rows of a plane of V: its channels and the rows of ones."""
        return self.value_channels + self.sum_rows

    @property
    def k_offset(self) -> int:
        return 0

    @property
    def v_offset(self) -> int:
        return self.tokens * self.key_bytes

    @property
    def scale_offset(self) -> int:
        return self.v_offset + self.tokens * self.value_rows * VALUE_BYTES[self.values]

    @property
    def nbytes(self) -> int:
        """Bytes of one tile: of 64 tokens and D without padding 128·D + 512 in INT8, 192·D + 512 with V in float16."""
        return self.scale_offset + 4 * self.tokens * self.scales.extents()[0]

    @property
    def k(self) -> StaticLayout:
        """(token, byte of its row) -> byte from `k_offset`. Token bits (b0, b1, b3b2) have row strides (1, 8, 2).

        The byte of a row is the dim in INT8, half of it in INT4.
        """
        row = _ROW_BYTES
        return StaticLayout(
            ((2, 2, 4, self.tokens // 16), (row, self.key_bytes // row)),
            ((row, 8 * row, 2 * row, 16 * row), (1, self.tokens * row)),
            _CHUNK_SWIZZLE,
        )

    @property
    def v(self) -> StaticLayout:
        """(channel, token) -> byte from `v_offset`. Channel bits (b0, b2b1, b4b3) have row strides (1, 8, 2).

        In float16, bits (b0, b1, b3b2) of a token step by (1, 8, 2) elements.
        """
        row, plane = _ROW_BYTES, self.value_rows * _ROW_BYTES
        channels, channel_strides = (2, 4, 4, self.value_channels // row), (row, 8 * row, 2 * row, 32 * row)
        tokens: tuple[Nested, Nested] = (row, self.tokens // row), (1, plane)
        if self.values == "float16":
            tokens = (2, 2, 4, self.tokens // 16), (2, 16, 4, plane)
        return StaticLayout((channels, tokens[0]), (channel_strides, tokens[1]), _CHUNK_SWIZZLE)

    @property
    def ones(self) -> StaticLayout:
        """(byte, plane) of the rows of ones -> byte from `ones_offset`. Of equal elements, no swizzle is seen."""
        row, planes = _ROW_BYTES, self.tokens * VALUE_BYTES[self.values] // _ROW_BYTES
        return StaticLayout((self.sum_rows * row, planes), (1, self.value_rows * row))

    @property
    def ones_offset(self) -> int:
        """Of the first row of ones, from the start of the tile."""
        return self.v_offset + self.value_channels * _ROW_BYTES

    values_transposed = True
    """V lies as [channel][token], as the B operand of P·V wants it."""

    output_run = 8
    """Neighbouring channels of the output that a lane holds."""

    def value_fragment(self, n: int, k: int) -> int:
        """Byte from `v_offset` of the first row of channels 16·n …, and of the k-th plane of tokens."""
        return n * 16 * _ROW_BYTES + k * self.value_rows * _ROW_BYTES

    @property
    def scales(self) -> StaticLayout:
        """(row, token) -> float32 index from `scale_offset`: row 0 holds c, row 1 of two holds −SCORE_MAGIC·c."""
        return StaticLayout((2 if self.shifted_scales else 1, self.tokens), (self.tokens, 1))

    @property
    def shifted_scales(self) -> bool:
        """Whether −SCORE_MAGIC·c is there: for kernels that read int32 accumulators as float32 (`SCORE_MAGIC`).

        Where int32 to float32 is converted at full rate, on sm_90a, it would be of no use.
        """
        return self.keys != "e4m3" and self.tokens == TILE_TOKENS

    @property
    def score_tokens(self) -> StaticLayout:
        """(column, n8 tile) of the Q·Kᵀ accumulator -> token: what `k`'s row order means after the MMA."""
        return StaticLayout(((2, 4), (2, self.tokens // 16)), ((1, 4), (2, 16)))

    @property
    def output_channels(self) -> StaticLayout:
        """(column, n8 tile) of the P·V accumulator -> channel: what `v`'s row order means after the MMA."""
        return StaticLayout(((2, 4), (4, self.value_channels // 32)), ((1, 8), (2, 32)))
