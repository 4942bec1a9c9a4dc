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
    """All heads in groups of equal size whose KV tiles fit in L2 together, one group after the other. Of a group, all
    heads' blocks at the same place; the places from the first to the last, or if causal from the last, whose rows see
    most keys, so that what is started last is done soon.

    heads: of the whole batch; together: of a group, the last one may have fewer; blocks: of a head
    """

    heads: Int32
    together: Int32
    blocks: Int32

    @staticmethod
    def create(heads: Int32, blocks: Int32, head_bytes: Int64, l2_bytes: int) -> WorkOrder:
        """head_bytes: of one head's KV tiles; l2_bytes: what a group's may take."""
        fitting = cutlass.min(l2_bytes // head_bytes, Int64(heads)).to(Int32)
        groups = cute.ceil_div(heads, cutlass.max(fitting, cute.ceil_div(heads, _LARGEST_GRID_Z)))
        return WorkOrder(heads, cute.ceil_div(heads, groups), blocks)

    @property
    def grid(self) -> tuple[Int32, Int32, Int32]:
        """A CTA for each block, and for each that the last group lacks. They start in the order x, y, z."""
        return self.together, self.blocks, cute.ceil_div(self.heads, self.together)

    @staticmethod
    def at_grid(x: Int32, y: Int32, z: Int32, last_first: bool) -> tuple[Int32, Int32]:
        """(head, block) of a CTA of that grid; head >= `heads` where the last group lacks it."""
        together, blocks, _ = cute.arch.grid_dim()
        block = blocks - 1 - y if last_first else y
        return z * together + x, block

    @property
    def count(self) -> Int32:
        """Blocks of all heads."""
        return self.heads * self.blocks

    def at(self, index: Int32, last_first: bool) -> tuple[Int32, Int32]:
        """(head, block) of the ``index``-th of `count`."""
        group = self.together * self.blocks
        first = index // group * self.together
        here = cutlass.min(self.together, self.heads - first)
        place = index % group
        y = place // here
        block = self.blocks - 1 - y if last_first else y
        return first + place % here, block
