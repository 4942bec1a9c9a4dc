"""A consumer warpgroup of the Hopper attention kernel: its rows of Q, and its walk over the KV tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from .attention_sm90_config import AttentionSm90Config, product_registers
from .kv_ring import KvRing
from .mask import AnyMask, PairMask, ScoreMask
from .operand_planes import lane_index, operand_planes
from .ptx import opaque
from .row_copy import RowCopy, row_addresses
from .row_scales import row_scales
from .scored_tile import ScoredTile
from .sequence import SequenceBounds
from .warpgroup_mma import ROWS
from .warpgroup_recipes import TILE_TOKENS, WarpgroupRecipe

__all__ = ["THREADS", "Consumer"]

THREADS = 128
"""Of a warpgroup."""


@dataclass(frozen=True)
class Consumer:
    """A warpgroup with 64 rows of Q, all roles but the producer's in turn.

    warpgroup: which of the CTA's it is
    bounds:    its rows; queries: their planes (shared, 256-byte aligned)
    recipe, image: of the configuration; stage_bytes: of the ring
    """

    warpgroup: Int32
    bounds: SequenceBounds
    queries: cute.Pointer
    config: cutlass.Constexpr[AttentionSm90Config]
    recipe: cutlass.Constexpr[WarpgroupRecipe]
    image: cutlass.Constexpr[Any]
    stage_bytes: cutlass.Constexpr[int]

    def warp_row(self) -> Int32:
        """First of the warp's rows, relative to its warpgroup's first row."""
        return cute.arch.thread_idx()[0] % THREADS // 32 * 16

    def lane_row(self) -> Int32:
        """Query of this lane's accumulator row 0; row 1 is 8 further."""
        return self.bounds.row_begin + self.warp_row() + lane_index() // 4

    @cute.jit
    def request_queries(self, q: cute.Tensor):
        """A warpgroup's rows of Q [rows, D] -> its planes, zeros past the last one; `await_queries` before use."""
        # Opaque: what follows from it is made again for every block, and not kept through the main loop.
        thread, element_bytes = opaque(cute.arch.thread_idx()[0] % THREADS), self.recipe.query_bytes
        copy = RowCopy.create(operand_planes(ROWS, self.image.key_bytes), element_bytes * q.shape[1], THREADS, thread)
        first = self.bounds.row_begin + copy.row
        copy.copy(self.queries, row_addresses(q, first, copy.byte), self.bounds.all_rows - first)
        cute.arch.cp_async_commit_group()

    def await_queries(self) -> None:
        """Until the warpgroup's rows of Q are there for the tensor cores."""
        cute.arch.cp_async_wait_group(0)
        cute.arch.fence_proxy("async.shared", space="cta")
        self.meet()

    def meet(self) -> None:
        """Until all warps of the warpgroup are here."""
        cute.arch.barrier(barrier_id=1 + self.warpgroup, number_of_threads=THREADS)

    @cute.jit
    def attend(self, ring: KvRing, brought: Int32, scales: cute.Tensor | None, softmax_scale_log2: Float32) -> Any:
        """Visit the KV tiles from the last to the first; returns the softmax's final state.

        Tiles of which none of this warpgroup's rows sees a key are given back unread. Then two loops with the same
        body: the tiles that need a mask, and the steady loop over all others, which has no instruction for masks. With
        `overlap` the mask is that of the tile after the one visited; `begin` comes before the first and `end` is the
        last one's visit.

        brought: tiles of which some row of the CTA sees some key
        scales:  Q's, [rows], or None
        """
        c, bounds = self.config, self.bounds
        row_scale = row_scales(scales, bounds, self.lane_row(), 2, softmax_scale_log2)
        stages = (c.stages, self.stage_bytes)
        scores = self.recipe.scores(self.queries, ring.tiles, *stages, row_scale, self.image, not c.k_scale_per_token)
        softmax = self.recipe.softmax(ring.tiles, *stages, self.image, product_registers(c), c.fma_eighths)
        mask_at = self.masks()
        tiles, full = self.tile_counts(bounds)
        visits = tiles
        if const_expr(c.overlap):
            visits = cutlass.max(tiles - 1, 0)  # the last one is `end`'s
            full = cutlass.min(full, visits)
        counts = full * 4 + (visits - full)  # both in one register: 64 rows have at most two tiles that need a mask
        unread = (brought - tiles) * self.recipe.turns
        late = self.late(unread, tiles) if const_expr(ring.keys_ahead) else 0
        self.give_back(ring, unread - late)
        beyond = mask_at(tiles * TILE_TOKENS)
        limit = beyond.limit
        ahead = None
        if const_expr(c.overlap):
            ahead = ScoredTile.create(self.image.tokens)
            limit = limit + beyond.step(TILE_TOKENS)
            self.begin(ring, scores, softmax, replace(beyond, limit=limit), ahead, tiles)
            self.give_back(ring, late)
        while counts & 3 > 0:
            counts = counts - 1
            limit = limit + beyond.step(TILE_TOKENS)
            self.visit(ring, scores, softmax, replace(beyond, limit=limit), ahead)
        full = counts >> 2
        if const_expr(softmax.chunk_tiles is None):
            for _ in cutlass.range(full, unroll=1):
                self.visit(ring, scores, softmax, None, ahead)
        else:
            most = softmax.chunk_tiles - int(c.overlap)  # `end` comes after a chunk
            for chunk in cutlass.range((full + (most - 1)) // most, unroll=1):
                softmax.bound_sums()
                left = full - chunk * most
                for _ in cutlass.range(cutlass.min(left, most), unroll=1):
                    self.visit(ring, scores, softmax, None, ahead)
        if const_expr(c.overlap):
            self.end(ring, softmax, ahead)
        softmax.finish()
        return softmax

    def masks(self) -> Callable[[Int32], AnyMask]:
        """Position of a tile's first key -> mask of the tile."""
        where = self.bounds, self.lane_row(), lane_index() % 4, self.image.score_tokens
        if self.bounds.limit_step is None:
            return partial(PairMask.create, *where)
        return ScoreMask.create(*where).at

    @cute.jit
    def late(self, unread: Int32, tiles: Int32) -> Int32:
        """Of the stages that are left unread, how many come after K of the first tile that is read."""
        return cutlass.min(unread, 1) if tiles > 0 else Int32(0)

    @cute.jit
    def tile_counts(self, bounds: SequenceBounds) -> tuple[Int32, Int32]:
        """Tiles of which some row of a warpgroup sees some key, and tiles of which every row sees all."""
        tiles = bounds.tiles() if bounds.row_begin < bounds.all_rows else Int32(0)
        return tiles, cutlass.min(bounds.full_tiles(), tiles)

    @cute.jit
    def give_back(self, ring: KvRing, stages: Int32) -> None:
        """Wait for the next ``stages`` of the ring, and leave them unread."""
        for _ in cutlass.range(stages, unroll=1):
            ring.wait()
            ring.release()

    @cute.jit
    def visit(self, ring: KvRing, scores: Any, softmax: Any, mask: AnyMask | None, ahead: ScoredTile | None):
        """One KV tile: S = Q·Kᵀ, mask, maximum, P = 2^(S - m), O += P·V. With ``ahead`` see `visit_ahead`."""
        if const_expr(ahead is not None):
            self.visit_ahead(ring, scores, softmax, mask, ahead)
        else:
            stage = ring.wait()
            sums = scores.multiply(stage)
            y, largest, factors = scores.dequantise(sums, stage, mask)
            softmax.update(largest, factors)
            p = softmax.probabilities(y, factors)
            softmax.accumulate(p, ring.wait_values(stage))
            ring.release()

    def visit_ahead(self, ring: KvRing, scores: Any, softmax: Any, mask: AnyMask | None, ahead: ScoredTile):
        """The tile ``ahead`` from P on, and the next one, whose ``mask`` it is, up to its maximum: of the next one S
        while P is computed, mask and maximum during P·V.
        """
        x = softmax.exponents(ahead.scores, ahead.row_factors())
        following = cute.arch.make_warp_uniform(ring.take())  # descriptors take no registers of a lane
        sums = scores.issue(following, ahead.scores)
        p = softmax.probabilities(x, None)
        stage = cute.arch.make_warp_uniform(ring.take() if const_expr(ring.keys_ahead) else ahead.stage[0])
        products = softmax.issue(p, stage, softmax.groups[0])
        warpgroup.wait_group(1)
        if const_expr(ring.keys_ahead):
            ring.give_back(following)
        y, largest, factors = scores.dequantise(sums, following, mask)
        ahead.set(y, factors, following)
        passes, counts = softmax.raise_max(largest, factors)
        warpgroup.wait_group(0)
        softmax.add(products)
        ring.give_back(stage)
        softmax.rescale(passes, counts)

    @cute.jit
    def begin(self, ring: KvRing, scores: Any, softmax: Any, mask: AnyMask, ahead: ScoredTile, tiles: Int32):
        """With `overlap`, the first one of ``tiles``, if there is one, up to its maximum."""
        if tiles > 0:
            stage = ring.take()
            sums = scores.multiply(stage)
            if const_expr(ring.keys_ahead):
                ring.give_back(stage)
            y, largest, factors = scores.dequantise(sums, stage, mask)
            ahead.set(y, factors, stage)
            softmax.update(largest, factors)

    @cute.jit
    def end(self, ring: KvRing, softmax: Any, ahead: ScoredTile):
        """With `overlap`, the last tile, if there is one, from P on."""
        if ahead.stage[0] >= 0:
            p = softmax.probabilities(softmax.exponents(ahead.scores, ahead.row_factors()), None)
            stage = ring.take() if const_expr(ring.keys_ahead) else ahead.stage[0]
            softmax.accumulate(p, stage)
            ring.give_back(stage)
