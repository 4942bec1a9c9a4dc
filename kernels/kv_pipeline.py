"""KV tiles on their way from global to shared memory: a ring of cp.async stages filled ahead of their use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr, range_constexpr

__all__ = ["KvPipeline"]


@dataclass(frozen=True)
class KvPipeline:
    """A CTA's KV tiles, visited from the last to the first, `stages` - 1 of them in flight.

    All threads of the CTA call `start` and `next_tile` together.

    source: `ImageSource` or `RowSource`: ``copy`` requests the next tile, in an order that starts with the last one
    ring:   shared memory, `stages`·`nbytes` bytes, 256-byte aligned
    state:  one int32 register: offset in the ring of the stage to be used next
    nbytes: bytes of a tile
    """

    source: Any
    ring: cute.Pointer
    state: cute.Tensor
    nbytes: cutlass.Constexpr[int]
    stages: cutlass.Constexpr[int]

    @staticmethod
    def create(source: Any, ring: cute.Pointer, nbytes: int, stages: int) -> KvPipeline:
        """Nothing requested yet."""
        state = cute.make_rmem_tensor((1,), Int32)
        state[0] = Int32(0)
        return KvPipeline(source, ring, state, nbytes, stages)

    @cute.jit
    def start(self, tiles: Int32) -> None:
        """Request the first `stages` - 1 of ``tiles`` tiles."""
        for stage in range_constexpr(self.stages - 1):
            self._request(Int32(stage * self.nbytes), stage < tiles)

    @cute.jit
    def next_tile(self, tile: Int32) -> cute.Pointer:
        """Wait for ``tile``, request the one `stages` - 1 further, return the tile's shared memory.

        The barrier says two things at once: every thread's chunks of this tile have arrived, and no warp reads the
        previous tile any more, whose stage the request overwrites.
        """
        cute.arch.cp_async_wait_group(self.stages - 2)
        cute.arch.barrier()
        stage = self.state[0]
        more = tile >= self.stages - 1
        last = (self.stages - 1) * self.nbytes
        if const_expr(self.stages == 2):
            following = last - stage
            self._request(following, more)
        else:
            self._request(last if stage == 0 else stage - self.nbytes, more)
            following = Int32(0) if stage == last else stage + self.nbytes
        self.state[0] = following
        return self.ring + cute.assume(stage, divby=256)

    @cute.jit
    def _request(self, stage: Int32, wanted: Boolean) -> None:
        """Ask for the next tile if ``wanted``; otherwise the group is empty, so that groups count tiles."""
        if wanted:
            self.source.copy(self.ring, stage)
        cute.arch.cp_async_commit_group()
