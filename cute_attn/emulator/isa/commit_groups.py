"""Commit groups: how a thread closes a group of asynchronous operations and waits for all but its newest ones.

`cp.async.commit_group`, `cp.async.wait_group n`, `cp.async.wait_all` here; other kinds of groups use the same helpers.
Where the order is shuffled, operations may also complete by themselves, except those of wgmma: their results are in
registers, which no other thread sees, and reading them early is found by other means.
"""

from __future__ import annotations

from typing import Any

from ..async_work import CommitGroups
from ..codegen import BlockBuilder
from ..errors import UnknownInstruction
from ..module import Instruction
from ..registry import DRIFTERS, FINISHERS, emits, helper
from ..wave import Group, Wave


@emits("cp.async.commit_group", modifiers="")
def commit(b: BlockBuilder, i: Instruction) -> None:
    b.effect(f"commit_group(G, 'cp.async', {b.mask})")


@emits("cp.async.wait_group", "cp.async.wait_all", modifiers="")
def wait(b: BlockBuilder, i: Instruction) -> None:
    if i.parts[-1] == "wait_all":
        b.effect(f"wait_all_groups(G, 'cp.async', {b.mask})")
        return
    newest = b.literal(i.operands[0])
    if newest is None:
        raise UnknownInstruction(i.text)
    b.effect(f"wait_group(G, 'cp.async', {newest}, {b.mask})")


@helper
def commit_group(group: Group, kind: str, mask: Any) -> None:
    lanes = group.lanes_where(mask)
    CommitGroups.of(group.wave, kind).commit(lanes)
    if (races := group.wave.races) is not None:
        races.close_group(kind, lanes)


@helper
def wait_group(group: Group, kind: str, newest: int, mask: Any) -> None:
    lanes = group.lanes_where(mask)
    CommitGroups.of(group.wave, kind).wait(lanes, newest)
    if (races := group.wave.races) is not None:
        races.await_groups(kind, lanes, newest)


@helper
def wait_all_groups(group: Group, kind: str, mask: Any) -> None:
    lanes = group.lanes_where(mask)
    CommitGroups.of(group.wave, kind).wait_all(lanes)
    if (races := group.wave.races) is not None:
        races.await_all(kind, lanes)


def _drift(wave: Wave) -> None:
    assert wave.random is not None
    for kind, groups in wave.state.get("commit groups", {}).items():
        if kind != "wgmma":
            groups.drift(wave.random)


def _finish(wave: Wave) -> None:
    for groups in wave.state.get("commit groups", {}).values():
        groups.finish()


DRIFTERS.append(_drift)
FINISHERS.append(_finish)
