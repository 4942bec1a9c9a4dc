"""K and V of 64 or 128 tokens to one tile image: smoothed, quantised, permuted, transposed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8, const_expr, range_constexpr
from cutlass.cute.runtime import make_fake_stream
from cutlass.cutlass_dsl import select_

from .rounding import (
    LARGEST,
    WORD_VALUES,
    absolute_max,
    inverse_scale,
    quantised_word,
    scale_22_bits,
    symmetric_scale,
)
from .rows import THREADS, VECTOR, QuantizerConfig, fake_tensor, key_length, load_vector
from .tile_image import KEY_BITS, SCORE_MAGIC, TILE_TOKENS, StaticLayout, TileImage

__all__ = ["KEY_SCALES", "KeyValueTiles", "TilesConfig", "key_groups"]

KEY_SCALES = ("token", "thread", "warp", "block")
"""Granularities of K's scales, see `key_groups`."""


def key_groups(k_scale: str, tokens: int) -> StaticLayout:
    """(member, group) -> token of a tile of so many: the tokens of a group share a scale.

    "token": none do. "thread": the tokens whose scores one lane of the Q·Kᵀ MMA holds, {16i + 4t + j}, four groups a
    tile. "warp" and "block": every warp reads the whole tile, which is one group.
    """
    if k_scale == "token":
        return StaticLayout((1, tokens), (0, 1))
    if k_scale == "thread":
        return StaticLayout(((4, tokens // 16), 4), ((1, 16), 4))
    return StaticLayout((tokens, 1), (1, 0))


_KEYS_PER_THREAD = 8
"""Tokens of which a thread holds eight channels of K, at most."""

_ONES = {"int8": 0x01010101, "float16": 0x3C003C00, "e4m3": 0x38383838}
"""A word of ones in each format of V."""


@dataclass(frozen=True)
class TilesConfig:
    """quantizer: what all quantisers are compiled for.

    values:   format of V in the image, "int8", "float16" or "e4m3" (from sm_89 on)
    keys:     format of K, "int8", "int4" or "e4m3"
    k_scale:  tokens of a tile that share a scale of K, see `key_groups`
    smooth_v: whether V's mean is subtracted
    varlen:   whether batch elements have lengths of their own
    tokens:   tokens of a tile, 64 or 128
    sum_rows: rows of ones behind V, 0 or 8
    """

    quantizer: QuantizerConfig
    values: str = "int8"
    keys: str = "int8"
    k_scale: str = "token"
    smooth_v: bool = False
    varlen: bool = False
    tokens: int = TILE_TOKENS
    sum_rows: int = 0


class KeyValueTiles:
    """Writes tile images, one CTA per (tile of T = 64 or 128 tokens, KV head, batch element).

    Called with k, v [B, Hkv, Sk, D] (any strides, head dim contiguous, Sk ≥ 1), k_mean, v_scale float32 [B, Hkv, D],
    v_mean of the same shape (None without smooth_v), image uint8 [B, Hkv, ceil(Sk/T), TileImage.nbytes] (contiguous
    tiles, 16-byte aligned), which it fills, and key_lengths int32 [B] (None without varlen); tokens past the end get
    zeros. K is quantised per group of tokens after its mean is subtracted, V by the scales it is given. |K − mean| up
    to 3.4e33 is in range (INT4: 1.8e32) where there are shifted scales: SCORE_MAGIC times the scale has to be finite.

    A token with an inf or a NaN, or whose distance from the mean overflows, has a non-finite scale, and counts for no
    other token of its group.

    The image is put together in shared memory, so that global memory sees 16-byte reads (`in_align` permitting) and
    contiguous 16-byte writes, each byte once. K waits in registers for the scales of its groups: at most 64 of them,
    for which CTAs have up to 512 threads.
    """

    def __init__(self, config: TilesConfig):
        if reason := self.can_implement(config):
            raise ValueError(reason)
        self.config = config.quantizer
        self.smooth_v = config.smooth_v
        self.varlen = config.varlen
        self.groups = key_groups(config.k_scale, config.tokens)
        self.tile = TileImage(config.quantizer.head_dim, config.values, config.keys, config.tokens, config.sum_rows)
        self.padded = (self.tile.key_dims, self.tile.value_channels) != (self.config.head_dim,) * 2
        self.tokens_per_word = WORD_VALUES[config.values]
        self.threads = max(THREADS, self.config.lanes_per_row * config.tokens // _KEYS_PER_THREAD)
        self.rows_per_pass = self.threads // self.config.lanes_per_row

    @staticmethod
    def can_implement(config: TilesConfig) -> str | None:
        if config.k_scale not in KEY_SCALES:
            return f"k_scale {config.k_scale} is not one of {', '.join(KEY_SCALES)}"
        return config.quantizer.refusal() or TileImage.can_implement(
            config.quantizer.head_dim, config.values, config.keys, config.tokens, config.sum_rows
        )

    def fake_arguments(self) -> tuple[Any, ...]:
        element = self.config.element_type
        inputs = [fake_tensor(element, 4) for _ in range(2)]
        statistics = [fake_tensor(Float32, 3, 16) for _ in range(2)]
        v_mean = fake_tensor(Float32, 3, 16) if self.smooth_v else None
        image = fake_tensor(Uint8, 4, 16)
        lengths = fake_tensor(Int32, 1) if self.varlen else None
        return (*inputs, *statistics, v_mean, image, lengths, make_fake_stream(use_tvm_ffi_env_stream=True))

    @cute.jit
    def __call__(self, k, v, k_mean, v_scale, v_mean, image, key_lengths, stream):
        grid = [image.shape[2], k.shape[1], k.shape[0]]
        self.kernel(k, v, k_mean, v_scale, v_mean, image, key_lengths).launch(
            grid=grid, block=[self.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, k: cute.Tensor, v: cute.Tensor, k_mean, v_scale, v_mean, image: cute.Tensor, key_lengths):
        thread, _, _ = cute.arch.thread_idx()
        tile, head, batch = cute.arch.block_idx()
        tokens = key_length(key_lengths, batch, k.shape[2]) - tile * self.tile.tokens
        smem = cutlass.memory.SmemAllocator()
        # The swizzle exchanges chunks by address bit 7, so planes start at multiples of 256 bytes.
        staged = smem.allocate_tensor(Uint8, cute.make_layout(self.tile.nbytes), 256)
        # Of every token: the amax of K, and the inverse of its scale.
        peaks, inverses = (smem.allocate_tensor(Float32, cute.make_layout(self.tile.tokens), 16) for _ in range(2))
        place = (batch, head, tile)
        if const_expr(self.padded or self.varlen):
            self.clear(staged, thread)
            if const_expr(self.tile.sum_rows):
                cute.arch.sync_threads()
        if const_expr(self.tile.sum_rows):
            self.put_ones(staged, thread)
        if const_expr(self.varlen):
            if tokens > 0:
                self.stage_keys(k, k_mean, staged, (peaks, inverses), place, tokens, thread)
                self.stage_values(v, v_scale, v_mean, staged, place, tokens, thread)
        else:
            self.stage_keys(k, k_mean, staged, (peaks, inverses), place, tokens, thread)
            self.stage_values(v, v_scale, v_mean, staged, place, tokens, thread)
        cute.arch.sync_threads()
        self.write_image(staged, image, place, thread)

    @cute.jit
    def clear(self, staged: cute.Tensor, thread: Int32):
        """Zeros, of which the padding stays, and everything of a tile without tokens.

        The barriers of `stage_keys` lie between these and what is put in their place.
        """
        chunks = cute.make_tensor(staged.iterator, cute.make_layout((16, self.tile.nbytes // 16)))
        zeros = cute.make_rmem_tensor((16,), Uint8)
        zeros.fill(0)
        for i in range_constexpr(0, self.tile.nbytes // 16, self.threads):
            if i + thread < self.tile.nbytes // 16:
                cute.autovec_copy(zeros, chunks[None, i + thread])

    @cute.jit
    def put_ones(self, staged: cute.Tensor, thread: Int32):
        """The rows of ones of every plane of V, a word a thread and step."""
        plane_bytes, planes = self.tile.ones.extents()
        words = plane_bytes // 4
        for i in range_constexpr(0, planes * words, self.threads):
            word = i + thread
            if word < planes * words:
                place = (word % words * 4, word // words)
                store_word(staged, self.tile.ones_offset, self.tile.ones, place, Int32(_ONES[self.tile.values]))

    @cute.jit
    def stage_keys(self, k: cute.Tensor, k_mean: cute.Tensor, staged, shared, place, tokens: Int32, thread: Int32):
        """Each token by neighbouring lanes, which reduce to its amax; its group's amax decides the scale."""
        batch, head, _ = place
        peaks, inverses = shared
        lanes, rows = self.config.lanes_per_row, self.rows_per_pass
        row, lane = thread // lanes, thread % lanes
        channel = self.config.channel(lane)
        mean = load_vector(k_mean, (batch, head, channel), 16)
        keys = []
        for start in range_constexpr(0, self.tile.tokens, rows):
            x = self.load_token(k, place, start + row, channel, tokens, mean)
            amax = Float32(0.0)
            for j in range_constexpr(VECTOR):
                amax = absolute_max(amax, x[j])
            amax = cute.arch.warp_reduction(amax, absolute_max, threads_in_group=lanes)
            if lane == 0:
                peaks[start + row] = amax
            keys.append(x)
        cute.arch.sync_threads()
        self.share_scales(staged, peaks, inverses, tokens, thread)
        cute.arch.sync_threads()
        bits, per_word = KEY_BITS[self.tile.keys], WORD_VALUES[self.tile.keys]
        for i in range_constexpr(self.tile.tokens // rows):
            local = i * rows + row
            inverse = inverses[local]
            if self.config.owns_channels(lane):
                for w in range_constexpr(VECTOR // per_word):
                    word = quantised_word(keys[i][per_word * w : per_word * (w + 1)], inverse, self.tile.keys)
                    store_word(staged, self.tile.k_offset, self.tile.k, (local, channel * bits // 8 + 4 * w), word)

    @cute.jit
    def share_scales(
        self, staged: cute.Tensor, peaks: cute.Tensor, inverses: cute.Tensor, tokens: Int32, thread: Int32
    ):
        """A thread per token: its scale, from the finite amax of its group, to the image, and the inverse."""
        scales = cute.make_tensor(
            cute.recast_ptr(staged.iterator + self.tile.scale_offset, dtype=Float32), self.tile.scales.cute()
        )
        members, groups = self.groups.extents()[0], self.groups.cute()
        if thread < self.tile.tokens:
            token = groups((thread % members, thread // members))
            own, amax = peaks[token], Float32(0.0)
            for member in cutlass.range(members, unroll_full=True):
                peak = peaks[groups((member, thread // members))]
                amax = cute.arch.fmax(amax, select_(peak < Float32.inf, peak, Float32(0.0)))
            amax = Float32(select_(own < Float32.inf, amax, own))
            scale = symmetric_scale(amax, LARGEST[self.tile.keys])
            if const_expr(self.tile.keys != "e4m3"):
                scale = scale_22_bits(scale)
            scale = Float32(select_(token < tokens, scale, Float32(0.0)))
            scales[0, token] = scale
            if const_expr(self.tile.shifted_scales):
                scales[1, token] = Float32(-SCORE_MAGIC) * scale
            inverses[token] = inverse_scale(scale)

    @cute.jit
    def stage_values(self, v: cute.Tensor, v_scale, v_mean, staged, place, tokens: Int32, thread: Int32):
        """Eight channels of a word's tokens per thread, transposed in registers: a word is one channel."""
        batch, head, _ = place
        lanes = self.config.lanes_per_row
        lane = thread % lanes
        channel = self.config.channel(lane)
        scale = load_vector(v_scale, (batch, head, channel), 16)
        mean = load_vector(v_mean, (batch, head, channel), 16) if const_expr(self.smooth_v) else None
        inverse = [inverse_scale(s) for s in scale]
        for start in range_constexpr(0, self.tile.tokens, self.tokens_per_word * self.rows_per_pass):
            local = start + thread // lanes * self.tokens_per_word
            if local < self.tile.tokens:
                rows = [
                    self.load_token(v, place, local + i, channel, tokens, mean) for i in range(self.tokens_per_word)
                ]
                if self.config.owns_channels(lane):
                    for j in range_constexpr(VECTOR):
                        word = quantised_word([row[j] for row in rows], inverse[j], self.tile.values)
                        store_word(staged, self.tile.v_offset, self.tile.v, (channel + j, local), word)

    def load_token(self, x: cute.Tensor, place, local: Int32, channel: Int32, tokens: Int32, mean) -> list[Float32]:
        """Eight channels of token ``local`` of the tile, minus their mean unless it is None; zeros past the end."""
        batch, head, tile = place
        inside = local < tokens
        # The last token is read in place of those past the end, the first one if there is none.
        token = cutlass.max(tile * self.tile.tokens + cutlass.min(local, tokens - 1), 0)
        values = load_vector(x, (batch, head, token, channel), self.config.in_align)
        if const_expr(mean is not None):
            values = [value - of_channel for value, of_channel in zip(values, mean, strict=True)]
        return [Float32(select_(inside, value, Float32(0.0))) for value in values]

    @cute.jit
    def write_image(self, staged: cute.Tensor, image: cute.Tensor, place, thread: Int32):
        batch, head, tile = place
        first = image.iterator + cute.crd2idx((batch, head, tile, 0), image.layout)
        aligned = cute.make_ptr(Uint8, first.toint(), cute.AddressSpace.gmem, assumed_align=16)
        chunks = cute.make_layout((16, self.tile.nbytes // 16))
        source = cute.make_tensor(staged.iterator, chunks)
        target = cute.make_tensor(aligned, chunks)
        for i in range_constexpr(0, self.tile.nbytes // 16, self.threads):
            chunk = i + thread
            if chunk < self.tile.nbytes // 16:
                cute.autovec_copy(source[None, chunk], target[None, chunk])


def store_word(staged: cute.Tensor, offset: int, layout, coordinate, word: Int32) -> None:
    """Four bytes at ``coordinate`` of an operand's layout, whose 16-byte chunks keep them together."""
    place = staged.iterator + (offset + cute.crd2idx(coordinate, layout.cute()))
    aligned = cute.make_ptr(Int32, place.toint(), cute.AddressSpace.smem, assumed_align=4)
    cute.make_tensor(aligned, cute.make_layout(1))[0] = word
