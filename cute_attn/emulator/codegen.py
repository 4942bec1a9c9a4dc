"""A basic block of PTX -> operations on named values, which `assembly` turns into one Python function.

Inside a block every write makes a new value (static single assignment), so a value is an immutable array and its
identity is its version. A value knows the numpy dtype it was computed in; reading it in another dtype of the same
width is a view. A value that is the same in all lanes stays a numpy scalar. Registers are read from `R[i]` at the first
use and written back at the end of the block if somebody may read them later, in the carrier dtype of their width.

The generated function is `block(G, R)`: G is the group of lanes that runs it (see `wave`), R its registers. It returns
what happens next, for example ("jump", 3) or ("bar", 0, None, 17): see `registry.action`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from . import registry
from .assembly import BlockCode, Operation, RegisterWrite
from .errors import UnknownInstruction
from .module import Instruction, Kernel
from .ptx_text import split_operands
from .types import carrier_dtype, item_bits

_VALUE = re.compile(r"\bv\d+\b")


def _value_names(code: str, writes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in _VALUE.findall(code) if name not in writes))


class BlockBuilder:
    """What an emitter sees: operands in, Python statements out.

    `constants` collects the objects that generated code names (K0, K1, ...); it is shared by all blocks of a kernel.
    """

    def __init__(self, kernel: Kernel, number: int, targets: dict[str, int], constants: dict[str, Any]) -> None:
        self.kernel = kernel
        self.number = number
        self.targets = targets
        self.constants = constants
        self.code = BlockCode()
        self.guard: str | None = None
        self.instruction: Instruction
        self.family = ""
        self._values: dict[int, tuple[str, str]] = {}
        self._views: dict[tuple[str, str], str] = {}
        self._count = 0

    # ---- building

    def add(self, instruction: Instruction) -> None:
        """Appends one instruction; one that nobody implements becomes an error at run time, if it is reached."""
        self.instruction = instruction
        self.guard = None
        entry = registry.find(instruction.opcode)
        first = len(self.code.operations)
        self.family = entry.family if entry else "unknown"
        try:
            if instruction.guard is not None and not registry.ends_block(instruction.opcode):
                self.guard = self.predicate(("!" if instruction.guard_negated else "") + instruction.guard)
            if entry is None:
                raise UnknownInstruction(instruction.opcode)
            entry.emit(self, instruction)
        except (UnknownInstruction, IndexError, KeyError):  # an operand too few, or one that is no register
            self.effect(f"unknown_instruction(G, {instruction.index})")
        for operation in self.code.operations[first:]:
            operation.index = instruction.index

    def new_name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def constant(self, value: Any, dtype: str | None = None) -> str:
        """A name for `value`, made a numpy scalar of `dtype` if one is given (integers wrap)."""
        if dtype is not None:
            if dtype == "bool":
                value = np.bool_(value)
            elif dtype == "complex128":
                raise UnknownInstruction(self.instruction.text)
            elif dtype.startswith(("int", "uint")):
                unsigned = np.array(int(value) & ((1 << item_bits(dtype)) - 1), f"uint{item_bits(dtype)}")
                value = unsigned.view(dtype)[()]
            else:
                value = np.dtype(dtype).type(value)
            key = f"K_{dtype}_{value.tobytes().hex()}"
        else:
            key = f"K_{len(self.constants)}"
        self.constants[key] = value
        return key

    def operation(
        self,
        code: str,
        writes: tuple[str, ...] = (),
        *,
        reads: tuple[str, ...] | None = None,
        pure: bool = True,
        payload: Any = None,
    ) -> None:
        """Appends a statement. What it reads is taken from its text unless a payload stands for a text yet to come."""
        read = _value_names(code, writes) if reads is None else reads
        self.code.operations.append(Operation(code, read, writes, self.family, pure, payload))

    def effect(self, code: str) -> None:
        """Appends a statement that is executed for what it does."""
        self.operation(code, pure=False)

    def assign(self, expression: str) -> str:
        """Names the value of an expression."""
        name = self.new_name()
        self.operation(f"{name} = {expression}", (name,))
        return name

    def checked(self, expression: str) -> str:
        """As `assign`, for an expression that may report a finding: evaluated even if nobody reads the result."""
        name = self.new_name()
        self.operation(f"{name} = {expression}", (name,), pure=False)
        return name

    def finish(self, code: str, *successors: int) -> None:
        """Ends the block: `code` is the tuple that the function returns."""
        self.code.end = code
        self.code.end_reads = _value_names(code, ())
        self.code.successors = set(successors)

    def finish_yielding(self, lanes: str) -> None:
        """Ends the block; the lanes for which the value `lanes` is true run again when no others can."""
        self.finish(f"('yield', {lanes})", self.number + 1)

    def written_after_block(self, dest: str) -> int:
        """The number of a register that the action at the block's end writes."""
        index = self.kernel.registers[dest]
        self.code.late.add(index)
        if self.instruction.guard is None:
            self.code.killed.add(index)
        return index

    # ---- reading

    def take_guard(self) -> None:
        """Makes the guard hold for what follows: for instructions that end a block and write registers."""
        i = self.instruction
        if i.guard is not None:
            self.guard = self.predicate(("!" if i.guard_negated else "") + i.guard)

    @property
    def mask(self) -> str:
        """The guard predicate as an expression: None where the instruction has none."""
        return "None" if self.guard is None else self.guard

    def carry_register(self) -> str:
        """The condition code of add.cc and its kin: a one-bit register that only those instructions can name."""
        name = "%carry"
        if name not in self.kernel.registers:
            self.kernel.registers[name] = len(self.kernel.register_bits)
            self.kernel.register_bits.append(1)
        return name

    def is_register(self, operand: str) -> bool:
        return operand in self.kernel.registers

    def literal(self, operand: str) -> int | None:
        """The value of an integer literal; None for anything else."""
        match = re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", operand)
        if match is None:
            return None
        digits = match[2]
        value = int(digits, 8) if re.fullmatch(r"0[0-7]+", digits) else int(digits, 0)
        return -value if match[1] else value

    def read(self, operand: str, dtype: str) -> str:
        """The expression of an operand in `dtype`; a wider register is truncated, a literal converted."""
        if operand in self.kernel.registers:
            return self._register(self.kernel.registers[operand], dtype)
        if operand.startswith("%"):
            return self._special(operand, dtype)
        if (value := self.literal(operand)) is not None:
            floating = dtype.startswith("float")
            return self.constant(float(value) if floating else value, dtype)
        if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", operand):
            bits = np.array(int(match[1], 16), f"uint{4 * len(match[1])}")
            value_at = bits.view(f"float{4 * len(match[1])}")[()]
            if item_bits(dtype) != 4 * len(match[1]):
                return self.constant(value_at, dtype)
            return self.constant(bits.view(dtype)[()], None if dtype == "bool" else dtype)
        return self._symbol(operand, dtype)

    def predicate(self, operand: str) -> str:
        """A predicate operand, `!` included, as a named bool value."""
        if operand.startswith("!"):
            return self.assign(f"~{self.read(operand[1:], 'bool')}")
        return self.read(operand, "bool")

    def vector(self, operand: str) -> list[str]:
        """The elements of "{a, b}"; a plain operand is a vector of one."""
        return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]

    def _register(self, index: int, dtype: str) -> str:
        if index not in self._values:
            name = self.new_name()
            carrier = carrier_dtype(self.kernel.register_bits[index])
            self.code.operations.append(Operation(f"{name} = R[{index}]", (), (name,), "registers"))
            self.code.live_in.add(index)
            self._values[index] = (name, carrier)
        name, have = self._values[index]
        return self._viewed(name, have, dtype)

    def _viewed(self, name: str, have: str, want: str) -> str:
        if have == want:
            return name
        if (cached := self._views.get((name, want))) is not None:
            return cached
        if item_bits(have) == item_bits(want):
            expression = f"{name}.view({want})"
        elif {"bool", "complex128"} & {have, want}:
            raise UnknownInstruction(self.instruction.text)
        else:
            source = self._viewed(name, have, carrier_dtype(item_bits(have)))
            narrowed = f"{source}.astype({carrier_dtype(item_bits(want))})"
            expression = narrowed if want.startswith("uint") else f"{narrowed}.view({want})"
            name = source
        view = self.new_name()
        self.code.operations.append(Operation(f"{view} = {expression}", (name,), (view,), "views"))
        self._views[name, want] = view
        return view

    def _special(self, operand: str, dtype: str) -> str:
        function = registry.SPECIALS.get(operand)
        if function is None:
            raise UnknownInstruction(operand)
        name = self.assign(f"special(G, {operand!r})")
        return name if dtype == "uint32" else f"{name}.astype({dtype})"

    def _symbol(self, name: str, dtype: str) -> str:
        """The address of a variable or parameter, relative to its state space, or of a module constant."""
        kernel = self.kernel
        if name == "WARP_SZ":
            return self.constant(32, dtype)
        if name in kernel.dynamic_shared:
            return self.constant(kernel.dynamic_shared_start, dtype)
        if (offset := kernel.parameter_offset(name)) is not None:
            return self.constant(offset, dtype)
        for space in (kernel.shared, kernel.local):
            if name in space:
                return self.constant(space[name].offset, dtype)
        if name in kernel.constants:
            return f"{self.assign(f'constant_address(G, {name!r})')}.astype({dtype})"
        raise UnknownInstruction(self.instruction.text)

    # ---- writing

    def write(self, dest: str, expression: str, dtype: str) -> None:
        """Gives register `dest` the value of `expression`, which has `dtype`; honours the guard; `_` is nobody."""
        if dest == "_":
            return
        index = self.kernel.registers[dest]
        bits = self.kernel.register_bits[index]
        if item_bits(dtype) < bits < 128:
            wide = f"{'int' if dtype.startswith('int') else 'uint'}{bits}"
            expression, dtype = f"({expression}).astype({wide})", wide
        elif item_bits(dtype) != max(bits, 1):
            raise UnknownInstruction(self.instruction.text)
        if self.guard is not None:
            old = self._register(index, dtype)
            expression = f"where({self.guard}, {expression}, {old})"
        self._bind(index, self.assign(expression), dtype)

    def copy(self, dest: str, source: str) -> None:
        """Gives register `dest` the very value of register `source`: no statement."""
        index, width = self.kernel.registers[source], self.kernel.register_bits
        self._register(index, carrier_dtype(width[index]))
        self.bind(dest, *self._values[index])
        if dest != "_":
            self.code.writes[-1] = self.code.writes[-1]._replace(source=index)

    def bind(self, dest: str, name: str, dtype: str) -> None:
        """Gives register `dest` a value that already has a name: no statement unless a guard selects."""
        if dest == "_":
            return
        index = self.kernel.registers[dest]
        if self.guard is not None or item_bits(dtype) != max(self.kernel.register_bits[index], 1):
            self.write(dest, name, dtype)
        else:
            self._bind(index, name, dtype)

    def _bind(self, index: int, name: str, dtype: str) -> None:
        self._values[index] = (name, dtype)
        self.code.writes.append(RegisterWrite(self.instruction.index, index, None))
        self.code.killed.add(index)
        self.code.final[index] = (name, dtype)
