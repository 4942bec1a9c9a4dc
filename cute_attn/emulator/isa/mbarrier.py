"""mbarrier: init, inval, expect_tx, complete_tx, arrive, arrive_drop, test_wait, try_wait, pending_count.

A wait is a block of its own: a lane whose phase is not complete is parked before it and runs it again when the phase
completes (PTX ISA, "mbarrier.try_wait": the thread may be suspended) or when the wait times out. test_wait does not
park, and neither does a try_wait whose false result leads elsewhere than straight back to it: both tell at once that
the phase is not complete, and yield where they are asked again. The state that arrive returns is the phase's number in
the upper and the pending count in the lower half. Names of sections are those of the PTX ISA, "Parallel Synchronization
and Communication Instructions: mbarrier".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..access import active, position_of, shared_address, shared_elements
from ..codegen import BlockBuilder
from ..errors import BarrierMismatch
from ..mbarrier_keys import mbarrier_keys
from ..mbarriers import MAX_COUNT, Mbarriers
from ..memory import Array
from ..module import Instruction, Kernel
from ..registry import DRIFTERS, EXPLAINERS, FINISHERS, TIMEOUTS, WAKERS, action, emits, ends_block, helper
from ..wave import Group, Wave
from .load_store import address_expression, state_space

_SPACES = "shared shared::cta shared::cluster"
_ORDER = "release acquire relaxed cta cluster"
_LONGEST_LOOP = 16
"""Instructions from a wait to its repetition."""


def _address(b: BlockBuilder, i: Instruction, operand: str) -> str:
    return address_expression(b, operand, "uint32" if state_space(i) == "shared" else "uint64")


@emits("mbarrier.init", types="b64", modifiers="shared shared::cta")
def init(b: BlockBuilder, i: Instruction) -> None:
    address, count = _address(b, i, i.operands[0]), b.read(i.operands[1], "uint32")
    b.effect(f"mbarrier_init(G, {address}, {count}, {b.mask}, {i.index})")


@emits("mbarrier.inval", types="b64", modifiers="shared shared::cta")
def inval(b: BlockBuilder, i: Instruction) -> None:
    b.effect(f"mbarrier_inval(G, {_address(b, i, i.operands[0])}, {b.mask}, {i.index})")


@emits("mbarrier.expect_tx", "mbarrier.complete_tx", types="b64", modifiers=f"{_SPACES} {_ORDER}")
def bytes_only(b: BlockBuilder, i: Instruction) -> None:
    address, count = _address(b, i, i.operands[0]), b.read(i.operands[1], "uint32")
    b.effect(f"mbarrier_bytes(G, {address}, {count}, {i.parts[1] == 'expect_tx'}, {b.mask}, {i.index})")


@dataclass(frozen=True)
class Arrival:
    """announces: one arrival, and as many bytes as its operand says. drops: will not come in later phases.

    may_complete: without, the program promises that the arrival completes no phase (.noComplete).
    """

    announces: bool
    drops: bool
    may_complete: bool


@emits(
    "mbarrier.arrive",
    "mbarrier.arrive_drop",
    types="b64",
    modifiers=f"expect_tx noComplete {_SPACES} {_ORDER}",
)
def arrive(b: BlockBuilder, i: Instruction) -> None:
    """mbarrier.arrive [state,] [addr] {, count}, and .expect_tx with bytes in place of the count."""
    operands = list(i.operands)
    state = "_" if operands[0].startswith("[") else operands.pop(0)
    address = _address(b, i, operands[0])
    amount = b.read(operands[1], "uint32") if len(operands) > 1 else b.constant(1, "uint32")
    kind = b.constant(Arrival("expect_tx" in i.parts, i.parts[1] == "arrive_drop", "noComplete" not in i.parts))
    value = b.checked(f"mbarrier_arrive(G, {address}, {amount}, {kind}, {b.mask}, {i.index})")
    b.write(state, value, "uint64")


@emits("mbarrier.pending_count", types="b64", modifiers="")
def pending_count(b: BlockBuilder, i: Instruction) -> None:
    b.write(i.operands[0], f"{b.read(i.operands[1], 'uint64')}.astype(uint32)", "uint32")


@emits(
    "mbarrier.test_wait",
    "mbarrier.try_wait",
    types="b64",
    modifiers=f"parity {_SPACES} {_ORDER}",
    starts_block=True,
    ends_block=True,
)
def wait(b: BlockBuilder, i: Instruction) -> None:
    """mbarrier.try_wait{.parity} done, [addr], state or parity {, time limit}: the limit changes nothing."""
    b.take_guard()
    parity = "parity" in i.parts
    address = _address(b, i, i.operands[1])
    awaited = b.read(i.operands[2], "uint32" if parity else "uint64")
    done = b.written_after_block(i.operands[0])
    parks = i.parts[1] == "try_wait" and _is_retried(b.kernel, i)
    b.finish(
        f"('mbarrier.wait', {b.mask}, {address}, {awaited}, {parity}, {parks}, {done}, {i.index})",
        b.number,
        b.number + 1,
    )


def _is_retried(kernel: Kernel, wait: Instruction) -> bool:
    """Whether a false result always leads back to the wait, soon: it is then one until the phase completes."""
    at, done = wait.index + 1, wait.operands[0]
    for _ in range(_LONGEST_LOOP):
        if at == wait.index or at == len(kernel.instructions):
            break
        instruction = kernel.instructions[at]
        if instruction.parts[0] == "bra" and instruction.guard in (None, done):
            taken = instruction.guard is None or instruction.guard_negated
            at = kernel.labels[instruction.operands[0]] if taken else at + 1
        elif ends_block(instruction.opcode) or instruction.operands[:1] == (done,):
            return False
        else:
            at += 1
    return at == wait.index


# ---- execution


@helper
def mbarrier_init(group: Group, address: Any, count: Any, mask: Any, index: int) -> None:
    table, keys, positions = mbarrier_keys(group, address, mask, index, "init", known=False)
    if not keys.size:
        return
    counts = group.values_at(count, positions).astype(np.int64)
    if counts.min() < 1 or counts.max() > MAX_COUNT:
        group.fail(
            BarrierMismatch, index, position_of(positions, 0), f"mbarrier.init with a count outside 1..{MAX_COUNT}"
        )
    if (busy := np.isin(keys, table.waiters.key[table.waiters.key >= 0]) | (table.in_flight[keys] > 0)).any():
        what = table.describe(int(keys[busy][0]))
        group.fail(BarrierMismatch, index, position_of(positions, 0), f"init of the {what} while it is in use")
    lanes, _ = active(group, address, mask)
    elements, low, high = shared_elements(
        group, shared_address(group, lanes, positions, index), 8, positions, index, "write"
    )
    if (races := group.wave.races) is not None:
        races.initialize(group, keys, positions, index)
    group.wave.shared.mark(elements, 8, low, high)
    table.initialize(keys, counts)


@helper
def mbarrier_inval(group: Group, address: Any, mask: Any, index: int) -> None:
    table, keys, _ = mbarrier_keys(group, address, mask, index, "inval")
    table.count[keys] = 0


@helper
def mbarrier_bytes(group: Group, address: Any, amount: Any, expected: bool, mask: Any, index: int) -> None:
    table, keys, positions = mbarrier_keys(group, address, mask, index, "expect_tx" if expected else "complete_tx")
    if keys.size:
        if (races := group.wave.races) is not None:
            races.arrive(group, keys, positions, index)
        if group.wave.trace is not None:
            group.wave.trace.arrive("mbarrier", table.count.size, keys, group.lanes_at(positions))
        with _attributed(group, positions, index):
            (table.expect if expected else table.report)(keys, group.values_at(amount, positions).astype(np.int64))


@helper
def mbarrier_arrive(group: Group, address: Any, amount: Any, kind: Arrival, mask: Any, index: int) -> Any:
    """Arrival of `amount`, or of one with `amount` bytes announced; the state before it."""
    table, keys, positions = mbarrier_keys(group, address, mask, index, "arrive")
    state = np.zeros(group.size, np.uint64)
    if not keys.size:
        return state
    if group.wave.trace is not None:
        group.wave.trace.arrive("mbarrier", table.count.size, keys, group.lanes_at(positions))
    places = np.arange(group.size) if positions is None else positions
    amounts = group.spread(amount).astype(np.int64)
    while places.size:
        now = table.fits(keys, np.ones_like(keys) if kind.announces else amounts[places])
        state[places[now]] = _arrive_in_phase(group, table, keys[now], amounts[places[now]], kind, places[now], index)
        places, keys = places[~now], keys[~now]
    return state


def _arrive_in_phase(
    group: Group, table: Mbarriers, keys: Array, amounts: Array, kind: Arrival, places: Array, index: int
) -> Array:
    """Arrivals that come in the phases in progress, which pass on what these lanes know, and no others."""
    if (races := group.wave.races) is not None:
        races.arrive(group, keys, places, index)
    phase = table.phase[keys]
    before = (phase.astype(np.uint64) << np.uint64(32)) | table.pending[keys].astype(np.uint64)
    with _attributed(group, places, index):
        if kind.announces:
            table.expect(keys, amounts)
            amounts = np.ones_like(keys)
        (table.drop if kind.drops else table.arrive)(keys, amounts)
    if not kind.may_complete and (completed := table.phase[keys] > phase).any():
        n = int(np.argmax(completed))
        what = f".noComplete, and the arrival completes phase {int(phase[n])} of the {table.describe(int(keys[n]))}"
        group.fail(BarrierMismatch, index, int(places[n]), what)
    return before


class _attributed:
    """Names instruction, CTA and thread in a finding of the barrier table."""

    def __init__(self, group: Group, positions: Array | None, index: int) -> None:
        self.group, self.positions, self.index = group, positions, index

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, BarrierMismatch) and error.instruction is None:
            self.group.fail(BarrierMismatch, self.index, position_of(self.positions, 0), str(error))


@action("mbarrier.wait")
def wait_at(
    wave: Wave,
    group: Group,
    block: int,
    guard: Any,
    address: Any,
    awaited: Any,
    parity: bool,
    parks: bool,
    done: int,
    index: int,
) -> None:
    """Lanes whose phase is complete go on with true, those whose wait has timed out with false, the others wait."""
    table, keys, positions = mbarrier_keys(group, address, guard, index, "wait")
    wave.pc[group.lanes] = block + 1
    if not keys.size:
        return
    lanes = group.lanes_at(positions)
    value = group.values_at(awaited, positions)
    phase = table.phase[keys]
    if parity:
        complete = (phase & 1) != (value & 1)
        target = phase
    else:
        target = (value >> np.uint64(32)).astype(np.int64)
        complete = phase > target
    if wave.races is not None:
        wave.races.test_barriers(group, keys, positions, index, complete)
    if wave.trace is not None and complete.any():
        seen = (phase - 1 if parity else target)[complete]
        wave.trace.passed(table.count.size, keys[complete], lanes[complete], table.place(keys[complete])[1], seen)
    go = complete.copy()
    if parks:
        go |= table.waiters.expired[lanes]
        table.waiters.expired[lanes] = False
        stay = ~go
        if stay.any():
            wave.pc[lanes[stay]] = block
            table.park(lanes[stay], keys[stay], target[stay], index)
    else:
        go[:] = True
        wave.yielded[lanes[table.asked_again(lanes, keys, target, ~complete, index)]] = True
    if go.any():
        result = group.spread(group.registers[done]).astype(bool)
        chosen = np.flatnonzero(go)
        result[chosen if positions is None else positions[chosen]] = complete[go]
        group.registers[done] = result


WAKERS.append(Mbarriers.calling("land_awaited"))
DRIFTERS.append(Mbarriers.calling("drift"))
TIMEOUTS.append(Mbarriers.calling("expire"))
EXPLAINERS.append(Mbarriers.calling("explain"))
FINISHERS.append(Mbarriers.calling("finish"))
