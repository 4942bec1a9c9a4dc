"""bar.warp.sync: diverged lanes of a warp wait for each other.

Lanes step together where control flow lets them, and memory operations are in order, so a whole warp does not wait.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..assembly import EXIT
from ..codegen import BlockBuilder
from ..module import Instruction
from ..registry import EXPLAINERS, WAKERS, action, emits
from ..wave import Group, Wave
from ..wave_state import WaveState


class WarpBarriers(WaveState):
    """Per lane: the member mask with which it waits at a bar.warp.sync (0: it does not), and that instruction."""

    def __init__(self, wave: Wave) -> None:
        self.members, self.reading = np.zeros((2, wave.lanes), np.int64)


@emits("bar.warp.sync", modifiers="", ends_block=True)
def sync_warp(b: BlockBuilder, i: Instruction) -> None:
    b.take_guard()
    members = b.read(i.operands[0], "uint32")
    b.finish(f"('bar.warp', {b.mask}, {members}, {i.index})", b.number + 1)


@action("bar.warp")
def arrive_at_warp(wave: Wave, group: Group, block: int, guard: Any, members: Any, index: int) -> None:
    """Lanes wait until all that the mask names, and that have not exited, are here."""
    wave.pc[group.lanes] = block + 1
    if guard is None and group.has_whole_warps:
        return
    state = WarpBarriers.of(wave)
    taking = group.taking(guard)
    lanes = group.lane_numbers[taking]
    state.members[lanes] = np.broadcast_to(members, (group.size,))[taking]
    state.reading[lanes] = index
    wave.waiting[lanes] = True
    _release_warps(wave)


def _release_warps(wave: Wave) -> None:
    if (state := WarpBarriers.known(wave)) is None:
        return
    waiting = state.members.reshape(-1, 32) != 0
    bits = np.int64(1) << np.arange(32)
    here_or_gone = ((waiting | (wave.pc.reshape(-1, 32) >= EXIT)) * bits).sum(1)
    complete = (state.members.reshape(-1, 32) & ~here_or_gone[:, None]) == 0
    freed = (waiting & complete).reshape(-1)
    state.members[freed] = 0
    wave.waiting[freed] = False


def _explain_warps(wave: Wave) -> list[str]:
    """For every warp with waiters: who waits for whom."""
    if (state := WarpBarriers.known(wave)) is None:
        return []
    lines = []
    for warp in np.unique(np.flatnonzero(state.members) // 32):
        lanes = np.flatnonzero(state.members[32 * warp : 32 * warp + 32])
        first = int(32 * warp + lanes[0])
        text = wave.kernel.instructions[int(state.reading[first])].text
        lines.append(
            f"CTA {wave.locate(first)[0]}: lanes {lanes.tolist()} of warp {int(wave.thread_of_lane[first]) // 32} wait "
            f"at `{text}`"
        )
    return lines


EXPLAINERS.append(_explain_warps)
WAKERS.append(_release_warps)
