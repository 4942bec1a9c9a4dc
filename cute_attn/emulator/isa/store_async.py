"""st.async: a store into the shared memory of a CTA of the cluster that reports its bytes to an mbarrier there.

PTX ISA, "Data Movement and Conversion Instructions: st.async". The value is read at once and lands as late as a wait at
the mbarrier allows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..access import active, shared_elements
from ..async_work import Transfers
from ..codegen import BlockBuilder
from ..errors import UnknownInstruction
from ..mbarrier_keys import mbarrier_keys
from ..memory import Array
from ..module import Instruction
from ..registry import emits, helper, instruction_type
from ..wave import Group
from .load_store import address_expression, join_lanes


@emits(
    "st.async",
    types="b32 b64 u32 u64 s32 s64 f32 f64",
    modifiers="weak shared::cluster mbarrier::complete_tx::bytes v2 v4",
)
def store_async(b: BlockBuilder, i: Instruction) -> None:
    """st.async{.weak}.shared::cluster.mbarrier::complete_tx::bytes{.vec}.type [address], value, [mbarrier]."""
    kind = instruction_type(i.opcode)
    count = next((int(part[1:]) for part in i.parts if part in ("v2", "v4")), 1)
    registers = b.vector(i.operands[1])
    if kind is None or "shared@cluster" not in i.parts or len(registers) != count or count * kind.bytes > 16:
        raise UnknownInstruction(i.text)
    address, barrier = (address_expression(b, i.operands[n], "uint32") for n in (0, 2))
    values = ", ".join(b.read(register, kind.carrier) for register in registers)
    b.effect(f"send_shared(G, {address}, {kind.bytes}, ({values},), {barrier}, {b.mask}, {i.index})")


@helper
def send_shared(
    group: Group, address: Any, size: int, values: tuple[Any, ...], barrier: Any, mask: Any, index: int
) -> None:
    wave, total = group.wave, size * len(values)
    table, keys, positions = mbarrier_keys(group, barrier, mask, index, "complete_tx")
    if not keys.size:
        return
    lanes, _ = active(group, address, mask)
    elements, low, high = shared_elements(group, lanes, total, positions, index, "write")
    view = wave.shared.views[total]
    data = np.array(join_lanes(group, values, size, positions, view.dtype))

    def perform(rows: Array) -> None:
        view[elements[rows]] = data[rows]
        wave.shared.mark(elements[rows], total, low, high)

    issued = group.lanes_at(positions)
    if wave.races is not None:
        wave.races.transfer(group, issued, keys, index, writes=(elements[:, None], total, None), proxy=False)
    cta, offset = table.place(keys)
    table.issue(Transfers(cta, offset, np.full(keys.size, total), issued, index, perform))
