"""Which block of query rows a persistent CTA, or cluster, works on next: taken by its producer, told to consumers."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from .kv_ring import BARRIER_BYTES
from .operand_planes import lane_index
from .ptx import take_ticket

__all__ = ["WorkQueue"]

_NUMBER_BYTES = 4


@dataclass(frozen=True)
class WorkQueue:
    """Numbers of blocks 0 … count - 1, from the producer to the consumers of a CTA, one ahead.

    The first number of a CTA is its place in the grid. If it is not ``persistent`` it is the only one. Of blocks that
    are alike, the next one is as many further as the grid has CTAs; others are drawn by whichever CTA is free first.
    Numbers from ``count`` on end the work.

                  full[slot]                    empty[slot]
        arrive    the producer's first lane     every consumer warp
        wait      consumers                     the producer, before it writes another number there

    Numbers lie in two slots by turns, so that consumers can look again at what they work on: no register holds it.

    The CTAs of a `cluster` work on the same numbers, which the first one's producer takes and writes into the slots of
    all of them (st.async). Its empty barriers are the ones at which all consumers arrive, and the others' producers.

    mailbox:  shared memory, 40 bytes, 8-byte aligned: the mbarriers full and empty, and the numbers
    tickets:  global int32 (1,): how many were drawn, 0 at launch and again after it; None if nothing is drawn
    phases:   int32 register, whose bits from 1 on count the numbers that the role has done with; bit 0 is the ring's:
              there is no other register for them in the main loop
    """

    mailbox: cute.Pointer
    tickets: cute.Tensor | None
    phases: cute.Tensor
    count: Int32
    persistent: cutlass.Constexpr[bool]
    cluster: cutlass.Constexpr[int]

    @staticmethod
    def nbytes() -> int:
        """Shared memory of the mailbox."""
        return 5 * BARRIER_BYTES

    def initialise(self, consumer_warps: int) -> None:
        """Set up the barriers: one thread does; a fence and a barrier of the whole cluster follow."""
        for slot in range(2):
            cute.arch.mbarrier_init(self.mailbox + slot, 1)
            cute.arch.mbarrier_init(self.mailbox + (2 + slot), self.cluster * consumer_warps + self.cluster - 1)

    @cute.jit
    def put(self, number: Int32) -> Int32:
        """The producer's: ``number`` is next, or in a cluster what its first CTA says; which is returned."""
        if const_expr(self.persistent):
            slot, parity = self._place()
            if const_expr(self.cluster == 1):
                cute.arch.mbarrier_wait(self.mailbox + (slot + 2), parity ^ 1)
                if lane_index() == 0:
                    self._numbers()[slot] = number
                    cute.arch.mbarrier_arrive(self.mailbox + slot)
            else:
                number = self._put_to_all(number, slot, parity)
            self.phases[0] = self.phases[0] + 2
        return number

    @cute.jit
    def _put_to_all(self, number: Int32, slot: Int32, parity: Int32) -> Int32:
        full, empty = self.mailbox + slot, self.mailbox + (slot + 2)
        if cute.arch.block_idx_in_cluster() == 0:
            cute.arch.mbarrier_wait(empty, parity ^ 1)
        # The others' last number in this slot has come long since: they have read it.
        if lane_index() == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(full, _NUMBER_BYTES)
        if cute.arch.block_idx_in_cluster() == 0:
            if lane_index() < self.cluster:
                cute.arch.store_async_dsmem(self._numbers().iterator + slot, number, full, lane_index())
        else:
            number = self._read(slot, parity)
            self._done(slot)
        return number

    @cute.jit
    def after(self, number: Int32) -> Int32:
        """The producer's number after ``number``."""
        following = self.count
        if const_expr(self.persistent):
            following = number + self._workers()
            if const_expr(self.tickets is not None):
                if self._takes():
                    following = self._workers() + take_ticket(self.tickets.iterator, self.count)
                following = cute.arch.make_warp_uniform(following)
        return following

    @cute.jit
    def get(self) -> Int32:
        """A consumer warp's number, until it is done with it."""
        number = self.first()
        if const_expr(self.persistent):
            number = self._read(*self._place())
        return number

    @cute.jit
    def get_next(self) -> Int32:
        """A consumer warp is done with its number; the next one."""
        number = self.count
        if const_expr(self.persistent):
            slot, _ = self._place()
            self._done(slot)
            self.phases[0] = self.phases[0] + 2
            number = self.get()
        return number

    def first(self) -> Int32:
        """The CTA's first number."""
        return cute.arch.block_idx()[0] if self.cluster == 1 else cute.arch.block_idx()[0] // self.cluster

    def _workers(self) -> Int32:
        """CTAs, or clusters, that share the numbers."""
        return cute.arch.grid_dim()[0] if self.cluster == 1 else cute.arch.grid_dim()[0] // self.cluster

    def _takes(self) -> Boolean:
        """Whether this lane of the producer draws for all others."""
        first_lane = lane_index() == 0
        return first_lane if self.cluster == 1 else first_lane & (cute.arch.block_idx_in_cluster() == 0)

    def _read(self, slot: Int32, parity: Int32) -> Int32:
        """Wait for the number in a slot; of lanes that all read the same, so that it is in a uniform register."""
        cute.arch.mbarrier_wait(self.mailbox + slot, parity)
        return cute.arch.warp_redux_sync(self._numbers()[slot], "min")

    @cute.jit
    def _done(self, slot: Int32) -> None:
        """The warp needs a slot's number no more."""
        if lane_index() == 0:
            if const_expr(self.cluster == 1):
                cute.arch.mbarrier_arrive(self.mailbox + (slot + 2))
            else:
                cute.arch.mbarrier_arrive(self.mailbox + (slot + 2), 0)

    def _place(self) -> tuple[Int32, Int32]:
        """Slot of this turn, and the parity of its phase."""
        return self.phases[0] >> 1 & 1, self.phases[0] >> 2 & 1

    def _numbers(self) -> cute.Tensor:
        return cute.make_tensor(cute.recast_ptr(self.mailbox + 4, dtype=Int32), cute.make_layout(2))
