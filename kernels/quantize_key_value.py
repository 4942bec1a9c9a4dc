"""K and V of 64 tokens to one tile image: smoothed, quantised, permuted, transposed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8, const_expr, range_constexpr
from cutlass.cute.runtime import make_fake_stream
from cutlass.cutlass_dsl import select_

from .int8_rounding import absolute_max, inverse_scale, scale_22_bits, symmetric_scale, to_int8x4
from .ptx import pack_f16x2
from .rows import THREADS, VECTOR, QuantizerConfig, fake_tensor, load_vector
from .tile_image import SCORE_MAGIC, TILE_TOKENS, VALUE_BYTES, TileImage

__all__ = ["KeyValueTiles", "TilesConfig"]


@dataclass(frozen=True)
class TilesConfig:
    """quantizer: what all quantisers are compiled for. values: format of V in the image, "int8" or "float16"."""

    quantizer: QuantizerConfig
    values: str = "int8"


class KeyValueTiles:
    """Writes tile images, one CTA per (tile of 64 tokens, KV head, batch element).

    Called with k, v [B, Hkv, Sk, D] (any strides, head dim contiguous, Sk ≥ 1), k_mean, v_scale float32 [B, Hkv, D],
    and image uint8 [B, Hkv, ceil(Sk/64), TileImage.nbytes] (contiguous tiles, 16-byte aligned), which it fills; tokens
    from Sk on get zeros. K is quantised per token after its mean is subtracted, V by the scales it is given. |K − mean|
    up to 3.4e33 is in range: SCORE_MAGIC times its scale has to be finite.

    The image is put together in shared memory, so that global memory sees 16-byte reads (`in_align` permitting) and
    contiguous 16-byte writes, each byte once.
    """

    def __init__(self, config: TilesConfig):
        if reason := self.can_implement(config):
            raise ValueError(reason)
        self.config = config.quantizer
        self.tile = TileImage(config.quantizer.head_dim, config.values)
        self.tokens_per_word = 4 // VALUE_BYTES[config.values]

    @staticmethod
    def can_implement(config: TilesConfig) -> str | None:
        return config.quantizer.refusal() or TileImage.can_implement(config.quantizer.head_dim, config.values)

    def fake_arguments(self) -> tuple[Any, ...]:
        element = self.config.element_type
        inputs = [fake_tensor(element, 4) for _ in range(2)]
        statistics = [fake_tensor(Float32, 3, 16) for _ in range(2)]
        image = fake_tensor(Uint8, 4, 16)
        return (*inputs, *statistics, image, make_fake_stream(use_tvm_ffi_env_stream=True))

    @cute.jit
    def __call__(self, k, v, k_mean, v_scale, image, stream):
        grid = [image.shape[2], k.shape[1], k.shape[0]]
        self.kernel(k, v, k_mean, v_scale, image).launch(grid=grid, block=[THREADS, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, k: cute.Tensor, v: cute.Tensor, k_mean: cute.Tensor, v_scale: cute.Tensor, image: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        tile, head, batch = cute.arch.block_idx()
        smem = cutlass.memory.SmemAllocator()
        # The swizzle exchanges chunks by address bit 7, so planes start at multiples of 256 bytes.
        staged = smem.allocate_tensor(Uint8, cute.make_layout(self.tile.nbytes), 256)
        self.stage_keys(k, k_mean, staged, (batch, head, tile), thread)
        self.stage_values(v, v_scale, staged, (batch, head, tile), thread)
        cute.arch.sync_threads()
        self.write_image(staged, image, (batch, head, tile), thread)

    @cute.jit
    def stage_keys(self, k: cute.Tensor, k_mean: cute.Tensor, staged: cute.Tensor, place, thread: Int32):
        """Each token by D/8 neighbouring threads; its scale is a reduction over them."""
        batch, head, tile = place
        lanes, rows, align = self.config.lanes_per_row, self.config.rows_per_pass, self.config.in_align
        row, lane = thread // lanes, thread % lanes
        channel = lane * VECTOR
        last = k.shape[2] - 1
        mean = load_vector(k_mean, (batch, head, channel), 16)
        scales = cute.make_tensor(
            cute.recast_ptr(staged.iterator + self.tile.scale_offset, dtype=Float32), self.tile.scales.cute()
        )
        for start in range_constexpr(0, TILE_TOKENS, rows):
            local = start + row
            token = tile * TILE_TOKENS + local
            keys = load_vector(k, (batch, head, cutlass.min(token, last), channel), align)
            amax = Float32(0.0)
            for j in range_constexpr(VECTOR):
                keys[j] = Float32(select_(token <= last, keys[j] - mean[j], Float32(0.0)))
                amax = absolute_max(amax, keys[j])
            amax = cute.arch.warp_reduction(amax, absolute_max, threads_in_group=lanes)
            scale = scale_22_bits(symmetric_scale(amax))
            inverse = [inverse_scale(scale)] * 4
            words = [to_int8x4(keys[4 * w : 4 * w + 4], inverse) for w in range(2)]
            for w in range_constexpr(2):
                store_word(staged, self.tile.k_offset, self.tile.k, (local, channel + 4 * w), words[w])
            if lane == 0:
                scales[0, local] = scale
                scales[1, local] = Float32(-SCORE_MAGIC) * scale

    @cute.jit
    def stage_values(self, v: cute.Tensor, v_scale: cute.Tensor, staged: cute.Tensor, place, thread: Int32):
        """Eight channels of a word's tokens per thread, transposed in registers: a word is one channel."""
        batch, head, tile = place
        lanes, align = self.config.lanes_per_row, self.config.in_align
        channel = thread % lanes * VECTOR
        last = v.shape[2] - 1
        scale = load_vector(v_scale, (batch, head, channel), 16)
        inverse = [inverse_scale(s) for s in scale]
        for start in range_constexpr(0, TILE_TOKENS, self.tokens_per_word * self.config.rows_per_pass):
            local = start + thread // lanes * self.tokens_per_word
            if local < TILE_TOKENS:
                rows = []
                for i in range_constexpr(self.tokens_per_word):
                    token = tile * TILE_TOKENS + local + i
                    values = load_vector(v, (batch, head, cutlass.min(token, last), channel), align)
                    rows.append([Float32(select_(token <= last, value, Float32(0.0))) for value in values])
                for j in range_constexpr(VECTOR):
                    word = self.value_word([row[j] for row in rows], inverse[j])
                    store_word(staged, self.tile.v_offset, self.tile.v, (channel + j, local), word)

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
        for i in range_constexpr(0, self.tile.nbytes // 16, THREADS):
            chunk = i + thread
            if chunk < self.tile.nbytes // 16:
                cute.autovec_copy(source[None, chunk], target[None, chunk])


def store_word(staged: cute.Tensor, offset: int, layout, coordinate, word: Int32) -> None:
    """Four bytes at ``coordinate`` of an operand's layout, whose 16-byte chunks keep them together."""
    place = staged.iterator + (offset + cute.crd2idx(coordinate, layout.cute()))
    aligned = cute.make_ptr(Int32, place.toint(), cute.AddressSpace.smem, assumed_align=4)
    cute.make_tensor(aligned, cute.make_layout(1))[0] = word
