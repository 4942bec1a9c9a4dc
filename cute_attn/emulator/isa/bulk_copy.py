"""Bulk copies of contiguous memory: cp.async.bulk, cp.reduce.async.bulk, and the groups in which their likes complete.

Copies into shared memory report their bytes to an mbarrier and land when somebody waits there; copies out of it belong
to bulk groups and are done when their thread waits for them, with .read or without (PTX ISA, "cp.async.bulk",
"cp.reduce.async.bulk", "cp.async.bulk.commit_group", "cp.async.bulk.wait_group").
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..access import check_alignment
from ..async_work import CommitGroups, Perform, Transfers
from ..bulk import BulkIssue, Units
from ..codegen import BlockBuilder
from ..errors import InvalidOperand, UnknownInstruction
from ..mbarrier_keys import keys_of
from ..memory import CLUSTER_SHIFT, Array
from ..module import Instruction
from ..registry import emits, helper, instruction_type
from ..wave import Group
from .load_store import address_expression
from .read_modify_write import element_dtype, in_order, reduction_step

UNIT = 16
"""Bytes: addresses and sizes are multiples of it."""
_OFFSET = np.uint32((1 << CLUSTER_SHIFT) - 1)
_OPERATIONS = "add min max inc dec and or xor"
_REDUCTIONS_TO_GLOBAL = {
    "add": "u32 s32 u64 f32 f64",
    "add.noftz": "f16 bf16",
    "min": "u32 s32 u64 s64 f16 bf16",
    "max": "u32 s32 u64 s64 f16 bf16",
    "inc": "u32",
    "dec": "u32",
    "and": "b32 b64",
    "or": "b32 b64",
    "xor": "b32 b64",
}
_REDUCTIONS_TO_SHARED = {
    "add": "u32 s32 u64",
    "min": "u32 s32",
    "max": "u32 s32",
    "inc": "u32",
    "dec": "u32",
    "and": "b32",
    "or": "b32",
    "xor": "b32",
}


# ---- instructions


@emits("cp.async.bulk.commit_group", modifiers="")
def commit(b: BlockBuilder, i: Instruction) -> None:
    b.effect(f"commit_group(G, 'bulk', {b.mask})")


@emits("cp.async.bulk.wait_group", modifiers="read")
def wait(b: BlockBuilder, i: Instruction) -> None:
    """With .read, sources must have been read; the copies are then done whole."""
    newest = b.literal(i.operands[0])
    if newest is None:
        raise UnknownInstruction(i.text)
    b.effect(f"wait_group(G, 'bulk', {newest}, {b.mask})")


@emits("cp.async.bulk.prefetch", modifiers="tensor 1d 2d 3d 4d 5d L2 global tile L2::cache_hint")
def prefetch(b: BlockBuilder, i: Instruction) -> None:
    """There are no caches."""


@emits(
    "cp.async.bulk.shared::cluster.global",
    "cp.async.bulk.shared::cta.global",
    modifiers="mbarrier::complete_tx::bytes multicast::cluster L2::cache_hint",
)
def load(b: BlockBuilder, i: Instruction) -> None:
    """cp.async.bulk [dst], [src], size, [mbar] {, cta-mask} {, policy}"""
    to, barrier = (address_expression(b, i.operands[n], "uint32") for n in (0, 3))
    source, size = address_expression(b, i.operands[1], "uint64"), b.read(i.operands[2], "uint32")
    ctas = b.read(i.operands[4], "uint16") if "multicast@cluster" in i.parts else "None"
    b.effect(f"bulk_load(G, {to}, {source}, {size}, {barrier}, {ctas}, {b.mask}, {i.index})")


@emits("cp.async.bulk.shared::cluster.shared::cta", modifiers="mbarrier::complete_tx::bytes")
def send(b: BlockBuilder, i: Instruction) -> None:
    """cp.async.bulk [dst], [src], size, [mbar]: to the shared memory of a CTA of the cluster."""
    _send(b, i, "None")


@emits(
    "cp.reduce.async.bulk.shared::cluster.shared::cta",
    modifiers=f"mbarrier::complete_tx::bytes {_OPERATIONS}",
)
def reduce_shared(b: BlockBuilder, i: Instruction) -> None:
    """cp.reduce.async.bulk [dst], [src], size, [mbar]"""
    _send(b, i, repr(_reduction(i, _REDUCTIONS_TO_SHARED)))


def _send(b: BlockBuilder, i: Instruction, reduction: str) -> None:
    to, source, barrier = (address_expression(b, i.operands[n], "uint32") for n in (0, 1, 3))
    size = b.read(i.operands[2], "uint32")
    b.effect(f"bulk_send(G, {to}, {source}, {size}, {barrier}, {reduction}, {b.mask}, {i.index})")


@emits("cp.async.bulk.global.shared::cta", modifiers="bulk_group L2::cache_hint cp_mask")
def store(b: BlockBuilder, i: Instruction) -> None:
    """cp.async.bulk [dst], [src], size {, policy} {, byte-mask}"""
    kept = b.read(i.operands[-1], "uint16") if "cp_mask" in i.parts else "None"
    _store(b, i, kept, "None")


@emits(
    "cp.reduce.async.bulk.global.shared::cta",
    modifiers=f"bulk_group L2::cache_hint noftz {_OPERATIONS}",
)
def reduce_global(b: BlockBuilder, i: Instruction) -> None:
    """cp.reduce.async.bulk [dst], [src], size {, policy}"""
    _store(b, i, "None", repr(_reduction(i, _REDUCTIONS_TO_GLOBAL)))


def _store(b: BlockBuilder, i: Instruction, kept: str, reduction: str) -> None:
    to, source = address_expression(b, i.operands[0], "uint64"), address_expression(b, i.operands[1], "uint32")
    size = b.read(i.operands[2], "uint32")
    b.effect(f"bulk_store(G, {to}, {source}, {size}, {kept}, {reduction}, {b.mask}, {i.index})")


def _reduction(i: Instruction, known: dict[str, str]) -> tuple[str, str]:
    """(operation, element type); raises UnknownInstruction for a combination that the ISA does not have."""
    kind = instruction_type(i.opcode)
    names = [part for part in i.parts if part in _REDUCTIONS_TO_GLOBAL]
    if kind is None or len(names) != 1:
        raise UnknownInstruction(i.opcode)
    full = f"{names[0]}.noftz" if "noftz" in i.parts else names[0]
    if kind.name not in known.get(full, "").split():
        raise UnknownInstruction(i.opcode)
    return names[0], kind.name


# ---- execution


def report_to(
    issue: BulkIssue, barrier: Array, nbytes: Array, perform: Perform, *, writes: Units, reads: Units | None = None
) -> None:
    """Puts copies in flight that report `nbytes` each to the mbarriers at these shared addresses.

    reads, writes: what they access of shared memory, for the race detector.
    """
    if not issue.lanes.size:
        return
    table, keys = keys_of(issue.group, barrier, issue.positions, issue.index, "complete_tx")
    if (races := issue.wave.races) is not None:
        read = None if reads is None else reads.place
        races.transfer(issue.group, issue.lanes, keys, issue.index, reads=read, writes=writes.place)
    cta, offset = table.place(keys)
    table.issue(Transfers(cta, offset, nbytes, issue.lanes, issue.index, perform))


def put_in_group(issue: BulkIssue, perform: Perform, *, reads: Units) -> None:
    """Puts copies in flight that belong to the bulk groups that their lanes are filling.

    reads: what they access of shared memory, for the race detector.
    """
    if issue.lanes.size:
        if (races := issue.wave.races) is not None:
            elements, nbytes, used = reads.place
            races.read_later(issue.group, issue.lanes, elements, nbytes, issue.index, "bulk", used=used)
        units = reads.elements.shape[1] if reads.used is None else reads.used.sum(1)
        CommitGroups.of(issue.wave, "bulk").issue(issue.lanes, perform, units * reads.view.itemsize)


def address_in(ranks: Array, address: Array) -> Array:
    """The uint32 shared addresses of the same variables in the CTAs of these ranks."""
    return (address & _OFFSET) | ((ranks + 1) << CLUSTER_SHIFT).astype(np.uint32)


def reduce_into(destination: Units, rows: Array, content: Array, operation: str, element: str, *, flush: bool) -> None:
    """Combines elements with what memory holds; the order is that of the copies."""
    dtype = element_dtype(element)
    where = destination.elements[rows]
    used = destination.is_used(rows)
    per_unit = destination.view.itemsize // dtype.itemsize
    where = where.reshape(-1) if used is None else where[used]
    content = content.reshape(-1) if used is None else content[used]
    elements = (where[:, None] * per_unit + np.arange(per_unit)).reshape(-1)
    view = destination.view.view(dtype)
    in_order(view, elements, np.ascontiguousarray(content).view(dtype), reduction_step(operation, element, flush))


def _issue(group: Group, mask: Any, size: Any, index: int) -> tuple[BulkIssue, Array]:
    """The copies of lanes that copy anything, and their sizes."""
    every = BulkIssue.of(group, mask, index)
    sizes = every.take(size).astype(np.int64)
    if (bad := sizes % UNIT != 0).any():
        row = int(np.argmax(bad))
        every.fail(InvalidOperand, row, f"a bulk copy of {int(sizes[row])} bytes: the size is a multiple of {UNIT}")
    return (every, sizes) if sizes.all() else (every.part(np.flatnonzero(sizes)), sizes[sizes > 0])


def _span(size: Array) -> tuple[Array, Array | None]:
    """(byte offsets of the units of copies of these sizes, [units]; which units each copy has, None if all)."""
    offsets = np.arange(0, int(size.max(initial=0)), UNIT)
    return offsets, None if (size == size[:1]).all() else offsets < size[:, None]


def _global(issue: BulkIssue, address: Array, offsets: Array, used: Array | None, verb: str) -> Units:
    check_alignment(issue.group, address, UNIT, issue.positions, issue.index)
    return issue.global_units(address[:, None], offsets, UNIT, verb, used)


def _shared(issue: BulkIssue, address: Array, offsets: Array, used: Array | None, verb: str) -> Units:
    cta, start = issue.shared_place(address, UNIT, verb)
    return issue.shared_units(cta, start, offsets if used is None else np.where(used, offsets, 0), UNIT, verb, used)


def _moving(read: Units, written: Units, reduction: tuple[str, str] | None) -> Perform:
    """What copies from the one place to the other, or combines with what is there by (operation, element type)."""
    if reduction is None:
        return lambda rows: written.write(rows, read.read(rows))
    return lambda rows: reduce_into(written, rows, read.read(rows), *reduction, flush=False)


@helper
def bulk_load(group: Group, to: Any, source: Any, size: Any, barrier: Any, ctas: Any, mask: Any, index: int) -> None:
    issue, sizes = _issue(group, mask, size, index)
    offsets, used = _span(sizes)
    read = _global(issue, issue.take(source), offsets, used, "read")
    to, barrier = issue.take(to), issue.take(barrier)
    if ctas is not None:
        rows, ranks = issue.multicast(issue.take(ctas))
        issue, sizes, read = issue.part(rows), sizes[rows], read.select(rows)
        to, barrier = address_in(ranks, to[rows]), address_in(ranks, barrier[rows])
        used = read.used
    written = _shared(issue, to, offsets, used, "write")
    report_to(issue, barrier, sizes, _moving(read, written, None), writes=written)


@helper
def bulk_send(
    group: Group, to: Any, source: Any, size: Any, barrier: Any, reduction: Any, mask: Any, index: int
) -> None:
    issue, sizes = _issue(group, mask, size, index)
    offsets, used = _span(sizes)
    read = _shared(issue, issue.take(source), offsets, used, "read")
    issue.require_written(read)
    written = _shared(issue, issue.take(to), offsets, used, "write")
    if reduction is not None:
        issue.require_written(written)
    report_to(issue, issue.take(barrier), sizes, _moving(read, written, reduction), writes=written, reads=read)


@helper
def bulk_store(group: Group, to: Any, source: Any, size: Any, kept: Any, reduction: Any, mask: Any, index: int) -> None:
    issue, sizes = _issue(group, mask, size, index)
    offsets, used = _span(sizes)
    read = _shared(issue, issue.take(source), offsets, used, "read")
    issue.require_written(read)
    written = _global(issue, issue.take(to), offsets, used, "write")
    if kept is None:
        put_in_group(issue, _moving(read, written, reduction), reads=read)
    else:
        single = _single_bytes(issue, written, issue.take(kept))
        put_in_group(issue, lambda rows: single.write(rows, read.read(rows).view(np.uint8)), reads=read)


def _single_bytes(issue: BulkIssue, units: Units, kept: Array) -> Units:
    """The bytes of the units whose bit, of the 16 that a byte mask has, is set."""
    elements = (units.elements[:, :, None] * UNIT + np.arange(UNIT)).reshape(len(units.elements), -1)
    bits = np.tile((kept[:, None] >> np.arange(UNIT).astype(np.uint16)) & 1 == 1, units.elements.shape[1])
    if units.used is not None:
        bits &= np.repeat(units.used, UNIT, axis=1)
    return Units(issue.wave.memory.views[1], elements, bits)
