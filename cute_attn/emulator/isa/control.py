"""Control flow: bra, brx.idx, ret, exit; nanosleep; and instructions that change nothing the emulator models."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from ..assembly import EXIT
from ..codegen import BlockBuilder
from ..errors import InvalidOperand, UnknownInstruction
from ..module import Instruction
from ..registry import action, emits, helper
from ..wave import Group, Wave


@emits("bra", modifiers="uni", ends_block=True)
def branch(b: BlockBuilder, i: Instruction) -> None:
    _go_to(b, b.targets[i.operands[0]])


@emits("ret", "exit", modifiers="uni", ends_block=True)
def leave(b: BlockBuilder, i: Instruction) -> None:
    """Calls are expanded where they stand (see `parser`), so this is the kernel's own end."""
    _go_to(b, EXIT)


def _go_to(b: BlockBuilder, target: int) -> None:
    b.take_guard()
    if b.guard is None:
        b.finish(f"('jump', {target})", target)
    else:
        b.finish(f"('branch', {b.guard}, {target})", target, b.number + 1)


@emits("brx.idx", modifiers="uni", ends_block=True)
def branch_by_table(b: BlockBuilder, i: Instruction) -> None:
    """brx.idx index, table, where `table: .branchtargets label, label, ...;`"""
    b.take_guard()
    targets = tuple(b.targets[label] for label in b.kernel.branch_targets[i.operands[1]])
    index = b.read(i.operands[0], "uint32")
    b.finish(f"('switch', {b.mask}, {index}, {targets}, {i.index})", *targets, b.number + 1)


@emits("trap", "brkpt", modifiers="")
def trap(b: BlockBuilder, i: Instruction) -> None:
    b.effect(f"reached_trap(G, {i.index}, {b.mask})")


_EVICTION = "L2::evict_last L2::evict_normal L2::evict_first L2::evict_unchanged"


@emits("prefetch", "prefetchu", modifiers=f"global local const param tensormap L1 L2 {_EVICTION}")
@emits("applypriority", modifiers="global L2::evict_normal")
@emits("discard", modifiers="global L2")
@emits("griddepcontrol", modifiers="launch_dependents wait")
@emits("pmevent", modifiers="mask")
def nothing(b: BlockBuilder, i: Instruction) -> None:
    """Hints: the emulator has no caches."""


@emits("nanosleep", types="u32", modifiers="", ends_block=True)
def sleep(b: BlockBuilder, i: Instruction) -> None:
    """Whoever sleeps lets the others run."""
    b.take_guard()
    b.finish_yielding(b.constant(True, "bool") if b.guard is None else b.guard)


@emits("createpolicy", types="b64", modifiers=f"fractional range cvt global L2 {_EVICTION}")
def cache_policy(b: BlockBuilder, i: Instruction) -> None:
    """An opaque 64-bit hint: without caches any value will do."""
    b.write(i.operands[0], b.constant(0, "uint64"), "uint64")


@action("jump")
def jump(wave: Wave, group: Group, block: int, target: int) -> None:
    wave.pc[group.lanes] = target


@action("branch")
def conditional(wave: Wave, group: Group, block: int, condition: Any, target: int) -> None:
    wave.pc[group.lanes] = np.where(condition, target, block + 1)


@action("switch")
def select(wave: Wave, group: Group, block: int, taking: Any, number: Any, targets: tuple[int, ...], at: int) -> None:
    wrong = number >= len(targets) if taking is None else taking & (number >= len(targets))
    if wrong.any():
        position = int(np.argmax(group.spread(wrong)))
        value = int(group.spread(number)[position])
        group.fail(InvalidOperand, at, position, f"index {value} into a table of {len(targets)} branch targets")
    chosen = np.asarray(targets)[np.minimum(number, len(targets) - 1)]
    wave.pc[group.lanes] = chosen if taking is None else np.where(taking, chosen, block + 1)


@action("yield")
def step_back(wave: Wave, group: Group, block: int, lanes: Any) -> None:
    """Warps whose lanes here may all be polling go on when no others can run: nothing at this place splits a warp."""
    wave.pc[group.lanes] = block + 1
    warps = wave.warp_of_lane[group.lanes]
    busy = np.bincount(warps, ~group.spread(lanes), minlength=wave.lanes // 32)
    wave.yielded[group.lanes] = busy[warps] == 0


@helper
def unknown_instruction(group: Group, index: int) -> NoReturn:
    group.fail(UnknownInstruction, index, 0, "the emulator does not implement this instruction")


@helper
def reached_trap(group: Group, index: int, mask: Any) -> None:
    if mask is None or mask.any():
        position = 0 if mask is None else int(np.argmax(group.spread(mask)))
        group.fail(InvalidOperand, index, position, "the kernel reached a trap")
