"""KV tiles on their way from global to shared memory, brought by a producer thread: a ring of stages and barriers."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, const_expr
from cutlass.cute.nvgpu import cpasync

from .operand_planes import lane_index

__all__ = ["KvRing"]

BARRIER_BYTES = 8
"""A 64-bit mbarrier."""


@dataclass(frozen=True)
class KvRing:
    """`stages` tiles in shared memory, each with two barriers: the tile has arrived, and nobody reads it any more.

                  full                                              empty
        arrive    the producer, once, and the bytes of the copy     every consumer warp, once
        wait      consumers, before they read the tile              the producer, before it requests the next tile

    A stage is used every `stages` tiles, each use ends a phase of both barriers. Every role steps through the stages by
    itself: ``produce`` is called by one thread, ``wait`` and ``release`` by whole warps.

    tiles:    shared memory, `stages`·`nbytes` bytes, 256-byte aligned
    barriers: shared memory, 16·`stages` bytes: the full ones, then the empty ones
    state:    two int32 registers: the stage to be used next, and the parity of its phase
    nbytes:   bytes of a tile
    """

    tiles: cute.Pointer
    barriers: cute.Pointer
    state: cute.Tensor
    nbytes: cutlass.Constexpr[int]
    stages: cutlass.Constexpr[int]

    @staticmethod
    def create(tiles: cute.Pointer, barriers: cute.Pointer, nbytes: int, stages: int) -> KvRing:
        """A role's view of the ring, at the first stage."""
        state = cute.make_rmem_tensor((2,), Int32)
        state[0] = Int32(0)
        state[1] = Int32(0)
        return KvRing(tiles, barriers, state, nbytes, stages)

    @staticmethod
    def barrier_bytes(stages: int) -> int:
        """Shared memory of the barriers."""
        return 2 * stages * BARRIER_BYTES

    def initialise(self, consumer_warps: int) -> None:
        """Set up the barriers: one thread does, and a barrier of the whole CTA follows."""
        for stage in range(self.stages):
            cute.arch.mbarrier_init(self.barriers + stage, 1)
            cute.arch.mbarrier_init(self.barriers + (self.stages + stage), consumer_warps)
        cute.arch.mbarrier_init_fence()

    @cute.jit
    def produce(self, images: cute.Pointer, tiles: Int32) -> None:
        """Bring the tiles at ``images`` (global, 16-byte aligned), from the last of ``tiles`` to the first."""
        atom = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Uint8, num_bits_per_copy=8 * self.nbytes)
        whole = cute.make_layout(self.nbytes)
        for i in cutlass.range(tiles, unroll=1):
            stage = self.state[0]
            full = self.barriers + stage
            cute.arch.mbarrier_wait(full + self.stages, self.state[1] ^ 1)
            cute.arch.mbarrier_arrive_and_expect_tx(full, self.nbytes)
            offset = cute.assume(Int64(tiles - 1 - i) * self.nbytes, divby=16)
            source = cute.make_tensor(images + offset, whole)
            target = cute.make_tensor(self.tiles + cute.assume(stage * self.nbytes, divby=256), whole)
            cute.copy(atom, source, target, mbar_ptr=full)
            self._step()

    def wait(self) -> Int32:
        """Wait for the next tile; its stage."""
        stage = self.state[0]
        cute.arch.mbarrier_wait(self.barriers + stage, self.state[1])
        return stage

    @cute.jit
    def release(self) -> None:
        """Give back the stage of the tile last waited for, which the warp has read."""
        if lane_index() == 0:
            cute.arch.mbarrier_arrive(self.barriers + (self.state[0] + self.stages))
        self._step()

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
