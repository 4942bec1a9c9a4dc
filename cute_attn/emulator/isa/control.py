"""Control flow: bra, ret, exit, and instructions that change nothing the emulator models."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from ..assembly import EXIT
from ..codegen import BlockBuilder
from ..errors import InvalidOperand, UnknownInstruction
from ..module import Instruction
from ..registry import action, emits, helper
from ..wave import Group, Wave


def _condition(b: BlockBuilder, i: Instruction) -> str | None:
    if i.guard is None:
        return None
    return b.predicate(("!" if i.guard_negated else "") + i.guard)


@emits("bra", ends_block=True)
def branch(b: BlockBuilder, i: Instruction) -> None:
    target = b.targets[i.operands[0]]
    condition = _condition(b, i)
    if condition is None:
        b.finish(f"('jump', {target})", target)
    else:
        b.finish(f"('branch', {condition}, {target})", target, b.number + 1)


@emits("ret", "exit", ends_block=True)
def leave(b: BlockBuilder, i: Instruction) -> None:
    condition = _condition(b, i)
    if condition is None:
        b.finish(f"('jump', {EXIT})", EXIT)
    else:
        b.finish(f"('branch', {condition}, {EXIT})", EXIT, b.number + 1)


@emits("trap", "brkpt")
def trap(b: BlockBuilder, i: Instruction) -> None:
    b.effect(f"reached_trap(G, {i.index}, {b.mask})")


@emits(
    "membar",
    "fence",
    "prefetch",
    "prefetchu",
    "applypriority",
    "discard",
    "griddepcontrol",
    "nanosleep",
    "pmevent",
)
def nothing(b: BlockBuilder, i: Instruction) -> None:
    """Ordering, hints and delays: the emulator performs memory operations in program order and has no caches."""


@emits("createpolicy")
def cache_policy(b: BlockBuilder, i: Instruction) -> None:
    """An opaque 64-bit hint: without caches any value will do."""
    b.write(i.operands[0], b.constant(0, "uint64"), "uint64")


@action("jump")
def jump(wave: Wave, group: Group, block: int, target: int) -> None:
    wave.pc[group.lanes] = target


@action("branch")
def conditional(wave: Wave, group: Group, block: int, condition: Any, target: int) -> None:
    wave.pc[group.lanes] = np.where(condition, target, block + 1)


@helper
def unknown_instruction(group: Group, index: int) -> NoReturn:
    group.fail(UnknownInstruction, index, 0, "the emulator does not implement this instruction")


@helper
def reached_trap(group: Group, index: int, mask: Any) -> None:
    if mask is None or mask.any():
        position = 0 if mask is None else int(np.argmax(group.spread(mask)))
        group.fail(InvalidOperand, index, position, "the kernel reached a trap")
