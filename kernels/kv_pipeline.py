"""KV tiles on their way from global to shared memory, filled by cp.async ahead of their use: a ring, or one tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr, range_constexpr

__all__ = ["KvPipeline", "SplitPipeline"]


@dataclass(frozen=True)
class KvPipeline:
    """A CTA's KV tiles, visited from the last to the first, `stages` - 1 of them in flight.

    All threads of the CTA call `start` and `next_tile` together.

    source: `ImageSource`, `RowSource` or `DeltaSource`: ``copy`` requests the next tile, beginning with the last one
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
        """Nothing requested yet; stages >= 2."""
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

    def await_values(self, tile: Int32) -> None:
        """V came with K."""

    @cute.jit
    def _request(self, stage: Int32, wanted: Boolean) -> None:
        """Ask for the next tile if ``wanted``; otherwise the group is empty, so that groups count tiles."""
        if wanted:
            self.source.copy(self.ring, stage)
        cute.arch.cp_async_commit_group()


@dataclass(frozen=True)
class SplitPipeline:
    """The same for tiles of which shared memory holds one: K and V are loaded apart, each while the other is in use.

                  next_tile(i)            await_values(i)         next_tile(i - 1)
        copies    V of i ───────────────→ K of i - 1 ───────────→ V of i - 1 …
        warps     S = Q·Kᵀ, P of tile i   O += P·V of tile i      S of tile i - 1 …

    Both calls wait for the one copy under way, and their barrier says that every thread's chunks have arrived, and that
    no warp reads any more what the next copy overwrites.

    source: as of `KvPipeline`: ``copy_keys`` and ``copy_values`` in turn, from the last tile on
    buffer: shared memory, one tile, 256-byte aligned
    """

    source: Any
    buffer: cute.Pointer

    @cute.jit
    def start(self, tiles: Int32) -> None:
        """Request K of the last of ``tiles`` tiles."""
        if tiles > 0:
            self.source.copy_keys(self.buffer)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def next_tile(self, tile: Int32) -> cute.Pointer:
        """Wait for K of ``tile``, request its V, return the tile's shared memory."""
        cute.arch.cp_async_wait_group(0)
        cute.arch.barrier()
        self.source.copy_values(self.buffer)
        cute.arch.cp_async_commit_group()
        return self.buffer

    @cute.jit
    def await_values(self, tile: Int32) -> None:
        """Wait for V of ``tile``, request K of the one before it."""
        cute.arch.cp_async_wait_group(0)
        cute.arch.barrier()
        if tile > 0:
            self.source.copy_keys(self.buffer)
        cute.arch.cp_async_commit_group()
