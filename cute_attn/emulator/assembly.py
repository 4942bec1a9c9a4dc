"""The operations of a basic block, and their assembly into the source of one Python function.

Between the two, the registered block passes may rewrite the operations (`registry.block_pass`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import registry
from .types import carrier_dtype

EXIT = 1 << 30
"""Block number of a thread that has left the kernel: larger than any block."""


@dataclass
class Operation:
    """One Python statement with the value names it reads and writes; `pure` ones vanish if nobody reads the result.

    `index` is that of the instruction it is a part of; it follows the statement as a comment, for findings.
    """

    code: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    family: str
    pure: bool = True
    payload: Any = None
    index: int | None = None


class RegisterWrite(NamedTuple):
    """An instruction (by index) writes a register; `source` is the register whose very value it copies, if it does."""

    instruction: int
    register: int
    source: int | None


@dataclass
class BlockCode:
    """A block to be compiled: operations, what it reads first and writes (a guarded write reads first), how it ends.

    `writes` are in order; `late` are registers that the action at the block's end writes; `notes` are what families
    leave for themselves.
    """

    operations: list[Operation] = field(default_factory=list)
    live_in: set[int] = field(default_factory=set)
    killed: set[int] = field(default_factory=set)
    final: dict[int, tuple[str, str]] = field(default_factory=dict)
    writes: list[RegisterWrite] = field(default_factory=list)
    late: set[int] = field(default_factory=set)
    notes: list[Any] = field(default_factory=list)
    end: str = ""
    end_reads: tuple[str, ...] = ()
    successors: set[int] = field(default_factory=set)


def assemble(
    code: BlockCode, live_out: set[int], bits: list[int], *, profiled: bool = False, traced: bool = False
) -> str:
    """The Python source of a block: dead operations dropped, values deleted after their last use.

    `live_out`: registers that somebody may read after the block; `bits`: width of every register.
    """
    operations = list(code.operations)
    for rewrite in registry.BLOCK_PASSES:
        kept = {name for index, (name, _) in code.final.items() if index in live_out}
        operations = rewrite(operations, kept | set(code.end_reads))
    for index, (name, dtype) in code.final.items():
        if index in live_out:
            view = "" if dtype == carrier_dtype(bits[index]) else f".view({carrier_dtype(bits[index])})"
            operations.append(Operation(f"R[{index}] = {name}{view}", (name,), (), "registers", pure=False))
    operations = _without_dead(operations, set(code.end_reads))
    lines = _with_deletions(operations, set(code.end_reads), profiled, traced)
    return "def block(G, R):\n" + "".join(f"    {line}\n" for line in [*lines, f"return {code.end}"])


def _without_dead(operations: list[Operation], needed: set[str]) -> list[Operation]:
    needed, kept = set(needed), []
    for operation in reversed(operations):
        if not operation.pure or any(name in needed for name in operation.writes):
            needed.update(operation.reads)
            kept.append(operation)
    return kept[::-1]


def _with_deletions(operations: list[Operation], keep: set[str], profiled: bool, traced: bool) -> list[str]:
    last_use: dict[str, int] = {}
    for i, operation in enumerate(operations):
        for name in (*operation.reads, *operation.writes):
            last_use[name] = i
    dying: list[list[str]] = [[] for _ in operations]
    for name, i in last_use.items():
        if name not in keep:
            dying[i].append(name)
    lines = []
    for operation, names in zip(operations, dying, strict=True):
        code = operation.code if operation.index is None else f"{operation.code}  # {operation.index}"
        if traced and not operation.pure and operation.index is not None:
            lines.append(f"G.wave.trace.at = {operation.index}")
        if profiled:
            lines += ["T0 = clock()", code, f"G.wave.profile[{operation.family!r}] += clock() - T0"]
        else:
            lines.append(code)
        if names:
            lines.append(f"del {', '.join(names)}")
    return lines
