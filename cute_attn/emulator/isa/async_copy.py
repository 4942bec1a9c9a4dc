"""cp.async: 4, 8 or 16 bytes from global to shared memory, with zero fill.

Addresses are checked at the instruction; the bytes move when a wait needs them (see `async_work`). Bytes beyond the
source size become zeros and are not read. `cp.async.mbarrier.arrive` lets an mbarrier wait for a thread's copies.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..access import active, check_alignment, global_elements, position_of, shared_elements
from ..async_work import CommitGroups, Transfers
from ..codegen import BlockBuilder
from ..errors import InvalidOperand, UnknownInstruction
from ..mbarrier_keys import mbarrier_keys
from ..memory import UNIT, Array, GlobalMemory
from ..module import Instruction
from ..registry import emits, helper
from ..wave import Group
from .load_store import address_expression, state_space


@emits(
    "cp.async.ca",
    "cp.async.cg",
    modifiers="shared shared::cta global L2::cache_hint L2::64B L2::128B L2::256B",
)
def copy(b: BlockBuilder, i: Instruction) -> None:
    """cp.async.ca.shared.global [dst], [src], size{, src-size | ignore-src}{, policy};"""
    size = b.literal(i.operands[2])
    if size is None:
        raise UnknownInstruction(i.text)
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


@emits("cp.async.mbarrier.arrive", types="b64", modifiers="noinc shared shared::cta")
def arrive_later(b: BlockBuilder, i: Instruction) -> None:
    """An arrival that comes when the copies issued so far are complete; without .noinc it is one more than expected."""
    address = address_expression(b, i.operands[0], "uint32" if state_space(i) == "shared" else "uint64")
    b.effect(f"arrive_after_copies(G, {address}, {'noinc' in i.parts}, {b.mask}, {i.index})")


@helper
def copy_async(group: Group, dest: Any, source: Any, size: int, taken: Any, mask: Any, index: int) -> None:
    to, positions = active(group, dest, mask)
    if not to.size:
        return
    elements, low, high = shared_elements(group, to, size, positions, index, "write")
    source, taken = group.values_at(source, positions), group.values_at(taken, positions)
    if int(taken.max()) > size:
        worst = int(np.argmax(taken))
        what = f"cp.async of {size} bytes with a source size of {int(taken[worst])}"
        group.fail(InvalidOperand, index, position_of(positions, worst), what)
    _check_source(group, source, size, taken, positions, index)
    wave = group.wave
    if wave.races is not None:
        wave.races.write_later(group, elements, size, positions, index, "cp.async")

    def perform(rows: Array) -> None:
        some = elements[rows]
        wave.shared.views[size][some] = _fetch(wave.memory, source[rows], size, taken[rows])
        wave.shared.mark(some, size, low, high)

    lanes = group.lanes_at(positions)
    CommitGroups.of(wave, "cp.async").issue(lanes, perform, size)


def _check_source(group: Group, source: Array, size: int, taken: Array, positions: Array | None, index: int) -> None:
    """A partial copy may end at the last byte of a tensor: only the bytes it takes have to be there."""
    check_alignment(group, source, size, positions, index)
    for amount in np.unique(taken):
        if amount:
            chosen = np.flatnonzero(taken == amount)
            where = chosen if positions is None else positions[chosen]
            global_elements(group, source[chosen], size, where, index, "read", touched=int(amount))


def _fetch(memory: GlobalMemory, source: Array, size: int, taken: Array) -> Array:
    """[n] elements of `size` bytes: `taken` bytes of memory, then zeros. Addresses have been checked."""
    if int(taken.min()) == size:
        return memory.views[size].take(memory.index(source, size))
    data: Array = np.zeros(source.size, UNIT[size])
    for amount in np.unique(taken):
        chosen = np.flatnonzero(taken == amount)
        if int(amount) == size:
            data[chosen] = memory.views[size].take(memory.index(source[chosen], size))
        elif amount:
            first = memory.index(source[chosen], 1)
            columns = memory.views[1][first[:, None] + np.arange(int(amount))]
            data.view(np.uint8).reshape(-1, size)[chosen, : int(amount)] = columns
    return data


@helper
def arrive_after_copies(group: Group, address: Any, expected: bool, mask: Any, index: int) -> None:
    table, keys, positions = mbarrier_keys(group, address, mask, index, "arrive")
    if not keys.size:
        return
    lanes = group.lanes_at(positions)
    copies = CommitGroups.of(group.wave, "cp.async")
    if not expected:
        table.enlarge(keys)
    issued = copies.issued
    if (races := group.wave.races) is not None:
        races.arrive_after(group, lanes, keys, index, "cp.async")

    def perform(rows: Array) -> None:
        copies.wait_all(lanes[rows], issued)

    cta, offset = table.place(keys)
    table.issue(Transfers(cta, offset, np.zeros(keys.size, np.int64), lanes, index, perform, arrivals=1))
