"""Clusters of CTAs: mapa, getctarank and barrier.cluster.

An address of another CTA's shared memory carries that CTA's rank (see `memory.CLUSTER_SHIFT`); loads, stores, mbarriers
and bulk copies resolve it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..assembly import EXIT
from ..codegen import BlockBuilder
from ..errors import BarrierMismatch
from ..memory import CLUSTER_SHIFT, Array
from ..module import Instruction
from ..registry import EXPLAINERS, WAKERS, action, emits, helper
from ..wave import Group, Wave
from ..wave_state import WaveState
from .barrier import check_convergence

_RANK_MASK = ~np.uint64(0xFF << CLUSTER_SHIFT)
_MOST_RANK = np.uint32(0xFE)


# ---- addresses


@emits("mapa", types="u32 u64", modifiers="shared::cluster")
def mapa(b: BlockBuilder, i: Instruction) -> None:
    """The address of the same variable in the CTA of a rank: 32 bits in the shared window, or 64 bits generic."""
    dtype = "uint64" if i.parts[-1] == "u64" and "shared@cluster" not in i.parts else "uint32"
    address, rank = b.read(i.operands[1], dtype), b.read(i.operands[2], "uint32")
    b.write(i.operands[0], f"map_address({address}, {rank})", dtype)


@emits("getctarank", types="u32 u64", modifiers="shared::cluster")
def getctarank(b: BlockBuilder, i: Instruction) -> None:
    address = b.read(i.operands[1], "uint64" if i.parts[-1] == "u64" else "uint32")
    b.write(i.operands[0], f"rank_of_address(G, {address})", "uint32")


@helper
def map_address(address: Any, rank: Any) -> Any:
    """An address of a rank that the cluster does not have is found when it is used: programs compute more than that."""
    kind = address.dtype.type
    field = np.minimum(rank, _MOST_RANK).astype(kind) + kind(1)
    return (address & kind(_RANK_MASK & np.uint64(np.iinfo(kind).max))) | (field << kind(CLUSTER_SHIFT))


@helper
def rank_of_address(group: Group, address: Any) -> Any:
    kind = address.dtype.type
    rank = (address >> kind(CLUSTER_SHIFT)) & kind(0xFF)
    own = (group.cta % group.wave.cluster_size).astype(np.uint32)
    return np.where(rank == 0, own, (rank - kind(1)).astype(np.uint32))


# ---- barrier.cluster


class ClusterBarrier(WaveState):
    """Per lane: how often it has arrived and how often it has waited, and the instruction at which it waits now."""

    def __init__(self, wave: Wave) -> None:
        self.arrived, self.waited, self.index = np.zeros((3, wave.lanes), np.int64)


@emits("barrier.cluster.arrive", modifiers="aligned release relaxed", ends_block=True)
@emits("barrier.cluster.wait", modifiers="aligned acquire", ends_block=True)
def barrier_cluster(b: BlockBuilder, i: Instruction) -> None:
    b.take_guard()
    b.finish(f"('barrier.cluster', {b.mask}, {i.parts[2] == 'wait'}, {'aligned' in i.parts}, {i.index})", b.number + 1)


@action("barrier.cluster")
def at_cluster_barrier(
    wave: Wave, group: Group, block: int, guard: Any, waits: bool, aligned: bool, index: int
) -> None:
    """Arrives, or waits until every thread of the cluster that has not exited has arrived as often."""
    state = ClusterBarrier.of(wave)
    wave.pc[group.lanes] = block + 1
    taking = group.taking(guard)
    lanes = group.lane_numbers[taking]
    if not lanes.size:
        return
    if aligned:
        check_convergence(wave, group, lanes, index)
    ahead = state.arrived[lanes] - state.waited[lanes]
    if (wrong := ahead != int(waits)).any():
        position = int(np.flatnonzero(taking)[np.argmax(wrong)])
        what = "waits at the cluster's barrier without having arrived" if waits else "arrives twice without a wait"
        group.fail(BarrierMismatch, index, position, f"a thread {what}")
    if not waits:
        if wave.races is not None:
            relaxed = "relaxed" in wave.kernel.instructions[index].parts
            wave.races.arrive_at_cluster(lanes, state.arrived[lanes], relaxed=relaxed)
        if wave.trace is not None:
            wave.trace.arrive("barrier.cluster", 2 * len(wave.ctas), _round(wave, lanes, state.arrived), lanes)
        state.arrived[lanes] += 1
    else:
        state.waited[lanes] += 1
        state.index[lanes] = index
        wave.waiting[lanes] = True
    _release(wave)


def _round(wave: Wave, lanes: Array, rounds: Array) -> Array:
    """A number for this round of each lane's cluster, other than that of the next round."""
    return wave.cta_of_lane[lanes] // wave.cluster_size * 2 + rounds[lanes] % 2


def _release(wave: Wave) -> None:
    if (state := ClusterBarrier.known(wave)) is None:
        return
    by_cluster = (-1, wave.cluster_size * wave.cta_lanes)
    gone = wave.pc >= EXIT
    slowest = np.where(gone, np.iinfo(np.int64).max, state.arrived).reshape(by_cluster).min(1)
    free = (state.index > 0) & (state.waited <= np.repeat(slowest, by_cluster[1]))
    state.index[free] = 0
    wave.waiting[free] = False
    if wave.trace is not None and free.any():
        left = np.flatnonzero(free)
        wave.trace.release("barrier.cluster", _round(wave, left, state.waited - 1), left, "barrier.cluster")
    if wave.races is not None and free.any():
        lanes = np.flatnonzero(free)
        wave.races.leave_cluster(lanes, state.waited[lanes] - 1)


def _explain(wave: Wave) -> list[str]:
    if (state := ClusterBarrier.known(wave)) is None:
        return []
    lines = []
    waiting = state.index > 0
    for first in range(0, wave.lanes, wave.cluster_size * wave.cta_lanes):
        lanes = slice(first, first + wave.cluster_size * wave.cta_lanes)
        if not waiting[lanes].any():
            continue
        lane = first + int(np.argmax(waiting[lanes]))
        late = (wave.pc[lanes] < EXIT) & (state.arrived[lanes] < state.waited[lane])
        missing = first + np.flatnonzero(late)
        warps = sorted({(wave.locate(int(n))[0], int(wave.thread_of_lane[n]) // 32) for n in missing})
        text = wave.kernel.instructions[int(state.index[lane])].place
        lines.append(
            f"CTA {wave.locate(lane)[0]}: the cluster's barrier at {text} has not seen "
            + ", ".join(f"CTA {cta} warp {warp}" for cta, warp in warps[:8])
        )
    return lines


WAKERS.append(_release)
EXPLAINERS.append(_explain)
