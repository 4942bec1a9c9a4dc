"""Kernels as the parser leaves them: parameters, shared and local variables, registers, instructions and labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below the value."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter: its place in the parameter buffer, in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Instruction:
    """One statement. `guard` is the predicate register of `@p` / `@!p`; `source` is "file:line" where known."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    guard_negated: bool
    text: str
    source: str | None
    index: int

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.replace("::", "@").split("."))

    @property
    def place(self) -> str:
        """The quoted text, and the line of the kernel's source where the program keeps line information."""
        return f"`{self.text}` ({self.source})" if self.source else f"`{self.text}`"


@dataclass
class Variable:
    """A shared or local variable: its offset from the start of that memory and its size, in bytes."""

    offset: int
    size: int


@dataclass
class Kernel:
    """One entry of a module.

    `labels` maps a label to the index of the instruction that follows it. `program` is the compiled form (see
    `program.compile_kernel`), made at the first launch.
    `required_block` is `.reqntid`, `max_threads` the product of `.maxntid` or `.reqntid` (None if absent).
    `required_cluster` is `.reqnctapercluster`, `max_cluster` `.maxclusterrank` in CTAs; with `.explicitcluster`
    (`needs_cluster`) the launch has to name a cluster if `required_cluster` does not. `max_registers` is `.maxnreg`,
    for each thread, `least_ctas` `.minnctapersm`.
    `dynamic_shared` names the `.extern .shared` variables: they begin at `dynamic_shared_start`. `arguments` names the
    variables in `local` that carry arguments and results of calls. `branch_targets` are the tables of brx.idx.
    """

    name: str
    target: str
    parameters: list[Parameter]
    parameter_bytes: int
    required_block: tuple[int, int, int] | None
    max_threads: int | None
    shared: dict[str, Variable]
    static_shared_bytes: int
    dynamic_shared_align: int
    dynamic_shared: list[str]
    required_cluster: tuple[int, int, int] | None = None
    max_cluster: int | None = None
    needs_cluster: bool = False
    max_registers: int | None = None
    least_ctas: int = 1
    local: dict[str, Variable] = field(default_factory=dict)
    local_bytes: int = 0
    arguments: set[str] = field(default_factory=set)
    branch_targets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    register_bits: list[int] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    constants: dict[str, bytes] = field(default_factory=dict)
    program: Any = None

    def shared_bytes(self, dynamic: int) -> int:
        """Shared memory of a CTA that is launched with so many bytes of dynamic shared memory."""
        return self.dynamic_shared_start + dynamic if dynamic else self.static_shared_bytes

    @property
    def dynamic_shared_start(self) -> int:
        """Offset in bytes of dynamic shared memory, which lies after the static variables."""
        return round_up(self.static_shared_bytes, self.dynamic_shared_align)

    def parameter_offset(self, name: str) -> int | None:
        """Offset in bytes of the parameter called `name`; None if there is none."""
        return next((p.offset for p in self.parameters if p.name == name), None)
