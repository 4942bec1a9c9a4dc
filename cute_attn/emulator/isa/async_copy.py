"""cp.async: 4, 8 or 16 bytes from global to shared memory, with zero fill.

The copy happens at the instruction, which is one of the moments the hardware may choose; commit and wait order nothing
more. Bytes beyond the source size become zeros and are not read.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..access import active, check_alignment, global_elements, shared_elements
from ..codegen import BlockBuilder
from ..errors import InvalidOperand
from ..memory import UNIT, Array
from ..module import Instruction
from ..registry import emits, helper
from ..wave import Group
from .load_store import address_expression


@emits(
    "cp.async.ca",
    "cp.async.cg",
    modifiers="shared shared::cta global L2::cache_hint L2::64B L2::128B L2::256B",
)
def copy(b: BlockBuilder, i: Instruction) -> None:
    """cp.async.ca.shared.global [dst], [src], size{, src-size | ignore-src}{, policy};"""
    size = b.literal(i.operands[2])
    assert size is not None
    dest = address_expression(b, i.operands[0], "uint32")
    source = address_expression(b, i.operands[1], "uint64")
    extra = i.operands[3:]
    if extra and "L2@cache_hint" in i.parts:
        extra = extra[:-1]
    taken = b.constant(size, "uint32")
    if extra:
        name = extra[0].lstrip("!")
        if b.is_register(name) and b.kernel.register_bits[b.kernel.registers[name]] == 1:
            ignored = b.predicate(extra[0])
            taken = f"where({ignored}, {b.constant(0, 'uint32')}, {taken})"
        else:
            taken = b.read(extra[0], "uint32")
    b.effect(f"copy_async(G, {dest}, {source}, {size}, {taken}, {b.mask}, {i.index})")


@emits("cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all")
def order(b: BlockBuilder, i: Instruction) -> None:
    """Every copy has already happened."""


@helper
def copy_async(group: Group, dest: Any, source: Any, size: int, taken: Any, mask: Any, index: int) -> None:
    to, positions = active(group, dest, mask)
    if not to.size:
        return
    elements, low, high = shared_elements(group, to, size, positions, index, "write")
    source = group.spread(source)
    source = source if positions is None else source[positions]
    taken = group.spread(taken)
    taken = taken if positions is None else taken[positions]
    if int(taken.max()) > size:
        worst = int(np.argmax(taken))
        group.fail(InvalidOperand, index, worst, f"cp.async of {size} bytes with a source size of {int(taken[worst])}")
    group.wave.shared.views[size][elements] = _fetch(group, source, size, taken, positions, index)
    group.wave.shared.mark(elements, size, low, high)


def _fetch(group: Group, source: Array, size: int, taken: Array, positions: Array | None, index: int) -> Array:
    """[n] elements of `size` bytes: `taken` bytes of memory, then zeros."""
    memory = group.wave.memory
    if int(taken.min()) == size:
        return memory.views[size].take(global_elements(group, source, size, positions, index, "read"))
    data: Array = np.zeros(source.size, UNIT[size])
    for amount in np.unique(taken):
        if amount == 0:
            continue
        chosen = np.flatnonzero(taken == amount)
        where = chosen if positions is None else positions[chosen]
        if int(amount) == size:
            data[chosen] = memory.views[size].take(global_elements(group, source[chosen], size, where, index, "read"))
            continue
        # A partial copy may end at the last byte of a tensor: only the bytes it takes are checked and read.
        global_elements(group, source[chosen], size, where, index, "read", touched=int(amount))
        first = memory.index(source[chosen], 1)
        columns = memory.views[1][first[:, None] + np.arange(int(amount))]
        data.view(np.uint8).reshape(-1, size)[chosen, : int(amount)] = columns
    check_alignment(group, source, size, positions, index)
    return data
