"""setmaxnreg: how many registers a warpgroup's threads may use (PTX ISA, "Miscellaneous Instructions: setmaxnreg").

The emulator has as many registers as a program names, so nothing changes; the operand and the warps are checked.
"""

from __future__ import annotations

from typing import Any

from ..codegen import BlockBuilder
from ..errors import InvalidOperand, UnknownInstruction
from ..module import Instruction
from ..registry import emits, helper
from ..wave import Group

_LEAST, _MOST, _STEP = 24, 256, 8


@emits("setmaxnreg.inc", "setmaxnreg.dec", types="u32", modifiers="sync aligned")
def setmaxnreg(b: BlockBuilder, i: Instruction) -> None:
    count = b.literal(i.operands[0])
    if count is None:
        raise UnknownInstruction(i.text)
    b.effect(f"check_register_count(G, {count}, {b.mask}, {i.index})")


@helper
def check_register_count(group: Group, count: int, mask: Any, index: int) -> None:
    if mask is not None and not group.spread(mask).any():
        return
    group.require_whole_warps(index)
    if not _LEAST <= count <= _MOST or count % _STEP:
        what = f"setmaxnreg to {count} registers: {_LEAST} to {_MOST} in steps of {_STEP} are allowed"
        group.fail(InvalidOperand, index, 0, what)
