"""K and V of 64 tokens to one tile image: smoothed, quantised, permuted, transposed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8, const_expr, range_constexpr
from cutlass.cute.runtime import make_fake_stream
from cutlass.cutlass_dsl import select_

from .int8_rounding import LEVELS, absolute_max, inverse_scale, scale_22_bits, symmetric_scale, to_int4x8, to_int8x4
from .ptx import pack_f16x2
from .rows import THREADS, VECTOR, QuantizerConfig, fake_tensor, key_length, load_vector
from .tile_image import KEY_BITS, SCORE_MAGIC, TILE_TOKENS, VALUE_BYTES, StaticLayout, TileImage

__all__ = ["KEY_GROUPS", "KeyValueTiles", "TilesConfig"]

KEY_GROUPS = {
    "token": StaticLayout((1, TILE_TOKENS), (0, 1)),
    "thread": StaticLayout(((4, TILE_TOKENS // 16), 4), ((1, 16), 4)),
    "warp": StaticLayout((TILE_TOKENS, 1), (1, 0)),
    "block": StaticLayout((TILE_TOKENS, 1), (1, 0)),
}
"""(member, group) -> token of a tile, by the granularity of K's scales: the tokens of a group share one.

"thread": the tokens whose scores one lane of the Q·Kᵀ MMA holds. "warp" and "block": every warp reads the whole tile.
"""


_KEYS_PER_THREAD = 8
"""Tokens of which a thread holds eight channels of K, at most."""


@dataclass(frozen=True)
class TilesConfig:
    """quantizer: what all quantisers are compiled for.

    values:   format of V in the image, "int8" or "float16"
    keys:     format of K, "int8" or "int4"
    k_scale:  tokens of a tile that share a scale of K, see `KEY_GROUPS`
    smooth_v: whether V's mean is subtracted
    varlen:   whether batch elements have lengths of their own
    """

    quantizer: QuantizerConfig
    values: str = "int8"
    keys: str = "int8"
    k_scale: str = "token"
    smooth_v: bool = False
    varlen: bool = False


class KeyValueTiles:
    """Writes tile images, one CTA per (tile of 64 tokens, KV head, batch element).

    Called with k, v [B, Hkv, Sk, D] (any strides, head dim contiguous, Sk ≥ 1), k_mean, v_scale float32 [B, Hkv, D],
    v_mean of the same shape (None without smooth_v), image uint8 [B, Hkv, ceil(Sk/64), TileImage.nbytes] (contiguous
    tiles, 16-byte aligned), which it fills, and key_lengths int32 [B] (None without varlen); tokens past the end get
    zeros. K is quantised per group of tokens after its mean is subtracted, V by the scales it is given. |K − mean| up
    to 3.4e33 is in range (INT4: 1.8e32): SCORE_MAGIC times its scale has to be finite.

    A token with an inf or a NaN, or whose distance from the mean overflows, has a non-finite scale, and counts for no
    other token of its group.

    The image is put together in shared memory, so that global memory sees 16-byte reads (`in_align` permitting) and
    contiguous 16-byte writes, each byte once. K waits in registers for the scales of its groups: at most 64 of them,
    for which CTAs have 256 threads from head dim 136 on.
    """

    def __init__(self, config: TilesConfig):
        if reason := self.can_implement(config):
            raise ValueError(reason)
        self.config = config.quantizer
        self.smooth_v = config.smooth_v
        self.varlen = config.varlen
        self.groups = KEY_GROUPS[config.k_scale]
        self.tile = TileImage(config.quantizer.head_dim, config.values, config.keys)
        self.tokens_per_word = 4 // VALUE_BYTES[config.values]
        self.threads = max(THREADS, self.config.lanes_per_row * TILE_TOKENS // _KEYS_PER_THREAD)
        self.rows_per_pass = self.threads // self.config.lanes_per_row

    @staticmethod
    def can_implement(config: TilesConfig) -> str | None:
        if config.k_scale not in KEY_GROUPS:
            return f"k_scale {config.k_scale} is not one of {', '.join(KEY_GROUPS)}"
        return config.quantizer.refusal() or TileImage.can_implement(
            config.quantizer.head_dim, config.values, config.keys
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
        tokens = key_length(key_lengths, batch, k.shape[2]) - tile * TILE_TOKENS
        smem = cutlass.memory.SmemAllocator()
        # The swizzle exchanges chunks by address bit 7, so planes start at multiples of 256 bytes.
        staged = smem.allocate_tensor(Uint8, cute.make_layout(self.tile.nbytes), 256)
        # Of every token: the amax of K, and the inverse of its scale.
        peaks, inverses = (smem.allocate_tensor(Float32, cute.make_layout(TILE_TOKENS), 16) for _ in range(2))
        if const_expr(self.tile.key_dims != self.config.head_dim or self.tile.value_channels != self.config.head_dim):
            self.clear(staged, thread)
        place = (batch, head, tile)
        self.stage_keys(k, k_mean, staged, (peaks, inverses), place, tokens, thread)
        self.stage_values(v, v_scale, v_mean, staged, place, tokens, thread)
        cute.arch.sync_threads()
        self.write_image(staged, image, place, thread)

    @cute.jit
    def clear(self, staged: cute.Tensor, thread: Int32):
        """Zeros under K and V, of which the padding stays."""
        chunks = cute.make_tensor(staged.iterator, cute.make_layout((16, self.tile.scale_offset // 16)))
        zeros = cute.make_rmem_tensor((16,), Uint8)
        zeros.fill(0)
        for i in range_constexpr(0, self.tile.scale_offset // 16, self.threads):
            if i + thread < self.tile.scale_offset // 16:
                cute.autovec_copy(zeros, chunks[None, i + thread])
        cute.arch.sync_threads()

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
        for start in range_constexpr(0, TILE_TOKENS, rows):
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
        bits = KEY_BITS[self.tile.keys]
        for i in range_constexpr(TILE_TOKENS // rows):
            local = i * rows + row
            inverse = inverses[local]
            if self.config.owns_channels(lane):
                for w in range_constexpr(bits // 4):
                    word = self.key_word(keys[i][32 // bits * w : 32 // bits * (w + 1)], inverse)
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
        if thread < TILE_TOKENS:
            token = groups((thread % members, thread // members))
            own, amax = peaks[token], Float32(0.0)
            for member in cutlass.range(members, unroll_full=True):
                peak = peaks[groups((member, thread // members))]
                amax = cute.arch.fmax(amax, select_(peak < Float32.inf, peak, Float32(0.0)))
            amax = Float32(select_(own < Float32.inf, amax, own))
            scale = scale_22_bits(symmetric_scale(amax, LEVELS[self.tile.keys]))
            scale = Float32(select_(token < tokens, scale, Float32(0.0)))
            scales[0, token] = scale
            scales[1, token] = Float32(-SCORE_MAGIC) * scale
            inverses[token] = inverse_scale(scale)

    def key_word(self, values: list[Float32], inverse: Float32) -> Int32:
        """Four bytes of one token of K."""
        inverses = [inverse] * len(values)
        return to_int4x8(values, inverses) if const_expr(self.tile.keys == "int4") else to_int8x4(values, inverses)

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
        for start in range_constexpr(0, TILE_TOKENS, self.tokens_per_word * self.rows_per_pass):
            local = start + thread // lanes * self.tokens_per_word
            if local < TILE_TOKENS:
                rows = [
                    self.load_token(v, place, local + i, channel, tokens, mean) for i in range(self.tokens_per_word)
                ]
                if self.config.owns_channels(lane):
                    for j in range_constexpr(VECTOR):
                        word = self.value_word([row[j] for row in rows], inverse[j])
                        store_word(staged, self.tile.v_offset, self.tile.v, (channel + j, local), word)

    def load_token(self, x: cute.Tensor, place, local: Int32, channel: Int32, tokens: Int32, mean) -> list[Float32]:
        """Eight channels of token ``local`` of the tile, minus their mean unless it is None; zeros past the end."""
        batch, head, tile = place
        inside = local < tokens
        # The last token is read in place of those past the end, the first one if there is none.
        token = cutlass.max(tile * TILE_TOKENS + cutlass.min(local, tokens - 1), 0)
        values = load_vector(x, (batch, head, token, channel), self.config.in_align)
        if const_expr(mean is not None):
            values = [value - of_channel for value, of_channel in zip(values, mean, strict=True)]
        return [Float32(select_(inside, value, Float32(0.0))) for value in values]

    def value_word(self, values: list[Float32], inverse: Float32) -> Int32:
        """One channel of V of neighbouring tokens, divided by its scale: four bytes or two float16."""
        if const_expr(self.tile.values == "float16"):
            return pack_f16x2(*(value * inverse for value in values))
        return to_int8x4(values, [inverse] * self.tokens_per_word)

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
