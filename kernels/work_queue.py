"""Which block of query rows a persistent CTA works on next: taken by its producer warp, told to its consumers."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from .kv_ring import BARRIER_BYTES
from .operand_planes import lane_index
from .ptx import take_ticket

__all__ = ["WorkQueue"]


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

    @staticmethod
    def nbytes() -> int:
        """Shared memory of the mailbox."""
        return 5 * BARRIER_BYTES

    def initialise(self, consumer_warps: int) -> None:
        """Set up the barriers: one thread does; a fence and a barrier of the whole CTA follow."""
        for slot in range(2):
            cute.arch.mbarrier_init(self.mailbox + slot, 1)
            cute.arch.mbarrier_init(self.mailbox + (2 + slot), consumer_warps)

    @cute.jit
    def put(self, number: Int32) -> None:
        """The producer's: ``number`` is next."""
        if const_expr(self.persistent):
            slot, parity = self._place()
            cute.arch.mbarrier_wait(self.mailbox + (slot + 2), parity ^ 1)
            if lane_index() == 0:
                self._numbers()[slot] = number
                cute.arch.mbarrier_arrive(self.mailbox + slot)
            self.phases[0] = self.phases[0] + 2

    @cute.jit
    def after(self, number: Int32) -> Int32:
        """The producer's number after ``number``."""
        following = self.count
        if const_expr(self.persistent):
            following = number + cute.arch.grid_dim()[0]
            if const_expr(self.tickets is not None):
                if lane_index() == 0:
                    following = cute.arch.grid_dim()[0] + take_ticket(self.tickets.iterator, self.count)
                following = cute.arch.make_warp_uniform(following)
        return following

    @cute.jit
    def get(self) -> Int32:
        """A consumer warp's number, until it is done with it."""
        number = self.first()
        if const_expr(self.persistent):
            slot, parity = self._place()
            cute.arch.mbarrier_wait(self.mailbox + slot, parity)
            number = cute.arch.warp_redux_sync(self._numbers()[slot], "min")
        return number

    @cute.jit
    def get_next(self) -> Int32:
        """A consumer warp is done with its number; the next one."""
        number = self.count
        if const_expr(self.persistent):
            slot, _ = self._place()
            if lane_index() == 0:
                cute.arch.mbarrier_arrive(self.mailbox + (slot + 2))
            self.phases[0] = self.phases[0] + 2
            number = self.get()
        return number

    def first(self) -> Int32:
        """The CTA's first number."""
        return cute.arch.block_idx()[0]

    def _place(self) -> tuple[Int32, Int32]:
        """Slot of this turn, and the parity of its phase."""
        return self.phases[0] >> 1 & 1, self.phases[0] >> 2 & 1

    def _numbers(self) -> cute.Tensor:
        return cute.make_tensor(cute.recast_ptr(self.mailbox + 4, dtype=Int32), cute.make_layout(2))
