"""From addresses to elements: the checks that every load, store and copy passes through, and their reports.

A *place* is (views by access size, element index, CTA-relative low and high offset) of the lanes that take part.
All functions raise `OutOfBounds` or `Misaligned` with the first offending lane.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .assembly import EXIT
from .errors import ExitedCta, Misaligned, OutOfBounds, UninitializedShared
from .memory import CLUSTER_SHIFT, LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW, Array
from .wave import Group

LOG2 = {1: 0, 2: 1, 4: 2, 8: 3, 16: 4}


def active(group: Group, address: Any, mask: Any) -> tuple[Array, Array | None]:
    """Addresses of the lanes that take part, [n], and their positions in the group (None: all of them)."""
    address = group.spread(address)
    if mask is None:
        return address, None
    mask = group.spread(mask)
    if mask.all():
        return address, None
    positions = np.flatnonzero(mask)
    return address[positions], positions


def position_of(positions: Array | None, n: int) -> int:
    """The position in the group of the n-th lane that takes part."""
    return n if positions is None else int(positions[n])


def check_alignment(group: Group, address: Array, nbytes: int, positions: Array | None, index: int) -> None:
    if nbytes == 1 or not address.size:
        return
    low_bits = address.dtype.type(nbytes - 1)
    if np.bitwise_or.reduce(address) & low_bits:
        bad = int(np.argmax((address & low_bits) != 0))
        group.fail(
            Misaligned,
            index,
            position_of(positions, bad),
            f"misaligned access: address {int(address[bad]):#x} is not a multiple of {nbytes}",
        )


def global_elements(
    group: Group,
    address: Array,
    nbytes: int,
    positions: Array | None,
    index: int,
    verb: str,
    touched: int | None = None,
) -> Array:
    """Checks uint64 process addresses; element indices into `group.wave.memory.views[nbytes]`.

    touched: how many of the `nbytes` are really accessed, where that is less.
    """
    memory = group.wave.memory
    size = nbytes if touched is None else touched
    if (bad := memory.outside(address, size)) is not None:
        first = int(np.argmax(bad))
        where = memory.describe(int(address[first]), size)
        group.fail(
            OutOfBounds,
            index,
            position_of(positions, first),
            f"global {verb} of {size} bytes at {int(address[first]):#x} is out of bounds: {where}"
            f" ({int(bad.sum())} lanes in all)",
        )
    check_alignment(group, address, nbytes, positions, index)
    if (traffic := group.wave.traffic) is not None:
        traffic.add(group, address, positions, verb)
    return memory.index(address, nbytes)


def shared_address(group: Group, address: Array, positions: Array | None, index: int) -> Array:
    """32-bit shared addresses of generic ones; those of the right width already stay as they are."""
    if address.dtype != np.uint64:
        return address
    offset = address - np.uint64(SHARED_WINDOW)
    if offset.size and (bad := offset >= np.uint64(1 << 32)).any():
        first = int(np.argmax(bad))
        position = position_of(positions, first)
        group.fail(OutOfBounds, index, position, f"address {int(address[first]):#x} is not in shared memory")
    return offset.astype(np.uint32)


def shared_elements(
    group: Group, address: Array, nbytes: int, positions: Array | None, index: int, verb: str
) -> tuple[Array, int, int]:
    """Checks shared addresses (uint32); (element indices into `wave.shared.views[nbytes]`, low, high offset)."""
    shared = group.wave.shared
    if not address.size:
        return np.zeros(0, np.int64), 0, 0
    base = group.shared_base(nbytes)
    if positions is not None:
        base = base[positions]
    if int(address.max()) >> CLUSTER_SHIFT:
        cta, address = cluster_cta(group, address, positions, index, verb)
        base = shared.base(cta, nbytes)
    low, high = int(address.min()), int(address.max()) + nbytes
    if high > shared.size:
        bad = int(np.argmax(address > max(shared.size - nbytes, -1))) if shared.size >= nbytes else 0
        group.fail(
            OutOfBounds,
            index,
            position_of(positions, bad),
            f"shared {verb} of {nbytes} bytes at offset {int(address[bad]):#x} is out of bounds: "
            f"the CTA has {shared.size} bytes of shared memory",
        )
    check_alignment(group, address, nbytes, positions, index)
    return (address >> address.dtype.type(LOG2[nbytes])).astype(np.int64) + base, low, high


def cluster_cta(
    group: Group, address: Array, positions: Array | None, index: int, verb: str
) -> tuple[Array, NDArray[np.uint32]]:
    """(CTA of the wave, offset in its shared memory) of shared::cluster addresses; the CTA must be running."""
    wave = group.wave
    own = group.values_at(group.cta, positions)
    rank = (address >> address.dtype.type(CLUSTER_SHIFT)).astype(np.int64) - 1
    if (bad := rank >= wave.cluster_size).any():
        first = int(np.argmax(bad))
        group.fail(
            OutOfBounds,
            index,
            position_of(positions, first),
            f"shared {verb} in the CTA of rank {int(rank[first])}: the cluster has {wave.cluster_size} CTAs",
        )
    cta = np.where(rank < 0, own, own // wave.cluster_size * wave.cluster_size + rank)
    running: Array = np.any(wave.pc.reshape(-1, wave.cta_lanes) < EXIT, axis=1)
    alive: Array = running[cta]
    if not alive.all():
        first = int(np.argmin(alive))
        group.fail(
            ExitedCta,
            index,
            position_of(positions, first),
            f"shared {verb} in the CTA of rank {int(cta[first]) % wave.cluster_size} of the cluster, which has exited: "
            "a barrier of the cluster before the exit keeps its shared memory alive",
        )
    offset = address & address.dtype.type((1 << CLUSTER_SHIFT) - 1)
    return cta, offset.astype(np.uint32)


def require_written(
    group: Group, elements: Array, nbytes: int, low: int, high: int, positions: Array | None, index: int
) -> None:
    """Reports a read of shared bytes that nobody wrote (unless the launch lets them read as poison)."""
    if group.wave.poison or not elements.size:
        return
    if (bad := group.wave.shared.unwritten(elements, nbytes, low, high)) is not None:
        first = int(np.argmax(bad))
        offset = int(elements[first]) * nbytes % group.wave.shared.stride
        group.fail(
            UninitializedShared,
            index,
            position_of(positions, first),
            f"read of {nbytes} bytes of shared memory at offset {offset:#x} that nobody wrote"
            f" ({int(bad.sum())} accesses in all)",
        )


def local_elements(group: Group, address: Array, nbytes: int, positions: Array | None, index: int, verb: str) -> Array:
    """Checks thread-relative addresses; element indices into `wave.local.views[nbytes]`."""
    local = group.wave.local
    if not address.size:
        return np.zeros(0, np.int64)
    if int(address.max()) + nbytes > local.size:
        bad = int(np.argmax(address))
        group.fail(
            OutOfBounds,
            index,
            position_of(positions, bad),
            f"local {verb} of {nbytes} bytes at offset {int(address[bad]):#x} is out of bounds: "
            f"the thread has {local.size} bytes of local memory",
        )
    check_alignment(group, address, nbytes, positions, index)
    base = group.local_base(nbytes)
    if positions is not None:
        base = base[positions]
    return (address >> address.dtype.type(LOG2[nbytes])).astype(np.int64) + base


def split_generic(group: Group, address: Any, mask: Any) -> list[tuple[str, Array, Any]]:
    """Generic addresses by window: [(space, addresses relative to the window, mask)], usually one entry."""
    address = group.spread(address)
    window = address >> np.uint64(56)
    taking = group.taking(mask)
    names = {SHARED_WINDOW >> 56: "shared", LOCAL_WINDOW >> 56: "local", PARAMETER_WINDOW >> 56: "param"}
    result = []
    for number in np.unique(window[taking]):
        space = names.get(int(number), "global")
        inside = taking & (window == number)
        offset = address if space == "global" else address & np.uint64((1 << 56) - 1)
        result.append((space, offset, None if inside.all() else inside))
    return result
