"""Attention forward for Hopper, sm_90a: warp-specialised, by warpgroup MMAs on tile images of 128 tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, const_expr

from .attention_arguments import attention_arguments
from .attention_sm90_config import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    AttentionSm90Config,
    refusal,
    shared_bytes,
)
from .consumer import THREADS, Consumer
from .epilogue import Epilogue
from .head_views import head_channels, head_queries, head_rows
from .kv_ring import KvRing
from .ptx import opaque
from .sequence import SequenceBounds
from .warpgroup_mma import ROWS
from .warpgroup_recipes import LOG_LINEAR_RECIPES, TILE_TOKENS, WARPGROUP_RECIPES
from .work_order import WorkOrder

__all__ = ["AttentionSm90", "AttentionSm90Config"]


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

    With `overlap` one or two warpgroups, which have more registers each, work on while a product is being made:
        x + bias        of this tile, to registers of their own
        S = Q·Kᵀ        issued, of the next tile
        P = e4m3(2^x)   of this tile
        PV = P·V, P·1   issued; then wait for S
        maximum, vote   of the next tile; bias. Then wait for PV
        O += PV         and where a maximum was raised, O multiplied by a power of two
        arrive          this tile's stage may be filled again

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
        self.consumers = THREADS * config.warpgroups
        self.threads = self.consumers + THREADS
        self.q_bytes = ROWS * self.image.key_bytes
        self.shared_bytes = shared_bytes(config)

    ptxas_levels = (3, 1, 3)
    """Optimisation levels of the assembler, in the order in which they are tried until nothing is spilled.

    With E4M3 keys and a scale per token, level 3 spills a dozen registers at head dim 128, and level 1 none. E4M3
    values of more than 192 channels are spilled by both, at level 3 two registers of tiles with a mask.
    """

    @property
    def keeps_shared_address(self) -> bool:
        """Whether shared memory's address is in a register, which saves up to a quarter of a slot per 32 scores.

        Beside sums of one tile and the causal limit there is none left: ptxas would make every score twice there. Of
        another tile's scores beside the causal limit it would make copies.
        """
        c = self.config
        return not (c.causal and (c.overlap or c.accumulate == "float32+float32"))

    @staticmethod
    def can_implement(config: AttentionSm90Config) -> str | None:
        """None, or why there is no kernel of this configuration."""
        return refusal(config)

    def fake_arguments(self) -> tuple[Any, ...]:
        """Tensors without memory, scalars and stream that stand for `__call__`'s arguments while compiling."""
        c = self.config
        which = {"has_lse": c.has_lse, "smooth_q": False, "smooth_v": c.smooth_v, "varlen_k": c.varlen_k}
        return attention_arguments(self.recipe, self.image, c.head_dim, c.out_dtype, c.out_align, **which)

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
        head_bytes = Int64(cutlass.max(cute.ceil_div(seq_k, TILE_TOKENS), 1)) * self.image.nbytes
        blocks = cute.ceil_div(seq_q, self.rows)
        order = WorkOrder.create(batch * heads, blocks, head_bytes, self.config.l2_bytes)
        maps = self.recipe.maps(keys, values, seq_k, self.image)
        self.kernel(
            q, q_scale, q_bias, keys, values, maps, v_mean, key_lengths, out, lse, seq_k, softmax_scale_log2
        ).launch(
            grid=order.grid, block=(self.threads, 1, 1), smem=self.shared_bytes, stream=stream, min_blocks_per_mp=1
        )

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
        place = cute.arch.block_idx()
        head, block = WorkOrder(*cute.arch.grid_dim()).item(place, last_first=self.config.causal)
        row_begin = block * self.rows
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
            warpgroup = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // THREADS)
            if warpgroup == self.config.warpgroups:
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
                if cute.arch.thread_idx()[0] // 32 == self.consumers // 32:
                    source = self.recipe.source(
                        keys, maps, head // group, seq_k, self.image, ring.own_barrier, self.config.varlen_k
                    )
                    ring.produce(source, bounds.tiles())
            else:
                cute.arch.setmaxregister_increase(CONSUMER_REGISTERS[self.config.warpgroups])
                mine = replace(bounds, row_begin=row_begin + warpgroup * ROWS, rows=ROWS)
                queries = shared + cute.assume(warpgroup * self.q_bytes, divby=256)
                consumer = Consumer(warpgroup, mine, queries, self.config, self.recipe, self.image, self.stage_bytes)
                consumer.load_queries(head_queries(q, head, compact=self.recipe.quantised))
                scales, biases, channels = None, None, (None, None)
                if const_expr(self.recipe.quantised):
                    scales, biases = head_rows(q_scale, head), head_rows(q_bias, head)
                softmax = consumer.attend(ring, bounds.tiles(), scales, softmax_scale_log2)
                if const_expr(self.recipe.quantised):
                    kv_head = opaque(head) // group  # divided again: no register holds it through the main loop
                    channels = (head_channels(values, kv_head), head_channels(v_mean, kv_head))
                query = (scales, biases, softmax_scale_log2)
                epilogue = Epilogue(softmax, mine, query, consumer.warp_row(), self.image, 1)
                epilogue.store_output(out[head // heads, head % heads, None, None], channels)
                if const_expr(lse is not None):
                    epilogue.store_lse(head_rows(lse, head))

    def ring(self, shared: cute.Pointer) -> KvRing:
        """The stages behind Q, and the barriers behind them."""
        tiles = shared + self.config.warpgroups * self.q_bytes
        barriers = cute.recast_ptr(tiles + self.config.stages * self.stage_bytes, dtype=Int64)
        return KvRing.create(
            tiles, barriers, self.stage_bytes, self.config.stages, self.recipe.turns, keys_ahead=self.config.overlap
        )
