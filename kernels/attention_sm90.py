"""Attention forward for Hopper, sm_90a: warp-specialised, by warpgroup MMAs on tile images of 128 tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int8, Int32, Int64, Uint8, const_expr, range_constexpr
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from .epilogue import Epilogue
from .kv_ring import KvRing
from .mask import ScoreMask
from .operand_planes import lane_index, operand_planes
from .ptx import opaque
from .row_copy import RowCopy
from .scores_warpgroup import SMALLEST_FACTOR
from .sequence import SequenceBounds
from .softmax_warpgroup import value_parts
from .warpgroup_mma import ROWS
from .warpgroup_recipes import LOG_LINEAR_RECIPES, TILE_TOKENS, WARPGROUP_RECIPES

__all__ = ["HEAD_DIMS", "TILE_TOKENS", "AttentionSm90", "AttentionSm90Config"]

HEAD_DIMS = range(16, 257, 8)
"""Head dims that there are kernels for."""

_OUT_DTYPES = {"float16": Float16, "bfloat16": BFloat16}

_WARPGROUP = 128

# Registers a thread: the 65536 of a multiprocessor over the threads, in steps of 8. The producer needs few, and gives
# the others up: by consumer warpgroups, 24 · 128 + registers · 128 · warpgroups <= 65536.
_PRODUCER_REGISTERS = 24
_CONSUMER_REGISTERS = {1: 240, 2: 240, 3: 160}

# CUDA C++ Programming Guide, technical specifications: dynamic shared memory of a CTA, and the grid.
_SHARED_BYTES = 227 * 1024
_LARGEST_GRID_Z = 65535


@dataclass(frozen=True)
class AttentionSm90Config:
    """Static configuration: one compiled kernel per value.

    head_dim:  D, a multiple of 8 from 16 to 256
    out_dtype: "float16" or "bfloat16"
    causal:    query i sees keys up to i + seq_k - seq_q
    has_lse:   whether the log-sum-exp is written
    out_align: alignment in bytes of every row of the output, 16, 8, 4 or 2: the width of its stores
    warpgroups, stages: consumer warpgroups of 64 query rows per CTA, KV tiles in shared memory; in recipes fp16 and
               bf16, whose K and V take turns, tiles of K or V
    l2_bytes:  heads are started in groups whose KV tiles fit in this many bytes of L2: half of the 50 MB of an H100,
               whose other half is far
    recipe, accumulate, exponent: as of cute_attn.Recipe
    k_scale_per_token: whether every token of K has a scale of its own, which costs a multiplication per score;
               otherwise the tokens {16i + 4t … + 3} of a tile share theirs, for each t
    fma_eighths: of every eight 2^x how many the FMA pipe computes instead of the XU pipe, within 0.18 %: for E4M3
               values, which round P by up to 6 %. With exponent "fast" there are none
    smooth_v:  whether a tensor brings back V's mean
    varlen_k:  whether every batch element has its own number of keys, given by a tensor
    """

    head_dim: int
    out_dtype: str = "float16"
    causal: bool = False
    has_lse: bool = False
    out_align: int = 16
    warpgroups: int = 3
    stages: int = 4
    l2_bytes: int = 25 << 20
    recipe: str = "int8_fp8"
    accumulate: str = "float32+float32"
    exponent: str = "exact"
    k_scale_per_token: bool = False
    fma_eighths: int = 0
    smooth_v: bool = False
    varlen_k: bool = False


class AttentionSm90:
    """out = softmax(softmax_scale · q kᵀ) v by warpgroup MMAs, from operands in the recipe's formats.

    A CTA owns 64·`warpgroups` query rows of one head and walks that head's KV tiles of 128 tokens from the last to the
    first. One warp brings the tiles; each consumer warpgroup has 64 rows and plays all other roles in turn. The
    warpgroups are not in step: while one waits for its MMAs, the softmax of the others keeps the other pipes busy.

    Warp roles
        producer   one warp of the last warpgroup: `KvRing.produce` from `recipe.source`, up to `stages` ahead: one bulk
                   copy a tile image (`TileImages`), a TMA copy for 64 channels of K or V (`TensorTiles`)
        consumers  load      `load_queries`, once
                   mma       `recipe.scores.multiply` (S = Q·Kᵀ), `recipe.softmax.accumulate` (O += P·V, P·1)
                   softmax   `recipe.scores.dequantise`, `ScoreMask`, `recipe.softmax.update`, `.probabilities`
                   epilogue  `Epilogue.store_output`, `Epilogue.store_lse`
    A warp's share of its warpgroup's rows is 16; what a lane holds is what it holds of an m16n8 MMA.

    Barriers
        full[stage]   mbarrier; 1 arrival, the producer's, and the tile's bytes
        empty[stage]  mbarrier; 4·`warpgroups` arrivals, one of each consumer warp
        0             all threads: the mbarriers are initialised
        1 + w         the 128 threads of consumer warpgroup w: its rows of Q are in shared memory

    Tiles of recipe int8_fp8, three warpgroups, D = 128 (lane = 4·g + t; layouts are shape:stride, swizzles on the byte
    address)
        tensor  memory     logical shape            layout                                swizzle  owner, lifetime
        sQ      shared     (row, byte) (64,128)     (64,(32,4)):(32,(1,2048)), s8         <1,4,3>  warpgroup, kernel
        sK      shared     (token, dim) (128,128)   TileImage.k, s8                       <1,4,3>  CTA, one stage
        sV      shared     (channel, token)         TileImage.v and .ones, e4m3           <1,4,3>  CTA, one stage
        sScale  shared     (1, token) (1,128)       (1,128):(128,1), f32                  none     CTA, one stage
        S       registers  (64, 128) per warpgroup  ((2,2),16), s32: 64                   -        lane, one tile
        P       registers  (64, 128) per warpgroup  ((4,2,2),1,4), e4m3: 16               -        lane, one tile
        PV      registers  (64, 136) per warpgroup  ((2,2,17),1,1), f32: 68               -        lane, one tile
        O       registers  (64, 136) per warpgroup  ((2,2),1,17), f32: 68                 -        lane, whole kernel
    Shared memory: 24 KiB of Q and four stages of 33.5 KiB.

    To the tensor cores a plane of 32 bytes a row is a K-major operand with the 32-byte swizzle: every eight rows are
    256 bytes, and a plane is the k of one instruction. Neither Q, K nor V is ever read by a thread.

    One KV tile of recipe int8_fp8 (the others: `WARPGROUP_RECIPES`)
        wait            the tile has arrived
        S = Q·Kᵀ        4 IGMMA, both operands from shared memory; then wait for them
        maximum         half a VIMNMX3 a score, of the integers
        vote            does any score of the warp pass what its row's maximum covers? Seldom after the first tiles:
                        then (and only then) shuffles, a new integer maximum, and O multiplied by a power of two
        P = e4m3(2^x)   I2FP, FFMA, MUFU.EX2, half an F2FP. K's and Q's scales are one factor of the FFMA: a lane's
                        tokens of a tile have one scale
        PV = P·V, P·1   4 QGMMA with P from registers, S's order being A's because K's rows are permuted in the image;
                        the rows of ones behind V make row sums. Then wait for them
        O += PV         one FADD an accumulator: the tensor cores keep too few bits to sum more than one tile
        arrive          the stage may be filled again

    What bounds it, in cycles of a sub-partition per 32 scores: the tensor pipe 8.25, the XU pipe 8.0 (2^x alone), issue
    6.5 slots, and what a warp waits for in between: three warps a sub-partition take turns. Registers are the other
    bound: three warpgroups leave 160 a thread, of which O, PV and P take 152.

    Recipes fp16 and bf16 read the caller's K and V as they are (`SwizzledTile`): no permutations, V MN-major, no rows
    of ones, O summed in place. K and V take turns in the ring, so that K's stage is free as soon as S is there. Row
    sums are additions of the rounded P. The tensor pipe, 16 cycles per 32 scores, is what bounds them.
    """

    def __init__(self, config: AttentionSm90Config):
        if reason := self.can_implement(config):
            raise ValueError(reason)
        self.config = config
        self.recipe = (LOG_LINEAR_RECIPES if config.exponent == "fast" else WARPGROUP_RECIPES)[config.recipe]
        self.image = self.recipe.image(config.head_dim)
        self.stage_bytes = self.image.nbytes // self.recipe.turns
        self.rows = ROWS * config.warpgroups
        self.consumers = _WARPGROUP * config.warpgroups
        self.threads = self.consumers + _WARPGROUP
        self.q_planes = operand_planes(ROWS, self.image.key_bytes)
        self.q_bytes = ROWS * self.image.key_bytes
        self.shared_bytes = _shared_bytes(config)

    ptxas_levels = (3, 1, 3)
    """Optimisation levels of the assembler, in the order in which they are tried until nothing is spilled.

    With E4M3 keys and a scale per token, level 3 spills a dozen registers at head dim 128, and level 1 none. E4M3
    values of more than 192 channels are spilled by both, at level 3 two registers of tiles with a mask.
    """

    @property
    def keeps_shared_address(self) -> bool:
        """Whether shared memory's address is in a register, which saves up to a quarter of a slot per 32 scores.

        Beside sums of one tile and the causal limit there is none left: ptxas would make every score twice there.
        """
        return not (self.config.causal and self.config.accumulate == "float32+float32")

    @staticmethod
    def can_implement(config: AttentionSm90Config) -> str | None:
        """None, or why there is no kernel of this configuration."""
        allowed: dict[str, tuple[Any, ...]] = {
            "recipe": tuple(WARPGROUP_RECIPES),
            "out_dtype": tuple(_OUT_DTYPES),
            "out_align": (16, 8, 4, 2),
            "warpgroups": (1, 2, 3),
            "stages": (1, 2, 3, 4, 5, 6, 7, 8),
            "exponent": ("exact", "fast") if config.recipe in LOG_LINEAR_RECIPES else ("exact",),
            "fma_eighths": range(9) if config.recipe in ("int8_fp8", "fp8") and config.exponent == "exact" else (0,),
        }
        if config.head_dim not in HEAD_DIMS:
            return f"head_dim={config.head_dim!r} is not a multiple of 8 from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"
        for field, values in allowed.items():
            if getattr(config, field) not in values:
                return f"{field}={getattr(config, field)!r} is not one of {', '.join(map(str, values))}"
        if config.accumulate != (expected := WARPGROUP_RECIPES[config.recipe].accumulate):
            return f"accumulate={config.accumulate!r} is not {expected}, which recipe={config.recipe!r} needs"
        registers = _CONSUMER_REGISTERS[config.warpgroups]
        if value_parts(WARPGROUP_RECIPES[config.recipe].image(config.head_dim), registers) is None:
            return (
                f"warpgroups={config.warpgroups} leave {registers} registers a thread, too few for "
                f"head_dim={config.head_dim}: use warpgroups=2"
            )
        if (needed := _shared_bytes(config)) > _SHARED_BYTES:
            return (
                f"stages={config.stages} need {needed} bytes of shared memory with warpgroups={config.warpgroups} and "
                f"head_dim={config.head_dim}; a CTA has {_SHARED_BYTES}: use fewer"
            )
        if config.smooth_v and not WARPGROUP_RECIPES[config.recipe].quantised:
            return f"recipe={config.recipe!r} smooths nothing, because it quantises nothing"
        return None

    def fake_arguments(self) -> tuple[Any, ...]:
        """Tensors without memory, scalars and stream that stand for `__call__`'s arguments while compiling."""
        c = self.config
        batch, heads, kv_heads, seq_q, tiles = (cute.sym_int32() for _ in range(5))

        def compact(dtype: Any, shape: tuple[Any, ...], align: int) -> Any:
            order = tuple(reversed(range(len(shape))))
            return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)

        if self.recipe.quantised:
            query = (compact(Int8, (batch, heads, seq_q, self.image.key_bytes), 16),)
            query += tuple(compact(Float32, (batch, heads, seq_q), 4) for _ in range(2))
            key_value = (
                compact(Uint8, (batch, kv_heads, tiles, self.image.nbytes), 16),
                compact(Float32, (batch, kv_heads, c.head_dim), 16),
            )
        else:
            query = (self._fake_rows(batch, heads, seq_q, self.recipe.element, 16), None, None)
            key_value = tuple(self._fake_rows(batch, kv_heads, tiles, self.recipe.element, 16) for _ in range(2))
        return (
            *query,
            *key_value,
            None,
            compact(Float32, (batch, kv_heads, c.head_dim), 16) if c.smooth_v else None,
            compact(Int32, (batch,), 4) if c.varlen_k else None,
            self._fake_rows(batch, heads, seq_q, _OUT_DTYPES[c.out_dtype], c.out_align),
            compact(Float32, (batch, heads, seq_q), 4) if c.has_lse else None,
            Int32(0),
            Float32(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    def _fake_rows(self, batch: Any, heads: Any, tokens: Any, element: Any, align: int) -> Any:
        """[B, H, S, D] of 16-bit floats with any strides that keep rows aligned to ``align`` bytes."""
        strides = tuple(cute.sym_int64(divisibility=align // 2) for _ in range(3))
        shape = (batch, heads, tokens, self.config.head_dim)
        return make_fake_tensor(element, shape, (*strides, 1), assumed_align=align)

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        q_scale: cute.Tensor | None,
        q_bias: cute.Tensor | None,
        keys: cute.Tensor,
        values: cute.Tensor,
        delta: None,
        v_mean: cute.Tensor | None,
        key_lengths: cute.Tensor | None,
        out: cute.Tensor,
        lse: cute.Tensor | None,
        seq_k: Int32,
        softmax_scale_log2: Float32,
        stream: Any,
    ):
        """Launch. The arguments are those of `AttentionSm80`, in its order. For recipes that quantise:

        q:       int8 [B, Hq, Sq, `image.key_bytes`]: INT8, or E4M3's bytes, zeros past D; compact, as q_scale, q_bias
        keys:    uint8 [B, Hkv, T, bytes], compact: tile images of 128 tokens with rows of ones, T = ceil(seq_k / 128)
        delta:   None: what smoothing Q takes off the scores is not brought back here
        """
        batch, heads, seq_q, _ = q.shape
        all_heads = batch * heads
        head_bytes = Int64(cutlass.max(cute.ceil_div(seq_k, TILE_TOKENS), 1)) * self.image.nbytes
        fitting = cutlass.min(self.config.l2_bytes // head_bytes, Int64(all_heads)).to(Int32)
        together = cutlass.max(fitting, cute.ceil_div(all_heads, _LARGEST_GRID_Z))
        grid = (together, cute.ceil_div(seq_q, self.rows), cute.ceil_div(all_heads, together))
        maps = self.recipe.maps(keys, values, seq_k, self.image)
        self.kernel(
            q, q_scale, q_bias, keys, values, maps, v_mean, key_lengths, out, lse, seq_k, softmax_scale_log2
        ).launch(grid=grid, block=(self.threads, 1, 1), smem=self.shared_bytes, stream=stream, min_blocks_per_mp=1)

    @cute.kernel
    def kernel(
        self,
        q: cute.Tensor,
        q_scale: cute.Tensor | None,
        q_bias: cute.Tensor | None,
        keys: cute.Tensor,
        values: cute.Tensor,
        maps: tuple | None,
        v_mean: cute.Tensor | None,
        key_lengths: cute.Tensor | None,
        out: cute.Tensor,
        lse: cute.Tensor | None,
        seq_k: Int32,
        softmax_scale_log2: Float32,
    ):
        batch, heads, seq_q, _ = q.shape
        head, row_begin = self.assignment()
        if head < batch * heads:
            group = heads // keys.shape[1]
            if const_expr(key_lengths is not None):
                seq_k = cutlass.max(cutlass.min(key_lengths[head // heads], seq_k), 0)
            bounds = SequenceBounds(seq_q, seq_k, row_begin, self.rows, TILE_TOKENS, self.config.causal)
            shared = cute.arch.get_dyn_smem(Uint8, alignment=1024)
            if const_expr(self.keeps_shared_address):
                shared = cute.make_ptr(Uint8, opaque(shared.toint()), cute.AddressSpace.smem, assumed_align=1024)
            ring = self.ring(shared)
            if cute.arch.thread_idx()[0] == 0:
                ring.initialise(self.consumers // 32)
            cute.arch.barrier()
            warpgroup = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // _WARPGROUP)
            if warpgroup == self.config.warpgroups:
                cute.arch.setmaxregister_decrease(_PRODUCER_REGISTERS)
                if cute.arch.thread_idx()[0] // 32 == self.consumers // 32:
                    source = self.recipe.source(
                        keys, maps, head // group, seq_k, self.image, ring.own_barrier, self.config.varlen_k
                    )
                    ring.produce(source, bounds.tiles())
            else:
                cute.arch.setmaxregister_increase(_CONSUMER_REGISTERS[self.config.warpgroups])
                mine = replace(bounds, row_begin=row_begin + warpgroup * ROWS, rows=ROWS)
                queries = shared + cute.assume(warpgroup * self.q_bytes, divby=256)
                self.load_queries(self.head_queries(q, head), queries, mine, warpgroup)
                scales, biases, channels = None, None, (None, None)
                if const_expr(self.recipe.quantised):
                    scales, biases = self.head_rows(q_scale, head), self.head_rows(q_bias, head)
                softmax = self.attend(ring, bounds.tiles(), mine, queries, scales, softmax_scale_log2)
                if const_expr(self.recipe.quantised):
                    kv_head = opaque(head) // group  # divided again: no register holds it through the main loop
                    channels = (self.head_channels(values, kv_head), self.head_channels(v_mean, kv_head))
                query = (scales, biases, softmax_scale_log2)
                epilogue = Epilogue(softmax, mine, query, self.warp_row(), self.image, 1)
                epilogue.store_output(out[head // heads, head % heads, None, None], channels)
                if const_expr(lse is not None):
                    epilogue.store_lse(self.head_rows(lse, head))

    def ring(self, shared: cute.Pointer) -> KvRing:
        """The stages behind Q, and the barriers behind them."""
        tiles = shared + self.config.warpgroups * self.q_bytes
        barriers = cute.recast_ptr(tiles + self.config.stages * self.stage_bytes, dtype=Int64)
        return KvRing.create(tiles, barriers, self.stage_bytes, self.config.stages, self.recipe.turns)

    def assignment(self) -> tuple[Int32, Int32]:
        """(batch·heads + head, first query row) of this CTA.

        Blocks start in the order x, y, z: the heads of an L2-sized group, longest rows first if causal, group by group.
        """
        x, y, z = cute.arch.block_idx()
        group, blocks, _ = cute.arch.grid_dim()
        block = blocks - 1 - y if self.config.causal else y
        return z * group + x, block * self.rows

    def head_rows(self, x: cute.Tensor, head: Int32) -> cute.Tensor:
        """[Sq] of one head of a compact [B, Hq, Sq] tensor."""
        seq_q = x.shape[2]
        return cute.make_tensor(x.iterator + Int64(head) * seq_q, cute.make_layout(seq_q))

    def head_channels(self, x: cute.Tensor | None, head: Int32) -> cute.Tensor | None:
        """[D] of one KV head of a compact [B, Hkv, D] tensor, if there is one."""
        if const_expr(x is None):
            return None
        head_dim = self.config.head_dim
        return cute.make_tensor(x.iterator + Int64(head) * head_dim, cute.make_layout(head_dim))

    def head_queries(self, q: cute.Tensor, head: Int32) -> cute.Tensor:
        """[Sq, D] of one head of Q."""
        _, heads, seq_q, row_bytes = q.shape
        if not self.recipe.quantised:
            return q[head // heads, head % heads, None, None]
        rows = cute.make_layout((seq_q, row_bytes), stride=(row_bytes, 1))
        return cute.make_tensor(q.iterator + Int64(head) * seq_q * row_bytes, rows)

    def warp_row(self) -> Int32:
        """First of the warp's rows, relative to its warpgroup's first row."""
        return cute.arch.thread_idx()[0] % _WARPGROUP // 32 * 16

    def lane_row(self, bounds: SequenceBounds) -> Int32:
        """Query of this lane's accumulator row 0; row 1 is 8 further."""
        return bounds.row_begin + self.warp_row() + lane_index() // 4

    @cute.jit
    def row_scales(self, scales: cute.Tensor | None, bounds: SequenceBounds, factor: Float32) -> cute.Tensor:
        """float32 (2,): ``factor``, times Q's scale if given, of each of this lane's rows; positive, finite."""
        row = self.lane_row(bounds)
        row_scale = cute.make_rmem_tensor((2,), Float32)
        for r in range_constexpr(2):
            row_scale[r] = factor
            if const_expr(scales is not None):
                row_scale[r] = Float32(0)
                if row + 8 * r < bounds.seq_q:
                    product = scales[row + 8 * r] * factor
                    row_scale[r] = product if product < Float32.inf else Float32(0)
            row_scale[r] = cute.arch.fmax(row_scale[r], Float32(SMALLEST_FACTOR))
        return row_scale

    @cute.jit
    def load_queries(self, q: cute.Tensor, queries: cute.Pointer, bounds: SequenceBounds, warpgroup: Int32):
        """A warpgroup's rows of Q [Sq, D] -> its planes, zeros past the last one; ready for the tensor cores."""
        thread, element_bytes = cute.arch.thread_idx()[0] % _WARPGROUP, self.recipe.query_bytes
        copy = RowCopy.create(self.q_planes, element_bytes * q.shape[1], _WARPGROUP, thread)
        step = Int64(q.stride[0]) * element_bytes
        first = bounds.row_begin + copy.row
        copy.copy(queries, q.iterator.toint() + first * step + copy.byte, step, bounds.seq_q - first)
        cute.arch.cp_async_commit_group()
        cute.arch.cp_async_wait_group(0)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=1 + warpgroup, number_of_threads=_WARPGROUP)

    @cute.jit
    def attend(
        self,
        ring: KvRing,
        brought: Int32,
        bounds: SequenceBounds,
        queries: cute.Pointer,
        scales: cute.Tensor | None,
        softmax_scale_log2: Float32,
    ) -> Any:
        """Visit the KV tiles from the last to the first; returns the softmax's final state.

        brought: tiles of which some row of the CTA sees some key; bounds: of this warpgroup. Tiles of which none of its
        rows sees a key are given back unread. Then two loops with the same body: the tiles that need a mask, and the
        steady loop over all others, which has no instruction for masks.
        """
        c = self.config
        row_scale = self.row_scales(scales, bounds, softmax_scale_log2)
        stages = (c.stages, self.stage_bytes)
        scores = self.recipe.scores(queries, ring.tiles, *stages, row_scale, self.image, not c.k_scale_per_token)
        registers = _CONSUMER_REGISTERS[c.warpgroups]
        softmax = self.recipe.softmax(ring.tiles, *stages, self.image, registers, c.fma_eighths)
        mask = ScoreMask.create(bounds, self.lane_row(bounds), lane_index() % 4, self.image.score_tokens)
        tiles, full = self.tile_counts(bounds)
        for _ in cutlass.range((brought - tiles) * self.recipe.turns, unroll=1):
            ring.wait()
            ring.release()
        beyond = mask.at(tiles * TILE_TOKENS)
        limit = opaque(beyond.limit)  # one register, where ptxas would keep all that the limit is made of
        for _ in cutlass.range(tiles - full, unroll=1):
            limit = limit + TILE_TOKENS
            self.visit(ring, scores, softmax, replace(beyond, limit=limit))
        _, full = self.tile_counts(replace(bounds, row_begin=opaque(bounds.row_begin)))  # again: no register held it
        if const_expr(softmax.chunk_tiles is None):
            for _ in cutlass.range(full, unroll=1):
                self.visit(ring, scores, softmax, None)
        else:
            for chunk in cutlass.range((full + (softmax.chunk_tiles - 1)) // softmax.chunk_tiles, unroll=1):
                softmax.bound_sums()
                left = full - chunk * softmax.chunk_tiles
                for _ in cutlass.range(cutlass.min(left, softmax.chunk_tiles), unroll=1):
                    self.visit(ring, scores, softmax, None)
        softmax.finish()
        return softmax

    @cute.jit
    def tile_counts(self, bounds: SequenceBounds) -> tuple[Int32, Int32]:
        """Tiles of which some row of a warpgroup sees some key, and tiles of which every row sees all."""
        tiles = bounds.tiles() if bounds.row_begin < bounds.seq_q else Int32(0)
        return tiles, cutlass.min(bounds.full_tiles(), tiles)

    @cute.jit
    def visit(self, ring: KvRing, scores: Any, softmax: Any, mask: ScoreMask | None):
        """One KV tile: S = Q·Kᵀ, mask, maximum, P = 2^(S - m), O += P·V."""
        stage = ring.wait()
        sums = scores.multiply(stage)
        y, largest, factors = scores.dequantise(sums, stage, mask)
        softmax.update(largest, factors)
        p = softmax.probabilities(y, factors)
        softmax.accumulate(p, ring.wait_values(stage))
        ring.release()


def _shared_bytes(config: AttentionSm90Config) -> int:
    recipe = WARPGROUP_RECIPES[config.recipe]
    image = recipe.image(config.head_dim)
    queries = ROWS * config.warpgroups * image.key_bytes
    return queries + config.stages * (image.nbytes // recipe.turns) + KvRing.barrier_bytes(config.stages)
