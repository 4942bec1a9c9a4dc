"""setmaxnreg: how many registers a warp's threads may use (PTX ISA, "Miscellaneous Instructions: setmaxnreg").

The emulator has as many registers as a program names, but it counts: a CTA starts with what its threads share of the
register file (or with .maxnreg each), a warp that asks for more waits until others of its CTA have released enough, and
a wait for registers that nobody releases is a deadlock. All warps of a warpgroup have to execute the same setmaxnreg.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..codegen import BlockBuilder
from ..errors import DivergentWarp, InvalidOperand, UnknownInstruction
from ..memory import Array
from ..module import Instruction
from ..registry import EXPLAINERS, FINISHERS, action, emits
from ..wave import Group, Wave
from ..wave_state import WaveState

_LEAST, _MOST, _STEP = 24, 256, 8
_REGISTER_FILE = 65536
"""Registers of a multiprocessor, since sm_50."""
_WARPS = 4
"""of a warpgroup"""


class RegisterCounts(WaveState):
    """`count` [warps]: registers per thread; `told` [warps]: whether a setmaxnreg or .maxnreg gave that number.

    `free` [ctas]: registers that no warp has. `waiting` [warps]: the index of the setmaxnreg at which a warp waits, or
    -1. `history` [warps]: a number that is the same for warps that executed the same setmaxnreg in the same order;
    `last` [warps]: the last one.
    """

    def __init__(self, wave: Wave) -> None:
        warps = wave.lanes // 32
        limit = wave.kernel.max_registers
        share = _REGISTER_FILE // wave.kernel.least_ctas // wave.cta_lanes // _STEP * _STEP
        self.count = np.full(warps, limit or min(share, _MOST))
        self.told = np.full(warps, limit is not None)
        self.free = np.zeros(len(wave.ctas), np.int64)
        self.waiting, self.last = np.full((2, warps), -1)
        self.history = np.zeros(warps, np.uint64)


@emits("setmaxnreg.inc", "setmaxnreg.dec", types="u32", modifiers="sync aligned", starts_block=True, ends_block=True)
def setmaxnreg(b: BlockBuilder, i: Instruction) -> None:
    count = b.literal(i.operands[0])
    if count is None:
        raise UnknownInstruction(i.text)
    b.take_guard()
    b.finish(f"('setmaxnreg', {b.mask}, {count}, {i.parts[1] == 'inc'}, {i.index})", b.number, b.number + 1)


@action("setmaxnreg")
def set_register_count(wave: Wave, group: Group, block: int, guard: Any, count: int, more: bool, index: int) -> None:
    """Warps get the count, or stay before the instruction until there are registers enough."""
    wave.pc[group.lanes] = block + 1
    taking = group.taking(guard)
    if not taking.any():
        return
    part = group if taking.all() else group.part(taking)
    part.require_whole_warps(index)
    if not _LEAST <= count <= _MOST or count % _STEP:
        what = f"setmaxnreg to {count} registers: {_LEAST} to {_MOST} in steps of {_STEP} are allowed"
        part.fail(InvalidOperand, index, 0, what)
    state = RegisterCounts.of(wave)
    warps = part.lane_numbers[::32] // 32
    _check_direction(state, part, warps, count, more, index)
    ctas = wave.cta_of_lane[warps * 32]
    needs = (count - state.count[warps]) * 32
    granted = _within(state.free[ctas], needs, ctas)
    np.subtract.at(state.free, ctas[granted], needs[granted])
    done = warps[granted]
    state.count[done], state.told[done], state.last[done] = count, True, index
    state.history[done] = state.history[done] * np.uint64(1_000_003) + np.uint64(index + 1)
    lanes = np.repeat(~granted, 32)
    wave.pc[part.lane_numbers[lanes]] = block
    wave.waiting[part.lane_numbers[lanes]] = True
    state.waiting[warps[~granted]] = index
    if (needs[granted] < 0).any():
        again = state.waiting >= 0
        again[warps] = False
        wave.waiting[np.repeat(again, 32)] = False
        state.waiting[again] = -1


def _within(free: Array, needs: Array, ctas: Array) -> Array:
    """Which warps get what they need, one after another in each CTA, of the registers that are free there."""
    asked = np.maximum(needs, 0)
    total = np.cumsum(asked)
    first = np.searchsorted(ctas, ctas)
    before = total[first] - asked[first]
    return (total - before <= free) | (needs <= 0)


def _check_direction(state: RegisterCounts, group: Group, warps: Array, count: int, more: bool, index: int) -> None:
    """inc does not lower, and dec does not raise; what a warp starts with is known only from .maxnreg."""
    have = state.count[warps]
    if (wrong := state.told[warps] & (count < have if more else count > have)).any():
        n = int(np.argmax(wrong))
        group.fail(
            InvalidOperand, index, 32 * n, f"setmaxnreg.{'inc' if more else 'dec'} to {count}: there are {int(have[n])}"
        )


# ---- reports


def _explain(wave: Wave) -> list[str]:
    """For every CTA with warps that wait for registers: who has how many."""
    if (state := RegisterCounts.known(wave)) is None:
        return []
    lines = []
    waiting = state.waiting.reshape(len(wave.ctas), -1)
    for cta in np.flatnonzero((waiting >= 0).any(1)):
        warps = np.flatnonzero(waiting[cta] >= 0)
        text = wave.kernel.instructions[int(waiting[cta, warps[0]])].text
        counts = state.count.reshape(waiting.shape)[cta]
        lines.append(
            f"CTA {wave.locate(int(cta) * wave.cta_lanes)[0]}: warps {warps.tolist()} wait for registers at `{text}`; "
            f"{int(state.free[cta])} are free, and the warps have {counts.tolist()} for each thread"
        )
    return lines


def _check_warpgroups(wave: Wave) -> None:
    """Whether the warps of each warpgroup executed the same setmaxnreg."""
    if (state := RegisterCounts.known(wave)) is None:
        return
    per_cta = wave.cta_lanes // 32
    warps = np.arange(state.history.size)
    leader = warps - warps % per_cta % _WARPS
    if (differs := state.history != state.history[leader]).any():
        warp = int(np.argmax(differs))
        one, other = (warp, leader[warp]) if state.last[warp] >= 0 else (leader[warp], warp)
        Group(wave, np.array([one * 32])).fail(
            DivergentWarp,
            int(state.last[one]),
            0,
            f"setmaxnreg executed by warp {int(one) % per_cta} and not, or not in this order, by warp "
            f"{int(other) % per_cta} of its warpgroup",
        )


EXPLAINERS.append(_explain)
FINISHERS.append(_check_warpgroups)
