"""Attention forward for the warp-MMA family: sm_80, sm_86, sm_89, and compiled also for sm_90a and sm_120a."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int8, Int32, Int64, Uint8, const_expr, range_constexpr
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from .kv_pipeline import KvPipeline
from .mask import ScoreMask
from .operand_planes import a_fragment_row, b_fragment_row, operand_planes
from .ptx import cp_async_zfill
from .scores_int8 import Int8Scores
from .sequence import SequenceBounds
from .softmax_int8 import IntegerSoftmax
from .tile_image import TILE_TOKENS, TileImage

__all__ = ["AttentionConfig", "AttentionSm80"]

_OUT_DTYPES = {"float16": Float16, "bfloat16": BFloat16}

_LN2 = 0.6931471805599453

# Keeps -inf · row_scale away from NaN, also in rows of zeros and in those that end as NaN.
_SMALLEST_ROW_SCALE = float(2**-100)


@dataclass(frozen=True)
class AttentionConfig:
    """Static configuration: one compiled kernel per value.

    head_dim:  32, 64 or 128
    out_dtype: "float16" or "bfloat16"
    causal:    query i sees keys up to i + seq_k - seq_q
    has_lse:   whether the log-sum-exp is written
    out_align: alignment in bytes of every row of the output, 16, 8, 4 or 2: the width of its stores
    warps, m_tiles, stages: warps per CTA, 16-row tiles of Q per warp, KV tiles in shared memory
    l2_bytes:  heads are started in groups whose KV tiles fit in this many bytes of L2. 4 MiB fits the smallest chips of
               the family (3 to 6 MiB) together with Q and the output
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


class AttentionSm80:
    """out = softmax(softmax_scale · q kᵀ) v from INT8 operands, one CTA per block of query rows and head."""

    def __init__(self, config: AttentionConfig):
        if reason := self.can_implement(config):
            raise ValueError(reason)
        self.config = config
        self.image = TileImage(config.head_dim)
        self.threads = 32 * config.warps
        self.rows = 16 * config.m_tiles * config.warps
        self.q_planes = operand_planes(self.rows, config.head_dim)
        self.q_bytes = self.rows * config.head_dim
        self.shared_bytes = self.q_bytes + config.stages * self.image.nbytes

    @staticmethod
    def can_implement(config: AttentionConfig) -> str | None:
        """None, or why there is no kernel of this configuration."""
        allowed = {
            "head_dim": (32, 64, 128),
            "out_dtype": tuple(_OUT_DTYPES),
            "out_align": (16, 8, 4, 2),
            "warps": (1, 2, 4, 8),
            "m_tiles": (1, 2),
            "stages": (2, 3, 4),
        }
        for field, values in allowed.items():
            if getattr(config, field) not in values:
                return f"{field}={getattr(config, field)!r} is not one of {', '.join(map(str, values))}"
        return None

    def fake_arguments(self) -> tuple[Any, ...]:
        """Tensors without memory, scalars and stream that stand for `__call__`'s arguments while compiling."""
        c = self.config
        batch, heads, kv_heads, seq_q, tiles = (cute.sym_int32() for _ in range(5))

        def compact(dtype: Any, shape: tuple[Any, ...], align: int) -> Any:
            order = tuple(reversed(range(len(shape))))
            return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)

        out = make_fake_tensor(
            _OUT_DTYPES[c.out_dtype],
            (batch, heads, seq_q, c.head_dim),
            (*(cute.sym_int64(divisibility=c.out_align // 2) for _ in range(3)), 1),
            assumed_align=c.out_align,
        )
        return (
            compact(Int8, (batch, heads, seq_q, c.head_dim), 16),
            compact(Float32, (batch, heads, seq_q), 4),
            compact(Float32, (batch, heads, seq_q), 4),
            compact(Uint8, (batch, kv_heads, tiles, self.image.nbytes), 16),
            compact(Float32, (batch, kv_heads, c.head_dim), 16),
            out,
            compact(Float32, (batch, heads, seq_q), 4) if c.has_lse else None,
            Int32(0),
            Float32(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        q_scale: cute.Tensor,
        q_bias: cute.Tensor,
        image: cute.Tensor,
        v_scale: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor | None,
        seq_k: Int32,
        softmax_scale_log2: Float32,
        stream: Any,
    ):
        """See `AttentionConfig` for what is static."""
        batch, heads, seq_q, _ = q.shape
        all_heads = batch * heads
        head_bytes = cutlass.max(image.shape[2], 1) * self.image.nbytes
        together = cutlass.min(cutlass.max(self.config.l2_bytes // head_bytes, 1), all_heads)
        grid = (together, cute.ceil_div(seq_q, self.rows), cute.ceil_div(all_heads, together))
        self.kernel(q, q_scale, q_bias, image, v_scale, out, lse, seq_k, softmax_scale_log2).launch(
            grid=grid, block=(self.threads, 1, 1), smem=self.shared_bytes, stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        q: cute.Tensor,
        q_scale: cute.Tensor,
        q_bias: cute.Tensor,
        image: cute.Tensor,
        v_scale: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor | None,
        seq_k: Int32,
        softmax_scale_log2: Float32,
    ):
        batch, heads, seq_q, head_dim = q.shape
        head, row_begin = self.assignment()
        if head < batch * heads:
            kv_head = head // (heads // image.shape[1])
            bounds = SequenceBounds(seq_q, seq_k, row_begin, self.rows, TILE_TOKENS, self.config.causal)
            first_row = Int64(head) * seq_q
            rows = cute.make_layout(seq_q)
            scale_rows = cute.make_tensor(q_scale.iterator + first_row, rows)
            bias_rows = cute.make_tensor(q_bias.iterator + first_row, rows)
            lse_rows = cute.make_tensor(lse.iterator + first_row, rows) if const_expr(lse is not None) else None

            shared = cute.arch.get_dyn_smem(Uint8, alignment=1024)
            self.load_queries(q.iterator + first_row * head_dim, shared, bounds)
            tiles = bounds.tiles()
            last_tile = Int64(kv_head) * image.shape[2] + (tiles - 1)
            thread = cute.arch.thread_idx()[0]
            pipeline = KvPipeline.create(
                image.iterator + last_tile * self.image.nbytes,
                shared + self.q_bytes,
                thread,
                self.image.nbytes,
                self.config.stages,
                self.threads,
            )
            pipeline.start(tiles)
            softmax = self.walk(pipeline, bounds, scale_rows, softmax_scale_log2, shared)
            v_scales = cute.make_tensor(v_scale.iterator + Int64(kv_head) * head_dim, cute.make_layout(head_dim))
            self.epilogue(
                softmax,
                bounds,
                out[head // heads, head % heads, None, None],
                v_scales,
                scale_rows,
                bias_rows,
                lse_rows,
                softmax_scale_log2,
            )

    def assignment(self) -> tuple[Int32, Int32]:
        """(batch·heads + head, first query row) of this CTA.

        Blocks start in the order x, y, z: the heads of an L2-sized group, longest rows first if causal, group by group.
        """
        x, y, z = cute.arch.block_idx()
        group, blocks, _ = cute.arch.grid_dim()
        block = blocks - 1 - y if self.config.causal else y
        return z * group + x, block * self.rows

    @cute.jit
    def load_queries(self, q: cute.Pointer, shared: cute.Pointer, bounds: SequenceBounds):
        """Rows of Q -> planes in shared memory, zeros for rows that do not exist; 16 bytes a thread and round."""
        thread = cute.arch.thread_idx()[0]
        row_bytes = self.config.head_dim
        chunks = row_bytes // 16
        row, byte = thread // chunks, thread % chunks * 16
        planes = self.q_planes.cute()
        for i in range_constexpr(self.rows * chunks // self.threads):
            r = row + i * (self.threads // chunks)
            valid = Int32(16) if bounds.row_begin + r < bounds.seq_q else Int32(0)
            source = q + (Int64(bounds.row_begin + r) * row_bytes + byte)
            cp_async_zfill(shared + planes((r, byte)), source, valid)

    def lane_row(self) -> Int32:
        """First of this lane's accumulator rows, relative to the CTA's first row."""
        thread = cute.arch.thread_idx()[0]
        return thread // 32 * (16 * self.config.m_tiles) + thread % 32 // 4

    @cute.jit
    def walk(
        self,
        pipeline: KvPipeline,
        bounds: SequenceBounds,
        scale_rows: cute.Tensor,
        softmax_scale_log2: Float32,
        shared: cute.Pointer,
    ):
        """Visit the KV tiles from the last to the first: those that need a mask, then the others, 256 at a time."""
        c = self.config
        thread = cute.arch.thread_idx()[0]
        lane = thread % 32
        row = bounds.row_begin + self.lane_row()
        row_scale = cute.make_rmem_tensor((2 * c.m_tiles,), Float32)
        for r in range_constexpr(2 * c.m_tiles):
            row_scale[r] = Float32(0)
            if row + 8 * r < bounds.seq_q:
                factor = scale_rows[row + 8 * r] * softmax_scale_log2
                row_scale[r] = factor if factor < Float32.inf else Float32(0)
            row_scale[r] = cute.arch.fmax(row_scale[r], Float32(_SMALLEST_ROW_SCALE))
        warp_row, byte = a_fragment_row(lane)
        query = shared + cute.assume(self.q_planes.cute()((thread // 32 * (16 * c.m_tiles) + warp_row, byte)), divby=16)
        scores = Int8Scores.create(
            cute.recast_ptr(query, dtype=Int8), bounds.seq_q >> 31, self.image, c.m_tiles, 32 * self.rows
        )
        softmax = IntegerSoftmax.create(row_scale, lane, self.image, c.m_tiles)
        b_row = cute.assume(operand_planes(64, 32).cute()(b_fragment_row(lane)), divby=16)
        tiles, full = bounds.tiles(), bounds.full_tiles()
        for i in cutlass.range(tiles - full, unroll=1):
            self.attend(tiles - 1 - i, pipeline, scores, softmax, True, bounds, b_row, lane)
        for chunk in cutlass.range((full + 255) // 256, unroll=1):
            end = full - chunk * 256
            softmax.bound_sums()
            for i in cutlass.range(cutlass.min(end, 256), unroll=1):
                self.attend(end - 1 - i, pipeline, scores, softmax, False, bounds, b_row, lane)
        return softmax

    @cute.jit
    def attend(
        self,
        tile: Int32,
        pipeline: KvPipeline,
        scores: Int8Scores,
        softmax: IntegerSoftmax,
        masked: cutlass.Constexpr[bool],
        bounds: SequenceBounds,
        b_row,
        lane,
    ):
        stage = pipeline.next_tile(tile)
        keys = cute.recast_ptr(stage + b_row, dtype=Int8)
        scales = cute.recast_ptr(stage + cute.assume(self.image.scale_offset + lane % 4 * 16, divby=16), dtype=Float32)
        accumulators = scores.multiply(keys)
        mask = None
        if const_expr(masked):
            row = bounds.row_begin + self.lane_row()
            mask = ScoreMask.create(bounds, row, lane % 4, tile * TILE_TOKENS, self.image.score_tokens)
        y, maxima = scores.dequantise(accumulators, scales, mask)
        softmax.update(maxima)
        softmax.accumulate(softmax.probabilities(y), keys + self.image.v_offset)

    @cute.jit
    def epilogue(
        self,
        softmax: IntegerSoftmax,
        bounds: SequenceBounds,
        out: cute.Tensor,
        v_scales: cute.Tensor,
        scale_rows: cute.Tensor,
        bias_rows: cute.Tensor,
        lse_rows,
        softmax_scale_log2: Float32,
    ):
        c = self.config
        lane = cute.arch.thread_idx()[0] % 32
        for r in range_constexpr(2 * c.m_tiles):
            row = bounds.row_begin + self.lane_row() + 8 * r
            if row < bounds.seq_q:
                bias = bias_rows[row]
                poison = (scale_rows[row] - scale_rows[row]) + (bias - bias)
                total, log2_total = softmax.row_totals(r)
                if const_expr(lse_rows is not None):  # noqa: SIM102 (decided while tracing, the inner one is not)
                    if lane % 4 == 0:
                        lse_rows[row] = (log2_total + softmax_scale_log2 * bias) * _LN2 + poison
                inverse = Float32(0)
                if total > 0.0:
                    inverse = cute.math.rcp(total, approx=True, ftz=True)
                inverse = inverse + poison
                for g in range_constexpr(c.head_dim // 32):
                    position = 4 * g + lane % 4
                    scale = cute.make_rmem_tensor((8,), Float32)
                    values = cute.make_rmem_tensor((8,), _OUT_DTYPES[c.out_dtype])
                    cute.autovec_copy(cute.local_tile(v_scales, (8,), (position,)), scale)
                    for n in range_constexpr(4):
                        for e in range_constexpr(2):
                            o = softmax.output[(e, r % 2), r // 2, 4 * g + n].to(Float32)
                            values[2 * n + e] = (o * inverse * scale[2 * n + e]).to(values.element_type)
                    cute.autovec_copy(values, cute.local_tile(out[row, None], (8,), (position,)))
