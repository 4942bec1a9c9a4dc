"""clusterlaunchcontrol: a running CTA takes over a cluster that has not started (PTX ISA, same name; sm_100 and later).

A launch of such a kernel runs in several waves on purpose (`launch.QUEUED_WAVES`), so that there are clusters to take.
The 16-byte answer, opaque to programs, holds x, y and z of the cluster's first CTA, and 1 in its last word, or zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..access import active, shared_address, shared_elements
from ..async_work import Transfers
from ..codegen import BlockBuilder
from ..errors import UnknownInstruction
from ..mbarrier_keys import mbarrier_keys
from ..memory import CLUSTER_SHIFT, Array
from ..module import Instruction
from ..registry import emits, helper
from ..wave import Group
from .load_store import address_expression, state_space

_FIRST_CTA = "get_first_ctaid"


@emits(
    "clusterlaunchcontrol.try_cancel.async",
    modifiers="shared::cta mbarrier::complete_tx::bytes multicast::cluster::all b128",
)
def try_cancel(b: BlockBuilder, i: Instruction) -> None:
    """clusterlaunchcontrol.try_cancel.async.mbarrier::complete_tx::bytes{.multicast}.b128 [answer], [mbarrier].

    With multicast the answer arrives in every CTA of the cluster, and at the mbarrier there, at the same offsets.
    """
    dtype = "uint32" if state_space(i) == "shared" else "uint64"
    answer, barrier = (address_expression(b, operand, dtype) for operand in i.operands)
    everyone = "multicast@cluster@all" in i.parts
    b.effect(f"cancel_launch(G, {answer}, {barrier}, {everyone}, {b.mask}, {i.index})")


@emits(
    "clusterlaunchcontrol.query_cancel",
    types="pred.b128 b32.b128",
    modifiers="is_canceled get_first_ctaid get_first_ctaid::x get_first_ctaid::y get_first_ctaid::z v4",
)
def query_cancel(b: BlockBuilder, i: Instruction) -> None:
    """is_canceled gives a predicate, get_first_ctaid {x, y, z, _} or one of them, undefined where nothing was canceled.

    Programs ask both at once and drop what is undefined, so that is 0xFFFFFFFF, which no CTA has, and not a finding.
    """
    words = b.assign(f"cancel_answer(G, {b.read(i.operands[1], 'complex128')})")
    form = i.parts[2]
    if form == "is_canceled":
        b.write(i.operands[0], f"{words}[3] != {b.constant(0, 'uint32')}", "bool")
        return
    chosen = "xyz" if "v4" in i.parts else form.removeprefix(f"{_FIRST_CTA}@")
    if not form.startswith(_FIRST_CTA) or chosen not in ("x", "y", "z", "xyz"):
        raise UnknownInstruction(i.text)
    undefined = b.constant(0xFFFFFFFF, "uint32")
    for dest, axis in zip(b.vector(i.operands[0]), chosen, strict=False):
        b.write(dest, f"where({words}[3] != 0, {words}[{'xyz'.index(axis)}], {undefined})", "uint32")


@helper
def cancel_launch(group: Group, answer: Any, barrier: Any, everyone: bool, mask: Any, index: int) -> None:
    """Takes a cluster off the launch now; the answer arrives later, with 16 bytes reported to the mbarrier."""
    wave = group.wave
    table, keys, positions = mbarrier_keys(group, barrier, mask, index, "complete_tx")
    lanes, _ = active(group, answer, mask)
    if not keys.size:
        return
    lanes = shared_address(group, lanes, positions, index)
    words = np.zeros((keys.size, 4), np.uint32)
    for row in words[: len(wave.queue)]:
        (gx, gy, _), first = wave.grid, int(wave.queue.popleft()[0])
        row[:] = first % gx, first // gx % gy, first // (gx * gy), 1
    data = words.view(np.complex128).reshape(-1)
    cta, offset = table.place(keys)
    issued = group.lanes_at(positions)
    if everyone:
        size = wave.cluster_size
        ranks = np.tile(np.arange(size), keys.size)
        cta, offset, data, issued = (np.repeat(rows, size) for rows in (cta // size * size, offset, data, issued))
        cta = cta + ranks
        lanes = np.repeat(lanes, size) | ((ranks + 1) << CLUSTER_SHIFT).astype(np.uint32)
        positions = np.repeat(np.arange(group.size) if positions is None else positions, size)
    elements, low, high = shared_elements(group, lanes, 16, positions, index, "write")
    if wave.races is not None:
        keys = table.key(cta, offset)
        wave.races.transfer(group, issued, keys, index, writes=(elements[:, None], 16, None), proxy=False)

    def perform(rows: Array) -> None:
        wave.shared.views[16][elements[rows]] = data[rows]
        wave.shared.mark(elements[rows], 16, low, high)

    table.issue(Transfers(cta, offset, np.full(cta.size, 16), issued, index, perform))


@helper
def cancel_answer(group: Group, value: Any) -> Array:
    """[4, lanes] words of answers."""
    return np.ascontiguousarray(group.spread(value).view(np.uint32).reshape(-1, 4).T)
