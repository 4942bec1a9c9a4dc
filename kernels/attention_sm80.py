"""Attention forward for the warp-MMA family: sm_80, sm_86, sm_89, and compiled also for sm_90a and sm_120a."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, const_expr

from .attention_arguments import HEAD_DIMS, OUT_DTYPES, attention_arguments
from .delta_source import DELTA_BYTES, DeltaSource
from .epilogue import Epilogue
from .head_views import head_channels, head_queries, head_rows
from .kv_pipeline import KvPipeline, SplitPipeline
from .mask import ScoreMask
from .operand_planes import lane_index, operand_planes
from .quantize_query import BLOCK_TOKENS
from .recipes import RECIPES
from .row_copy import RowCopy
from .row_scales import row_scales
from .sequence import SequenceBounds
from .tile_image import TILE_TOKENS
from .work_order import WorkOrder

__all__ = ["AttentionConfig", "AttentionSm80"]


@dataclass(frozen=True)
class AttentionConfig:
    """Static configuration: one compiled kernel per value.

    head_dim:  D, a multiple of 8 from 16 to 256
    out_dtype: "float16" or "bfloat16"
    causal:    query i sees keys up to i + seq_k - seq_q
    has_lse:   whether the log-sum-exp is written
    out_align: alignment in bytes of every row of the output, 16, 8, 4 or 2: the width of its stores
    warps, m_tiles, stages: warps per CTA, 16-row tiles of Q per warp, KV tiles in shared memory. With one stage K and V
               are loaded apart, which takes two barriers a tile
    l2_bytes:  heads are started in groups whose KV tiles fit in this many bytes of L2. 4 MiB fits the smallest chips of
               the family (3 to 6 MiB) together with Q and the output
    recipe, accumulate: a key of recipes.RECIPES
    smooth_q:   whether a tensor brings back what smoothing Q took off the scores
    smooth_v:   whether a tensor brings back V's mean
    varlen_k:   whether every batch element has its own number of keys, given by a tensor
    """

    head_dim: int
    out_dtype: str = "float16"
    causal: bool = False
    has_lse: bool = False
    out_align: int = 16
    warps: int = 4
    m_tiles: int = 2
    stages: int = 2
    l2_bytes: int = 4 << 20
    recipe: str = "int8"
    accumulate: str = "int32"
    smooth_q: bool = False
    smooth_v: bool = False
    varlen_k: bool = False


class AttentionSm80:
    """out = softmax(softmax_scale · q kᵀ) v by warp-level MMAs, from operands in the recipe's formats.

    A CTA of `warps` warps owns 16·m_tiles·warps query rows of one head and walks that head's KV tiles of 64 tokens from
    the last to the first. There are no specialised warps: every warp has its own rows and plays all roles in turn.

    Roles
        load      `load_queries` once; `KvPipeline`: whole tiles by cp.async, `stages` - 1 ahead; `SplitPipeline`;
                  `DeltaSource`: delta with them
        mma       `recipe.scores.multiply` (S = Q·Kᵀ), `recipe.softmax.accumulate` (O += P·V, row sums += P·1)
        softmax   `recipe.scores.dequantise`, `ScoreMask`, `recipe.softmax.update` and `.probabilities`
        epilogue  `Epilogue.store_output`, `Epilogue.store_lse`

    Tiles of recipe int8, CTA_Q = 128, D = 128 (lane = 4·g + t; layouts are shape:stride, swizzles on the byte address)
        tensor  memory     logical shape          layout                                  swizzle  owner, lifetime
        sQ      shared     (row, byte) (128,128)  (128,(32,4)):(32,(1,4096)), s8          <1,4,3>  CTA, whole kernel
        sK      shared     (token, dim) (64,128)  TileImage.k, s8                         <1,4,3>  CTA, one stage
        sV      shared     (channel, token)       TileImage.v, s8                         <1,4,3>  CTA, one stage
        sScale  shared     (2, token) (2,64)      (2,64):(64,1), f32                      none     CTA, one stage
        S       registers  (32, 64) per warp      ((2,2),2,8), s32 read as f32: 64        -        warp, one tile
        P       registers  (32, 64) per warp      ((4,2,2),2,2), u8: 16                   -        warp, one tile
        O       registers  (32, 128) per warp     ((2,2),2,16), s32: 128                  -        warp, whole kernel
        sums    registers  (32) per warp          ((2,2)), s32: 4                         -        warp, whole kernel
    Shared memory: 16 KiB of Q and two stages of 16.5 KiB, 49 KiB: two CTAs share a multiprocessor of sm_86 and sm_89.

    One KV tile of recipe int8 (the others: `recipes.RECIPES`)
        wait, barrier   this tile has arrived, and the stage of the previous one is free: request the next into it
        S = Q·Kᵀ        64 IMMA, Q and K by ldmatrix.x4, started at 0x4B400000 so that no I2F follows
        y = S·c         one FFMA a score, one FMNMX for the lane's row maxima. With delta one more FFMA, y·row_scale +
                        delta, and the softmax's own row scale is the same for all rows
        vote            does any score of the warp pass its row's limit? Seldom after the first tiles: then (and only
                        then) shuffles, a new integer maximum, and O and sums shifted right
        P = u8(2^x)     FFMA, MUFU.EX2, and 1.25 slots of packing per four
        O += P·V        64 IMMA; P is S's registers, lane by lane, because K's rows are permuted in the image
        sums += P·1     4 IMMA with a matrix of ones: the row sums of the very P that is used, and no additions

    Registers are what shapes this: there O, S and sums take 196 of 255, so K's and V's fragments, the row state and
    every address share the other 59. Hence one register per operand with immediates behind it, the tile as one linear
    block, a rescale block that is rarely entered, and masks in a loop of their own. What bounds it: the tensor pipe,
    16.5 cycles of an sm_80 sub-partition per 32 scores, against 9.2 issue slots (12.4 in tiles that rescale), 8 cycles
    of the XU pipe (2^x alone) and 12.2 of the shared memory pipe. 16-row warps would load K and V twice as often and be
    bound by shared memory.
    """

    def __init__(self, config: AttentionConfig):
        if reason := self.can_implement(config):
            raise ValueError(reason)
        self.config = config
        self.recipe = RECIPES[config.recipe, config.accumulate]
        self.image = self.recipe.image(config.head_dim)
        self.threads = 32 * config.warps
        self.rows = 16 * config.m_tiles * config.warps
        self.q_planes = operand_planes(self.rows, self.image.key_bytes)
        self.q_bytes = self.rows * self.image.key_bytes
        self.delta_blocks = -(-self.rows // BLOCK_TOKENS) if config.smooth_q else 0
        self.stage_bytes = self.image.nbytes + self.delta_blocks * DELTA_BYTES
        self.shared_bytes = self.q_bytes + config.stages * self.stage_bytes

    ptxas_levels = (3, 1)
    """Optimisation levels of the assembler, in the order in which they are tried until nothing is spilled.

    At its default, level 3, ptxas 12.9 moves loads so far up, for registers that are not there, that in many main loops
    of head dim 96 and more, and with INT4 or delta in most, one to eighty registers are spilled, by no rule that could
    be seen; with O in float32 it sometimes gives up and allocates 32. Level 2 does so elsewhere. At level 1 none is
    spilled, and 32-row warps of `int8` at head dim 128 fit sm_120a too; an iteration issues as many instructions within
    2 %, but loads run ahead of their MMAs by half as much.
    """

    @staticmethod
    def can_implement(config: AttentionConfig) -> str | None:
        """None, or why there is no kernel of this configuration."""
        allowed = {
            "recipe": tuple(dict.fromkeys(name for name, _ in RECIPES)),
            "accumulate": tuple(how for name, how in RECIPES if name == config.recipe),
            "out_dtype": tuple(OUT_DTYPES),
            "out_align": (16, 8, 4, 2),
            "warps": (1, 2, 4, 8),
            "m_tiles": (1, 2),
            "stages": (1, 2, 3, 4),
        }
        if config.head_dim not in HEAD_DIMS:
            return f"head_dim={config.head_dim!r} is not a multiple of 8 from 16 to 256"
        for field, values in allowed.items():
            if getattr(config, field) not in values:
                return f"{field}={getattr(config, field)!r} is not one of {', '.join(map(str, values))}"
        recipe = RECIPES[config.recipe, config.accumulate]
        if (config.smooth_q or config.smooth_v) and not recipe.quantised:
            return f"recipe={config.recipe!r} smooths nothing, because it quantises nothing"
        if config.smooth_q and not recipe.takes_delta:
            return f"recipe={config.recipe!r} does not smooth Q; use 'int8_fp8'"
        return None

    def fake_arguments(self) -> tuple[Any, ...]:
        """Tensors without memory, scalars and stream that stand for `__call__`'s arguments while compiling."""
        c = self.config
        which = {"has_lse": c.has_lse, "smooth_q": c.smooth_q, "smooth_v": c.smooth_v, "varlen_k": c.varlen_k}
        return attention_arguments(self.recipe, self.image, c.head_dim, c.out_dtype, c.out_align, **which)

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        q_scale: cute.Tensor | None,
        q_bias: cute.Tensor | None,
        keys: cute.Tensor,
        values: cute.Tensor,
        delta: cute.Tensor | None,
        v_mean: cute.Tensor | None,
        key_lengths: cute.Tensor | None,
        out: cute.Tensor,
        lse: cute.Tensor | None,
        seq_k: Int32,
        softmax_scale_log2: Float32,
        stream: Any,
    ):
        """Launch.

        Query head h reads KV head h // (Hq/Hkv). With a recipe that quantises:
            q:       bytes as int8 [B, Hq, Sq, `image.key_bytes`], zeros past D; compact, as q_scale and q_bias (float32
                     [B, Hq, Sq])
            q_scale: factor from elements to Q
            q_bias:  q · mean(K), what smoothing took off the scores before softmax_scale; goes into the LSE. A row
                     whose scale or bias is not finite becomes NaN, and no other row does
            keys:    uint8 [B, Hkv, T, bytes], compact: the recipe's KV tile images
            values:  float32 [B, Hkv, D], compact: factor to V
        Without:
            q, keys, values: 16-bit floats [B, H, S, D], any strides with contiguous rows aligned to 16 bytes
            q_scale, q_bias: None

        delta:    float32 [B, Hq, ceil(Sq/128), T·64], compact: one row for a block of query rows, added to their
                  q · (k - mean(K)), in natural token order; None unless `smooth_q`
        v_mean:   float32 [B, Hkv, D], compact: added to the output of rows that see a key; None unless `smooth_v`
        key_lengths: int32 [B], keys of each batch element, as if clamped to 0 … seq_k; None unless `varlen_k`: all have
                  seq_k
        out:      [B, Hq, Sq, D], any strides with contiguous rows aligned to `out_align` bytes
        lse:      float32 [B, Hq, Sq], compact, natural logarithm, -inf for rows without keys; None unless `has_lse`
        seq_k:    keys, T = ceil(seq_k / 64) tiles; the largest number of keys that `key_lengths` may give
        softmax_scale_log2: softmax_scale · log2(e), >= 0
        """
        batch, heads, seq_q, _ = q.shape
        head_bytes = Int64(cutlass.max(cute.ceil_div(seq_k, TILE_TOKENS), 1)) * self.image.nbytes
        blocks = cute.ceil_div(seq_q, self.rows)
        order = WorkOrder.create(batch * heads, blocks, head_bytes, self.config.l2_bytes)
        self.kernel(
            q, q_scale, q_bias, keys, values, delta, v_mean, key_lengths, out, lse, seq_k, softmax_scale_log2
        ).launch(grid=order.grid, block=(self.threads, 1, 1), smem=self.shared_bytes, stream=stream)

    @cute.kernel
    def kernel(
        self,
        q: cute.Tensor,
        q_scale: cute.Tensor | None,
        q_bias: cute.Tensor | None,
        keys: cute.Tensor,
        values: cute.Tensor,
        delta: cute.Tensor | None,
        v_mean: cute.Tensor | None,
        key_lengths: cute.Tensor | None,
        out: cute.Tensor,
        lse: cute.Tensor | None,
        seq_k: Int32,
        softmax_scale_log2: Float32,
    ):
        batch, heads, seq_q, _ = q.shape
        head, block = WorkOrder.at_grid(*cute.arch.block_idx(), last_first=self.config.causal)
        row_begin = block * self.rows
        if head < batch * heads:
            kv_head = head // (heads // keys.shape[1])
            if const_expr(key_lengths is not None):
                seq_k = cutlass.max(cutlass.min(key_lengths[head // heads], seq_k), 0)
            bounds = SequenceBounds(seq_q, seq_k, row_begin, self.rows, TILE_TOKENS, self.config.causal)
            tiles = bounds.tiles()
            shared = cute.arch.get_dyn_smem(Uint8, alignment=1024)
            self.load_queries(head_queries(q, head, compact=self.recipe.quantised), shared, bounds)
            source = self.recipe.source(keys, values, kv_head, tiles, seq_k, self.image, self.threads)
            if const_expr(delta is not None):
                source = DeltaSource.create(source, delta, head, row_begin, self.delta_blocks, tiles)
            pipeline = self.pipeline(source, shared + self.q_bytes)
            pipeline.start(tiles)
            scales, biases, channels = None, None, (None, None)
            if const_expr(self.recipe.quantised):
                scales, biases = head_rows(q_scale, head), head_rows(q_bias, head)
                channels = (head_channels(values, kv_head), head_channels(v_mean, kv_head))
            softmax = self.attend(pipeline, bounds, shared, scales, softmax_scale_log2)
            query = (scales, biases, softmax_scale_log2)
            epilogue = Epilogue(softmax, bounds, query, self.warp_row(), self.image, self.config.m_tiles)
            epilogue.store_output(out[head // heads, head % heads, None, None], channels)
            if const_expr(lse is not None):
                epilogue.store_lse(head_rows(lse, head))

    def pipeline(self, source: Any, ring: cute.Pointer) -> KvPipeline | SplitPipeline:
        """How KV tiles from ``source`` come to shared memory, `stages` tiles at ``ring``."""
        if self.config.stages == 1:
            return SplitPipeline(source, ring)
        return KvPipeline.create(source, ring, self.stage_bytes, self.config.stages)

    def warp_row(self) -> Int32:
        """First of the warp's rows, relative to the CTA's first row."""
        return cute.arch.thread_idx()[0] // 32 * (16 * self.config.m_tiles)

    def lane_row(self, bounds: SequenceBounds) -> Int32:
        """Query of this lane's accumulator row 0; row r is 8·r further."""
        return bounds.row_begin + self.warp_row() + lane_index() // 4

    @cute.jit
    def load_queries(self, q: cute.Tensor, shared: cute.Pointer, bounds: SequenceBounds):
        """Rows of Q [Sq, D] -> planes in shared memory, zeros past the last one."""
        element_bytes = self.recipe.query_bytes
        copy = RowCopy.create(self.q_planes, element_bytes * q.shape[1], self.threads)
        step = Int64(q.stride[0]) * element_bytes
        first = bounds.row_begin + copy.row
        copy.copy(shared, q.iterator.toint() + first * step + copy.byte, step, bounds.seq_q - first)

    @cute.jit
    def attend(
        self,
        pipeline: KvPipeline | SplitPipeline,
        bounds: SequenceBounds,
        shared: cute.Pointer,
        scales: cute.Tensor | None,
        softmax_scale_log2: Float32,
    ) -> Any:
        """Visit the KV tiles from the last to the first; returns the softmax's final state.

        Two loops with the same body: the tiles that need a mask, at most one per 64 rows and one more, and the steady
        loop over all others, which has no instruction for masks. Chunks of tiles bound what integers can
        grow by; floats need none.
        """
        m_tiles = self.config.m_tiles
        scores = self.recipe.scores(shared, self.q_planes, self.warp_row(), bounds.seq_q >> 31, self.image, m_tiles)
        row = self.lane_row(bounds)
        if const_expr(self.config.smooth_q):  # Q's scales must be in the scores that meet the row of delta
            block = 0 if const_expr(self.delta_blocks == 1) else self.warp_row() // BLOCK_TOKENS
            scores = scores.with_delta(row_scales(scales, bounds, row, 2 * m_tiles, Float32(1)), block)
            scales = None
        row_scale = row_scales(scales, bounds, row, 2 * m_tiles, softmax_scale_log2)
        softmax = self.recipe.softmax(row_scale, self.image, m_tiles)
        mask = ScoreMask.create(bounds, row, lane_index() % 4, self.image.score_tokens)
        tiles, full = bounds.tiles(), bounds.full_tiles()
        tile = tiles
        while tile > full:  # counted like this, ptxas finds registers for everything
            tile = tile - 1
            self.visit(tile, pipeline, scores, softmax, mask)
        if const_expr(softmax.chunk_tiles is None):
            for i in cutlass.range(full, unroll=1):
                self.visit(full - 1 - i, pipeline, scores, softmax, None)
        else:
            for chunk in cutlass.range((full + (softmax.chunk_tiles - 1)) // softmax.chunk_tiles, unroll=1):
                end = full - chunk * softmax.chunk_tiles
                softmax.bound_sums()
                for i in cutlass.range(cutlass.min(end, softmax.chunk_tiles), unroll=1):
                    self.visit(end - 1 - i, pipeline, scores, softmax, None)
        return softmax

    @cute.jit
    def visit(
        self,
        tile: Int32,
        pipeline: KvPipeline | SplitPipeline,
        scores: Any,
        softmax: Any,
        mask: ScoreMask | None,
    ):
        """One KV tile: S = Q·Kᵀ, mask, maximum, P = 2^(S - m), O += P·V."""
        stage = pipeline.next_tile(tile)
        accumulators = scores.multiply(stage)
        here = mask.at(tile * TILE_TOKENS) if const_expr(mask is not None) else None
        y, maxima = scores.dequantise(accumulators, stage, here)
        softmax.update(maxima)
        p = softmax.probabilities(y)
        pipeline.await_values(tile)
        softmax.accumulate(p, stage)
