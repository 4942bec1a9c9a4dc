"""Counts the bytes of global memory that a launch's instructions move, in the units in which a GPU moves them.

L1 and L2 serve a warp's access in sectors of 32 bytes, each once however many of its lanes ask for it. Fewer sectors
than these leave L2 for DRAM where caches hold what was read before; none of that is modelled.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from .memory import Array

if TYPE_CHECKING:
    from .wave import Group

SECTOR_BYTES = 32
_SECTOR_BITS = 43  # of a 48-bit address


class Traffic:
    """Bytes by "read", "write" and "atomic access", of ld, st, cp.async, atom and red; bulk copies are not counted."""

    def __init__(self) -> None:
        self.nbytes: Counter[str] = Counter()

    def add(self, group: Group, address: Array, positions: Array | None, verb: str) -> None:
        """An instruction of the group: checked, aligned addresses of the lanes that take part, or one for all."""
        sector = address // np.uint64(SECTOR_BYTES)
        if positions is None and address.size < group.size:
            count = group.warps.size
        else:
            warp = (group.lanes_at(positions) >> 5).astype(np.uint64)
            count = np.unique(warp << np.uint64(_SECTOR_BITS) | sector).size
        self.nbytes[verb] += count * SECTOR_BYTES
