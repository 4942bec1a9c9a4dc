"""The table of instructions: a family file registers what it implements, and nothing else knows families by name.

A family (a file in `isa/`) declares
* `@emits("add", "sub", types="s32 u32")`: an emitter, called as `emit(block, instruction)` while a basic block is
  compiled; it appends Python code through the `BlockBuilder`. The key is a dotted opcode prefix; the longest
  registered prefix wins, and within one prefix the entry whose `types` hold the instruction's type suffixes ("f32", or
  "f32.f16" where there are two). With `modifiers`, a suffix that is neither a type nor listed makes the instruction
  unknown: better no result than one that ignores a rounding mode.
* `@helper`: a function that generated code may call by name.
* `@action("bar")`: what the scheduler does when a block ends with ("bar", ...): see `scheduler`.
* `@block_pass`: rewrites the list of operations of a block before it becomes Python (see `matrix_fusion`).
* `@special("%smid")`: the value of a special register for a group of lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import UnknownInstruction
from .module import Instruction
from .types import PtxType, ptx_type

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """One registered emitter; `types` and `modifiers` None accept every instruction of its prefix."""

    emit: Callable[..., None]
    types: frozenset[str] | None
    modifiers: frozenset[str] | None
    family: str

    def accepts(self, types: str, others: list[str]) -> bool:
        return (self.types is None or types in self.types) and (
            self.modifiers is None or self.modifiers.issuperset(others)
        )


_ENTRIES: dict[str, list[Entry]] = {}
_STARTS: set[str] = set()
_ENDS: set[str] = set()
_WHOLE_WARPGROUPS: set[str] = set()
HELPERS: dict[str, Any] = {}
ACTIONS: dict[str, Callable[..., None]] = {}
SPECIALS: dict[str, Callable[..., Any]] = {}
BLOCK_PASSES: list[Callable[..., Any]] = []
WAKERS: list[Callable[..., None]] = []
"""Called with the wave when every lane waits: a family may release lanes whose wait is over after all."""
TIMEOUTS: list[Callable[..., None]] = []
"""Called with the wave when no waker could help: waits that may time out do so, if that can still change anything."""
FINISHERS: list[Callable[..., None]] = []
"""Called with the wave when its last lane has exited: what is left unfinished completes, or is reported."""
DRIFTERS: list[Callable[..., None]] = []
"""Called with the wave now and then where the order is shuffled: asynchronous work may complete of its own accord."""
WATCHERS: list[tuple[str, Callable[..., None]]] = []
"""(opcode prefix, function): called with (wave, group, block) before each block, in programs with such instructions."""
EXPLAINERS: list[Callable[..., list[str]]] = []
"""Called with the wave in a deadlock: who waits for what, a line each."""


def emits(
    *prefixes: str,
    types: str | None = None,
    modifiers: str | None = None,
    starts_block: bool = False,
    ends_block: bool = False,
    whole_warpgroups: bool = False,
) -> Callable[[F], F]:
    """Registers an emitter. `ends_block`: the next instruction begins a block; `starts_block`: this one does.

    `whole_warpgroups`: a block with this instruction is run by whole warpgroups only, which wait for their warps.
    """

    def register(emit: F) -> F:
        family = emit.__module__.rsplit(".", 1)[-1]
        accepted, allowed = (frozenset(names.split()) if names is not None else None for names in (types, modifiers))
        for prefix in prefixes:
            _ENTRIES.setdefault(prefix, []).append(Entry(emit, accepted, allowed, family))
            if starts_block:
                _STARTS.add(prefix)
            if ends_block:
                _ENDS.add(prefix)
            if whole_warpgroups:
                _WHOLE_WARPGROUPS.add(prefix)
        return emit

    return register


def helper(function: F) -> F:
    """Makes `function` callable by its name from generated code."""
    HELPERS[function.__name__] = function
    return function


def action(kind: str) -> Callable[[F], F]:
    """Registers the scheduler's reaction to a block that ends with (kind, ...)."""

    def register(function: F) -> F:
        ACTIONS[kind] = function
        return function

    return register


def special(*names: str) -> Callable[[F], F]:
    """Registers a special register: function(group) -> uint32 scalar or array over the group's lanes."""

    def register(function: F) -> F:
        for name in names:
            SPECIALS[name] = function
        return function

    return register


def block_pass(function: F) -> F:
    """Registers a rewrite of a block's operations, run in order of registration."""
    BLOCK_PASSES.append(function)
    return function


def _prefixes(opcode: str) -> list[str]:
    parts = opcode.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def instruction_type(opcode: str) -> PtxType | None:
    """The last suffix of an opcode that names a type: "ld.global.v4.f32" -> f32."""
    for part in reversed(opcode.split(".")[1:]):
        if (kind := ptx_type(part)) is not None:
            return kind
    return None


def required_type(i: Instruction) -> PtxType:
    """`instruction_type` of an instruction. Raises UnknownInstruction if it names none."""
    kind = instruction_type(i.opcode)
    if kind is None:
        raise UnknownInstruction(i.opcode)
    return kind


def find(opcode: str) -> Entry | None:
    """The entry that implements `opcode`, or None."""
    for prefix in _prefixes(opcode):
        suffixes = opcode[len(prefix) :].split(".")[1:]
        types = ".".join(part for part in suffixes if ptx_type(part) is not None)
        others = [part for part in suffixes if ptx_type(part) is None]
        for entry in _ENTRIES.get(prefix, ()):
            if entry.accepts(types, others):
                return entry
    return None


def starts_block(opcode: str) -> bool:
    return any(prefix in _STARTS for prefix in _prefixes(opcode))


def needs_whole_warpgroups(opcode: str) -> bool:
    return any(prefix in _WHOLE_WARPGROUPS for prefix in _prefixes(opcode))


def ends_block(opcode: str) -> bool:
    return any(prefix in _ENDS for prefix in _prefixes(opcode))
