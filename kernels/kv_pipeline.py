"""Tile images on their way from global to shared memory: a ring of cp.async stages filled ahead of their use."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, Uint8, const_expr, range_constexpr

from .atoms import cp_async_atom

__all__ = ["KvPipeline"]

_CHUNK = 16


@dataclass(frozen=True)
class KvPipeline:
    """A CTA's KV tiles, visited from the last to the first, `stages` - 1 of them in flight.

    A tile is `nbytes` contiguous bytes on both sides. Thread i moves the 16-byte chunks i, i + threads, …, to the same
    offsets they come from, so that a whole tile costs a thread one source address, one destination address and
    immediates. All threads of the CTA call `start` and `next_tile` together.

    ring:    shared memory, `stages`·`nbytes` bytes, 256-byte aligned
    thread:  index in the CTA
    state:   one int32 register: offset in the ring of the stage to be used next
    source:  one int64 register: address of this thread's first chunk of the next tile to request
    nbytes:  bytes of a tile
    """

    ring: cute.Pointer
    thread: Int32
    state: cute.Tensor
    source: cute.Tensor
    nbytes: cutlass.Constexpr[int]
    stages: cutlass.Constexpr[int]
    threads: cutlass.Constexpr[int]

    @staticmethod
    def create(
        image: cute.Pointer, ring: cute.Pointer, thread: Int32, nbytes: int, stages: int, threads: int
    ) -> KvPipeline:
        """image: first byte of the last KV tile that the CTA visits (global, 16-byte aligned)."""
        state = cute.make_rmem_tensor((1,), Int32)
        source = cute.make_rmem_tensor((1,), Int64)
        state[0] = Int32(0)
        source[0] = image.toint() + Int64(thread * _CHUNK)
        return KvPipeline(ring, thread, state, source, nbytes, stages, threads)

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
            source = cute.make_ptr(Uint8, self.source[0], cute.AddressSpace.gmem, assumed_align=_CHUNK)
            target = self.ring + cute.assume(stage + self.thread * _CHUNK, divby=_CHUNK)
            self._copy(source, target)
            self.source[0] = self.source[0] - self.nbytes
        cute.arch.cp_async_commit_group()

    @cute.jit
    def _copy(self, source: cute.Pointer, target: cute.Pointer) -> None:
        atom = cp_async_atom()
        chunks = self.nbytes // _CHUNK
        rounds = chunks // self.threads
        for i in range_constexpr(rounds):
            self._copy_chunk(atom, source, target, i * self.threads * _CHUNK)
        if const_expr(chunks % self.threads != 0):  # noqa: SIM102 (decided while tracing, the inner one is not)
            if self.thread < chunks % self.threads:
                self._copy_chunk(atom, source, target, rounds * self.threads * _CHUNK)

    def _copy_chunk(self, atom: cute.CopyAtom, source: cute.Pointer, target: cute.Pointer, offset: int) -> None:
        chunk = cute.make_layout(_CHUNK)
        cute.copy(atom, cute.make_tensor(source + offset, chunk), cute.make_tensor(target + offset, chunk))
