"""KV tiles on their way from global to shared memory, brought by a producer warp: a ring of stages and barriers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr, range_constexpr

from .operand_planes import lane_index

__all__ = ["KvRing"]

BARRIER_BYTES = 8
"""A 64-bit mbarrier."""


@dataclass(frozen=True)
class KvRing:
    """`stages` tiles in shared memory, each with two barriers: the tile has arrived, and nobody reads it any more.
    Where K and V take `turns`, a stage has K or V of a tile, and V comes right after K; with `keys_ahead` after the
    next tile's K.

                  full                                              empty
        arrive    the producer, once, and the bytes of the copy     every consumer warp, once
        wait      consumers, before they read the tile              the producer, before it requests the next tile

    A stage is used every `stages` tiles, each use ends a phase of both barriers. Every role steps through the stages by
    itself, and is whole warps: one calls ``produce``, all others ``wait`` and ``release``.

    The CTAs of a `cluster` bring the same tiles to the same stages, each a part of every tile to all of them: consumers
    arrive at the empty barriers of all of them. No part of the next tile is early for a full barrier that still waits
    for this one, for that CTA's consumers have seen this one when they arrive at the empty ones.

    tiles:    shared memory, `stages`·`nbytes` bytes, 256-byte aligned; 1024-byte with the 128-byte swizzle
    barriers: shared memory, 16·`stages` + 8 bytes: the full ones, the empty ones, and one for the producer's own use
    state:    three int32 registers: the stage to be used next; the parity of its phase in bit 0, the other bits are not
              the ring's; and the parity of the producer's own barrier
    nbytes:   bytes of a stage
    """

    tiles: cute.Pointer
    barriers: cute.Pointer
    state: cute.Tensor
    nbytes: cutlass.Constexpr[int]
    stages: cutlass.Constexpr[int]
    turns: cutlass.Constexpr[int]
    keys_ahead: cutlass.Constexpr[bool]
    cluster: cutlass.Constexpr[int]

    @staticmethod
    def create(
        tiles: cute.Pointer,
        barriers: cute.Pointer,
        nbytes: int,
        stages: int,
        turns: int,
        keys_ahead: bool,
        cluster: int,
    ) -> KvRing:
        """A role's view of the ring, at the first stage."""
        state = cute.make_rmem_tensor((3,), Int32)
        state.fill(0)
        return KvRing(tiles, barriers, state, nbytes, stages, turns, keys_ahead and turns == 2, cluster)

    @staticmethod
    def barrier_bytes(stages: int) -> int:
        """Shared memory of the barriers."""
        return (2 * stages + 1) * BARRIER_BYTES

    def initialise(self, consumer_warps: int) -> None:
        """Set up the barriers, for so many consumer warps of a CTA: one thread does; a fence and a barrier of the whole
        cluster follow.
        """
        for stage in range(self.stages):
            cute.arch.mbarrier_init(self.barriers + stage, 1)
            cute.arch.mbarrier_init(self.barriers + (self.stages + stage), self.cluster * consumer_warps)
        cute.arch.mbarrier_init(self._own_barrier, 1)

    @property
    def _own_barrier(self) -> cute.Pointer:
        return self.barriers + 2 * self.stages

    @property
    def own(self) -> tuple[cute.Pointer, cute.Tensor]:
        """The producer's own barrier, at which one thread arrives, and the parity of its phase (1,)."""
        return self._own_barrier, cute.make_tensor(self.state.iterator + 2, cute.make_layout(1))

    @property
    def phases(self) -> cute.Tensor:
        """int32 (1,): a register of the role whose bits from 1 on are free."""
        return cute.make_tensor(self.state.iterator + 1, cute.make_layout(1))

    @cute.jit
    def produce(self, source: Any, tiles: Int32) -> None:
        """Bring the tiles of ``source``, from the last of ``tiles`` to the first."""
        if const_expr(self.keys_ahead):
            for i in cutlass.range(tiles + 1, unroll=1):
                if i < tiles:
                    self._bring(source, tiles - 1 - i, 0)
                if i > 0:
                    self._bring(source, tiles - i, 1)
        else:
            for i in cutlass.range(tiles, unroll=1):
                for turn in range_constexpr(self.turns):
                    self._bring(source, tiles - 1 - i, turn)

    @cute.jit
    def _bring(self, source: Any, tile: Int32, turn: cutlass.Constexpr[int]) -> None:
        """Bring ``tile`` of ``source``, of K and V by turns the one whose ``turn`` it is, to the next stage."""
        stage = self.state[0]
        full = self.barriers + stage
        cute.arch.mbarrier_wait(full + self.stages, self.state[1] & 1 ^ 1)
        target = self.tiles + cute.assume(stage * self.nbytes, divby=256)
        source.bring(tile, turn, target, full)
        self._step()

    def wait(self) -> Int32:
        """Wait for the next tile; its stage."""
        stage = self.state[0]
        cute.arch.mbarrier_wait(self.barriers + stage, self.state[1] & 1)
        return stage

    def wait_values(self, stage: Int32) -> Int32:
        """The stage of V of the tile whose K is in ``stage``; where they take turns, K's is given back."""
        if const_expr(self.turns == 1):
            return stage
        self.release()
        return self.wait()

    def take(self) -> Int32:
        """Wait for the next tile and go on to the one after it; its stage, for `give_back`."""
        stage = self.wait()
        self._step()
        return stage

    def release(self) -> None:
        """Give back the stage of the tile last waited for, which the warp has read, and go on to the next."""
        self.give_back(self.state[0])
        self._step()

    @cute.jit
    def give_back(self, stage: Int32) -> None:
        """The warp has read the tile in ``stage``."""
        # In a cluster a lane for each CTA. What is released is reads of the warp's own CTA, so that scope cta will do;
        # scope cluster would be a MEMBAR of the whole GPU.
        if const_expr(self.cluster == 1):
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(self.barriers + (stage + self.stages))
        else:
            if lane_index() < self.cluster:
                cute.arch.mbarrier_arrive(self.barriers + (stage + self.stages), lane_index())

    @cute.jit
    def _step(self) -> None:
        if const_expr(self.stages == 1):
            self.state[1] = self.state[1] ^ 1
        else:
            following = self.state[0] + 1
            if following == self.stages:
                following = Int32(0)
                self.state[1] = self.state[1] ^ 1
            self.state[0] = following
