"""In which order blocks of query rows are worked on, so that the KV tiles that they share are in L2 meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

__all__ = ["WorkOrder"]

# CUDA C++ Programming Guide, technical specifications.
_LARGEST_GRID_Z = 65535


@dataclass(frozen=True)
class WorkOrder:
    """All heads in groups whose KV tiles fit in L2 together, one group after the other. Of a group, all heads' blocks
    at the same place; the places from the first to the last, or if causal from the last, which sees most keys.

    together: heads of a group; blocks: of a head; groups: whose last one may have fewer heads
    """

    together: Int32
    blocks: Int32
    groups: Int32

    @staticmethod
    def create(heads: Int32, blocks: Int32, head_bytes: Int64, l2_bytes: int) -> WorkOrder:
        """heads: of the whole batch; head_bytes: of one head's KV tiles; l2_bytes: what a group's may take."""
        fitting = cutlass.min(l2_bytes // head_bytes, Int64(heads)).to(Int32)
        together = cutlass.max(fitting, cute.ceil_div(heads, _LARGEST_GRID_Z))
        return WorkOrder(together, blocks, cute.ceil_div(heads, together))

    @property
    def grid(self) -> tuple[Int32, Int32, Int32]:
        """A CTA for each block. They start in the order x, y, z."""
        return self.together, self.blocks, self.groups

    def item(self, place: tuple, last_first: bool) -> tuple[Int32, Int32]:
        """(head, block) of the CTA at ``place`` of the grid. The last group may be too large: head >= `heads`."""
        x, y, z = place
        block = self.blocks - 1 - y if last_first else y
        return z * self.together + x, block
