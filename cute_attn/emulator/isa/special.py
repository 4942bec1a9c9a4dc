"""Special registers. Clocks count scheduler steps of nobody: they only ever grow."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from ..registry import special
from ..wave import Group

_ticks = itertools.count(1)
_ZERO = np.uint32(0)


def _axis(name: str, axis: int) -> None:
    special(f"%tid.{name}")(lambda g: g.take(g.wave.thread_index[axis]))
    special(f"%ctaid.{name}")(lambda g: g.take(g.wave.cta_index[axis]))
    special(f"%ntid.{name}")(lambda g: np.uint32(g.wave.block[axis]))
    special(f"%nctaid.{name}")(lambda g: np.uint32(g.wave.grid[axis]))
    special(f"%cluster_ctaid.{name}")(lambda g: g.take(g.wave.cta_index[axis]) % np.uint32(g.wave.cluster[axis]))
    special(f"%cluster_nctaid.{name}")(lambda g: np.uint32(g.wave.cluster[axis]))
    special(f"%clusterid.{name}")(lambda g: g.take(g.wave.cta_index[axis]) // np.uint32(g.wave.cluster[axis]))
    special(f"%nclusterid.{name}")(lambda g: np.uint32(g.wave.grid[axis] // g.wave.cluster[axis]))


for _number, _name in enumerate("xyz"):
    _axis(_name, _number)


@special("%laneid")
def laneid(group: Group) -> Any:
    return (group.take(group.wave.thread_of_lane) % 32).astype(np.uint32)


@special("%warpid")
def warpid(group: Group) -> Any:
    return (group.take(group.wave.thread_of_lane) // 32).astype(np.uint32)


@special("%nwarpid")
def nwarpid(group: Group) -> Any:
    return np.uint32(group.wave.cta_lanes // 32)


@special("%lanemask_eq")
def lanemask_eq(group: Group) -> Any:
    return np.uint32(1) << laneid(group)


@special("%lanemask_lt")
def lanemask_lt(group: Group) -> Any:
    return lanemask_eq(group) - np.uint32(1)


@special("%lanemask_le")
def lanemask_le(group: Group) -> Any:
    return lanemask_lt(group) | lanemask_eq(group)


@special("%lanemask_ge")
def lanemask_ge(group: Group) -> Any:
    return ~lanemask_lt(group)


@special("%lanemask_gt")
def lanemask_gt(group: Group) -> Any:
    return ~lanemask_le(group)


@special("%clock_hi")
def clock_high(group: Group) -> Any:
    return _ZERO


@special("%clock")
def clock(group: Group) -> Any:
    return np.uint32(next(_ticks) & 0xFFFF_FFFF)


@special("%globaltimer_lo")
def timer_low(group: Group) -> Any:
    return clock(group)


@special("%globaltimer_hi")
def timer_high(group: Group) -> Any:
    return _ZERO


@special("%clock64", "%globaltimer")
def clock64(group: Group) -> Any:
    return np.uint64(next(_ticks))


@special("%cluster_ctarank")
def rank_in_cluster(group: Group) -> Any:
    """Rank of the CTA; CTAs of a cluster stand together in a wave."""
    return (group.cta % group.wave.cluster_size).astype(np.uint32)


@special("%cluster_nctarank")
def cluster_size(group: Group) -> Any:
    return np.uint32(group.wave.cluster_size)


@special("%is_explicit_cluster")
def is_explicit_cluster(group: Group) -> Any:
    return np.uint32(group.wave.cluster_size > 1)


@special("%smid", "%gridid")
def zero(group: Group) -> Any:
    return _ZERO


@special("%nsmid")
def one(group: Group) -> Any:
    return np.uint32(1)


@special("%total_smem_size")
def shared_size(group: Group) -> Any:
    return np.uint32(group.wave.shared_bytes)


@special("%aggr_smem_size")
def shared_size_with_reserved(group: Group) -> Any:
    """What the CTA occupies: its own, and the KiB that the system keeps in every CTA since sm_80."""
    return np.uint32(group.wave.shared_bytes + 1024)


@special("%dynamic_smem_size")
def dynamic_shared_size(group: Group) -> Any:
    return np.uint32(max(group.wave.shared_bytes - group.wave.kernel.dynamic_shared_start, 0))
