"""Exchange of registers among the four lanes that share an accumulator's row."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32
from cutlass.cutlass_dsl import select_

from .operand_planes import lane_index

__all__ = ["quad_transpose"]


def quad_transpose(registers: list[Int32]) -> list[Int32]:
    """Lane t's register j becomes lane j's register t, t and j of four, by four shuffles. All lanes of a warp call.

    registers: four int32. One bit of both numbers at a time: of two lanes that differ in it, each gives the other one
    those of its registers whose number has the other lane's bit.
    """
    own = list(registers)
    for bit in (1, 2):
        odd = lane_index() & bit != 0
        for low in [j for j in range(4) if not j & bit]:
            first, second = own[low], own[low + bit]
            received = cute.arch.shuffle_sync_bfly(select_(odd, first, second), bit)
            own[low], own[low + bit] = select_(odd, received, first), select_(odd, second, received)
    return own
