"""Attention forward for Hopper, sm_90a: warp-specialised, by warpgroup MMAs on tile images of 128 tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, const_expr
from cutlass.cute.runtime import make_fake_compact_tensor

from .attention_arguments import Call, attention_arguments
from .attention_sm90_config import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    AttentionSm90Config,
    refusal,
    shared_bytes,
)
from .consumer import THREADS, Consumer
from .epilogue import Epilogue
from .head_views import head_channels, head_queries, head_rows, packed_heads
from .kv_ring import BARRIER_BYTES, KvRing
from .operand_planes import operand_planes
from .ptx import opaque
from .sequence import SequenceBounds
from .warpgroup_mma import ROWS
from .warpgroup_recipes import LOG_LINEAR_RECIPES, TILE_TOKENS, WARPGROUP_RECIPES
from .work_order import WorkOrder
from .work_queue import WorkQueue

__all__ = ["AttentionSm90", "AttentionSm90Config"]


class AttentionSm90:
    """out = softmax(softmax_scale · q kᵀ) v by warpgroup MMAs, from operands in the recipe's formats.

    A CTA owns 64·`warpgroups` query rows of one head and walks that head's KV tiles of 128 tokens from the last to the
    first. With `pack_gqa` its rows are those of all query heads that share a KV head (`packed_heads`), token by token.
    One warp brings the tiles; each consumer warpgroup has 64 rows and plays all other roles in turn. The warpgroups are
    not in step: while one waits for its MMAs, the softmax of the others keeps the other pipes busy.

    Warp roles
        producer   one warp of the last warpgroup: `KvRing.produce` from `recipe.source`, up to `stages` ahead: one bulk
                   copy a tile image (`TileImages`), a TMA copy for 64 channels of K or V (`TensorTiles`); `WorkQueue`:
                   which block of rows is next
        consumers  load      `Consumer.request_queries`, once a block, while the last one is stored
                   mma       `recipe.scores.multiply` (S = Q·Kᵀ), `recipe.softmax.accumulate` (O += P·V, P·1)
                   softmax   `recipe.scores.dequantise`, `ScoreMask`, `recipe.softmax.update`, `.probabilities`
                   epilogue  `Epilogue.store_output`, `Epilogue.store_lse`
    A warp's share of its warpgroup's rows is 16; what a lane holds is what it holds of an m16n8 MMA.

    Barriers
        full[stage]   mbarrier; 1 arrival, the producer's, and the tile's bytes
        empty[stage]  mbarrier; 4·`warpgroups` arrivals, one of each consumer warp
        full[slot]    mbarrier of the queue; 1 arrival, the producer's, which has written a block's number
        empty[slot]   mbarrier of the queue; 4·`warpgroups` arrivals, of consumer warps that need the number no more
        0             all threads: the mbarriers are initialised
        1 + w         the 128 threads of consumer warpgroup w: its rows of Q are in shared memory, or read for good
        cluster       in place of 0: all threads of both CTAs; and once more before they exit

    With `cluster` two CTAs share a block of 2·64·`warpgroups` rows and its KV tiles. Each brings half of every tile to
    both; full[stage] still counts one arrival, its own producer's, and all bytes. empty[stage] of both CTAs counts the
    consumer warps of both. A CTA or warpgroup whose rows do not see a tile gives it back unread.

    Tiles of recipe int8_fp8, three warpgroups, D = 128 (lane = 4·g + t; layouts are shape:stride, swizzles on the byte
    address)
        tensor  memory     logical shape            layout                                swizzle  owner, lifetime
        sQ      shared     (row, byte) (64,128)     (64,(32,4)):(32,(1,2048)), s8         <1,4,3>  warpgroup, block
        sK      shared     (token, dim) (128,128)   TileImage.k, s8                       <1,4,3>  CTA, one stage
        sV      shared     (channel, token)         TileImage.v and .ones, e4m3           <1,4,3>  CTA, one stage
        sScale  shared     (1, token) (1,128)       (1,128):(128,1), f32                  none     CTA, one stage
        S       registers  (64, 128) per warpgroup  ((2,2),16), s32: 64                   -        lane, one tile
        P       registers  (64, 128) per warpgroup  ((4,2,2),1,4), e4m3: 16               -        lane, one tile
        PV      registers  (64, 136) per warpgroup  ((2,2,17),1,1), f32: 68               -        lane, one tile
        O       registers  (64, 136) per warpgroup  ((2,2),1,17), f32: 68                 -        lane, block
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
    6.2 slots, and what a warp waits for in between: three warps a sub-partition take turns. Registers are the other
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
        self.q_planes = operand_planes(ROWS, self.image.key_bytes)
        self.q_bytes = ROWS * self.image.key_bytes
        self.shared_bytes = shared_bytes(config)

    ptxas_levels = (3, 1, 3)
    """Optimisation levels of the assembler, in the order in which they are tried until nothing is spilled.

    With E4M3 keys and a scale per token, level 3 spills a dozen registers at head dim 128, and level 1 none. E4M3
    values of more than 192 channels are spilled by both, at level 3 two registers of tiles with a mask.
    """

    @property
    def draws(self) -> bool:
        """Whether CTAs draw their blocks of rows, which see more keys or fewer, instead of counting on."""
        return self.config.persistent and (self.config.causal or self.config.varlen_k)

    @staticmethod
    def can_implement(config: AttentionSm90Config) -> str | None:
        """None, or why there is no kernel of this configuration."""
        return refusal(config)

    def fake_arguments(self) -> tuple[Any, ...]:
        """Tensors without memory, scalars and stream that stand for `__call__`'s arguments while compiling."""
        c = self.config
        which = {"has_lse": c.has_lse, "smooth_q": False, "smooth_v": c.smooth_v, "varlen_k": c.varlen_k}
        *tensors, stream = attention_arguments(self.recipe, self.image, c.head_dim, c.out_dtype, c.out_align, **which)
        tickets = make_fake_compact_tensor(Int32, (1,), assumed_align=4) if self.draws else None
        return *tensors, tickets, Int32(0), stream

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
        tickets: cute.Tensor | None,
        ctas: Int32,
        stream: Any,
    ):
        """Launch. The arguments are those of `AttentionSm80`, in its order, and two more. For recipes that quantise:

        q:       int8 [B, Hq, Sq, `image.key_bytes`]: INT8, or E4M3's bytes, zeros past D; compact, as q_scale, q_bias
        keys:    uint8 [B, Hkv, T, bytes], compact: tile images of 128 tokens with rows of ones, T = ceil(seq_k / 128)
        delta:   None: what smoothing Q takes off the scores is not brought back here

        tickets: int32 [1], 0, which it is again after the launch; None unless `draws`
        ctas:    how many CTAs run at the same time, one a multiprocessor; of no meaning unless `persistent`
        """
        if const_expr(self.config.pack_gqa):
            q, q_scale, q_bias, out, lse = (packed_heads(x, keys.shape[1]) for x in (q, q_scale, q_bias, out, lse))
        batch, heads, rows, _ = q.shape
        head_bytes = Int64(cutlass.max(cute.ceil_div(seq_k, TILE_TOKENS), 1)) * self.image.nbytes
        blocks = cute.ceil_div(cute.size(rows), self.config.cluster * self.rows)
        order = WorkOrder.create(batch * heads, blocks, head_bytes, self.config.l2_bytes)
        maps = self.recipe.maps(keys, values, seq_k, self.image, self.config.cluster)
        grid = self.grid(order.count, ctas)
        call = Call(q, q_scale, q_bias, keys, values, maps, v_mean, key_lengths, out, lse, seq_k, softmax_scale_log2)
        self.kernel(call, order, tickets).launch(
            grid=(grid, 1, 1),
            block=(self.threads, 1, 1),
            smem=self.shared_bytes,
            stream=stream,
            min_blocks_per_mp=1,
            **({"cluster": (self.config.cluster, 1, 1)} if self.config.cluster > 1 else {}),
        )

    def grid(self, blocks: Int32, ctas: Int32) -> Int32:
        """How many CTAs are launched for ``blocks`` of work, a cluster's each; ``ctas`` run at the same time."""
        cluster = self.config.cluster
        workers = ctas if cluster == 1 else cutlass.max(ctas // cluster, 1)
        workers = cutlass.min(blocks, workers) if self.config.persistent else blocks
        return workers if cluster == 1 else cluster * workers

    @cute.kernel
    def kernel(self, call: Call, order: WorkOrder, tickets: cute.Tensor | None):
        shared = cute.arch.get_dyn_smem(Uint8, alignment=1024)
        # In a register, which saves up to a quarter of a slot per 32 scores.
        shared = cute.make_ptr(Uint8, opaque(shared.toint()), cute.AddressSpace.smem, assumed_align=1024)
        ring = self.ring(shared)
        queue = self.queue(shared, tickets, order, ring)
        if cute.arch.thread_idx()[0] == 0:
            ring.initialise(self.consumers // 32)
            queue.initialise(self.consumers // 32)
            cute.arch.mbarrier_init_fence()
        self.meet()
        warpgroup = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // THREADS)
        if warpgroup == self.config.warpgroups:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if cute.arch.thread_idx()[0] // 32 == self.consumers // 32:
                self.produce(call, order, queue, ring)
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS[self.config.warpgroups])
            self.consume(call, order, queue, ring, shared, warpgroup)
        if const_expr(self.config.cluster > 1):
            self.meet()  # nobody arrives at the barriers of a CTA that has left

    def meet(self) -> None:
        """Until all threads of the CTA, or cluster, are here."""
        if self.config.cluster == 1:
            cute.arch.barrier()
        else:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @cute.jit
    def produce(self, call: Call, order: WorkOrder, queue: WorkQueue, ring: KvRing):
        """The producer warp: every block's KV tiles, and which block is next."""
        number = queue.put(queue.first())
        while number < order.count:
            head, bounds = self.block(number, order, call)
            kv_head = head // call.group
            source = self.recipe.source(
                call.keys,
                call.maps,
                kv_head,
                bounds.seq_k,
                self.image,
                ring.own,
                self.config.varlen_k,
                self.config.cluster,
            )
            ring.produce(source, bounds.tiles())
            number = queue.put(queue.after(number))

    @cute.jit
    def consume(
        self, call: Call, order: WorkOrder, queue: WorkQueue, ring: KvRing, shared: cute.Pointer, warpgroup: Int32
    ):
        """A consumer warpgroup: its rows of every block. Q of the next one is on its way while the last is stored."""
        number = queue.get()
        head, bounds = self.block(number, order, call)
        consumer = self.consumer(shared, warpgroup, bounds)
        consumer.request_queries(head_queries(call.q, head, compact=self.recipe.quantised))
        while number < order.count:
            head, bounds = self.block(number, order, call)
            consumer = self.consumer(shared, warpgroup, bounds)
            consumer.await_queries()
            scales, biases, channels = None, None, (None, None)
            if const_expr(self.recipe.quantised):
                scales, biases = head_rows(call.q_scale, head), head_rows(call.q_bias, head)
            softmax = consumer.attend(ring, bounds.tiles(), scales, call.softmax_scale_log2)
            head, bounds = self.block(queue.get(), order, call)  # again: no register held them through the main loop
            consumer = self.consumer(shared, warpgroup, bounds)
            following = queue.get_next()
            if following < order.count:
                consumer.meet()
                next_head, next_bounds = self.block(following, order, call)
                after = self.consumer(shared, warpgroup, next_bounds)
                after.request_queries(head_queries(call.q, next_head, compact=self.recipe.quantised))
            if const_expr(self.recipe.quantised):
                kv_head = head // call.group
                scales, biases = head_rows(call.q_scale, head), head_rows(call.q_bias, head)
                channels = (head_channels(call.values, kv_head), head_channels(call.v_mean, kv_head))
            query = (scales, biases, call.softmax_scale_log2)
            epilogue = Epilogue(softmax, consumer.bounds, query, consumer.warp_row(), self.image, 1)
            epilogue.store_output(call.out[head // call.heads, head % call.heads, None, None], channels)
            if const_expr(call.lse is not None):
                epilogue.store_lse(head_rows(call.lse, head))
            number = following

    def block(self, number: Int32, order: WorkOrder, call: Call) -> tuple[Int32, SequenceBounds]:
        """Head (batch·Hq + query head; of packed ones batch·Hkv + KV head) and rows of a block, the cluster's."""
        head, block = order.at(number, last_first=self.config.causal)
        seq_k = opaque(call.keys_of(head // call.heads))  # what follows from it is not kept from block to block
        packed, seq_q = None, call.rows
        if const_expr(self.config.pack_gqa):
            packed, seq_q = call.rows[0], opaque(call.rows[1])  # nor the product of both
        rows = self.config.cluster * self.rows
        bounds = SequenceBounds(seq_q, seq_k, block * rows, rows, TILE_TOKENS, self.config.causal, packed)
        return head, bounds

    def consumer(self, shared: cute.Pointer, warpgroup: Int32, bounds: SequenceBounds) -> Consumer:
        """A warpgroup's share of a block."""
        mine = replace(bounds, row_begin=self.first_row(bounds.row_begin) + warpgroup * ROWS, rows=ROWS)
        queries = shared + cute.assume(warpgroup * self.q_bytes, divby=256)
        return Consumer(warpgroup, mine, queries, self.config, self.recipe, self.image, self.stage_bytes)

    def first_row(self, row_begin: Int32) -> Int32:
        """The CTA's first row of those that its cluster has from ``row_begin`` on."""
        return row_begin if self.config.cluster == 1 else row_begin + cute.arch.block_idx_in_cluster() * self.rows

    def ring(self, shared: cute.Pointer) -> KvRing:
        """The stages behind Q, and the barriers behind them."""
        tiles = shared + self.config.warpgroups * self.q_bytes
        shape = (self.stage_bytes, self.config.stages, self.recipe.turns)
        return KvRing.create(tiles, self._barriers(shared), *shape, self.config.overlap, self.config.cluster)

    def queue(self, shared: cute.Pointer, tickets: cute.Tensor | None, order: WorkOrder, ring: KvRing) -> WorkQueue:
        """The queue, whose mailbox lies behind the ring's barriers."""
        mailbox = self._barriers(shared) + KvRing.barrier_bytes(self.config.stages) // BARRIER_BYTES
        return WorkQueue(mailbox, tickets, ring.phases, order.count, self.config.persistent, self.config.cluster)

    def _barriers(self, shared: cute.Pointer) -> cute.Pointer:
        tiles = shared + self.config.warpgroups * self.q_bytes
        return cute.recast_ptr(tiles + self.config.stages * self.stage_bytes, dtype=Int64)
