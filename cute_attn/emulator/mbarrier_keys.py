"""From addresses to mbarriers: the checks that every instruction and copy that names one passes through."""

from __future__ import annotations

from typing import Any

import numpy as np

from .access import active, check_alignment, cluster_cta, position_of, shared_address, shared_elements
from .errors import BarrierMismatch
from .mbarriers import Mbarriers
from .memory import CLUSTER_SHIFT, Array
from .wave import Group


def mbarrier_keys(
    group: Group, address: Any, mask: Any, index: int, verb: str, *, known: bool = True
) -> tuple[Mbarriers, Array, Array | None]:
    """(the wave's barriers, keys of the lanes that take part, their positions); checks that barriers are there."""
    lanes, positions = active(group, address, mask)
    table, keys = keys_of(group, shared_address(group, lanes, positions, index), positions, index, verb, known=known)
    return table, keys, positions


def keys_of(
    group: Group, lanes: Array, positions: Array | None, index: int, verb: str, *, known: bool = True
) -> tuple[Mbarriers, Array]:
    """The same for uint32 addresses of the lanes at `positions`, which may name a lane more than once."""
    table = Mbarriers.of(group.wave)
    check_alignment(group, lanes, 8, positions, index)
    if not lanes.size:
        return table, np.zeros(0, np.int64)
    if int(lanes.max()) >> CLUSTER_SHIFT:
        cta, offset = cluster_cta(group, lanes, positions, index, verb)
    else:
        cta, offset = group.values_at(group.cta, positions), lanes
    if int(offset.max()) + 8 > group.wave.shared.size:
        shared_elements(group, lanes, 8, positions, index, verb)  # reports it
    keys = table.key(cta, offset)
    if known and (unknown := table.count[keys] == 0).any():
        first = int(np.argmax(unknown))
        group.fail(
            BarrierMismatch,
            index,
            position_of(positions, first),
            f"{verb} at the {table.describe(int(keys[first]))}, which nobody has initialised",
        )
    return table, keys
