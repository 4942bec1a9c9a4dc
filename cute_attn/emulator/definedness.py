"""Registers and local memory that nobody wrote, followed until they decide something, as memcheck follows memory.

Reading such a register is no mistake in itself: compilers leave registers undefined where no result depends on them,
such as the accumulators of a first wgmma that does not add to them, or the values of a load whose guard was false. So
undefined values may be moved, selected among and computed with. A finding is a lane in which one decides something: an
address, a branch or a guard, a value stored to global memory, an operand of mma, of a barrier, or of any other
instruction that does more than compute.

In nearly all kernels no register is live at the entry, and nothing is done. Elsewhere a data-flow analysis over the
blocks finds the registers that may be undefined somewhere; each gets a companion register of one bit that says per lane
whether it is defined, and the blocks in which one of them may be undefined compute these bits along.

A value is defined if all it is computed from is. A selection needs its condition and what it selects; `and` of
predicates that has a false one, and `or` that has a true one, is defined. The bits of a register are not told apart:
one that `mov` packs of a defined and an undefined part counts as defined, as compilers do that to store the one part.
Values stored to shared and local memory count as defined from then on, but what is loaded from bytes of local memory
that the thread never wrote is undefined.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import numpy as np

from .assembly import EXIT, BlockCode, Operation
from .errors import UninitializedRegister
from .module import Instruction, Kernel
from .registry import HELPERS, helper
from .wave import Group

Origins = frozenset[str]
"""Names of the registers, or "local memory", that nobody wrote and from which a value may come."""

_READ = re.compile(r"(v\d+) = R\[(\d+)\]")
_LOAD = "= load_local("
_LOCAL: Origins = frozenset({"local memory"})
_TRUE = "K_bool_01"
_GUARDS = ("mask", "guard")
"""What helpers call the parameter that holds the lanes that take part."""
_ROLES = {
    **dict.fromkeys(("address", "dest", "source", "to", "barrier", "tensor_map"), "the address"),
    **dict.fromkeys(_GUARDS, "the guard"),
}
"""What a helper's argument is, by the parameter's name, for reports."""
_TOLERATED = {
    "store_shared": ("values",),
    "store_local": ("values",),
    "matrix_store": ("values",),
    "send_shared": ("values",),
    "seen_before": ("address", "values"),
    "warp_shuffle": ("value",),
    "wgmma": ("c",),
}
"""Arguments that may be undefined: what is stored to shared and local memory, and what is followed another way."""
_NAMED_ORIGINS = 4


def follow_undefined(
    kernel: Kernel,
    blocks: list[list[Instruction]],
    codes: list[BlockCode],
    constants: dict[str, Any],
    live_in: list[set[int]],
) -> bool:
    """Adds to the blocks what the finding needs; False if no register can be read that nobody wrote.

    blocks, codes: the kernel's instructions and what they became; live_in: by block, the registers that may be read.
    """
    loads_local = kernel.local_bytes and any(_LOAD in o.code for code in codes for o in code.operations)
    if not live_in[0] and not loads_local:
        return False
    names = {number: name for name, number in kernel.registers.items()}
    entry = {number: frozenset({names[number]}) for number in live_in[0]}
    undefined = _may_be_undefined(codes, live_in, entry)
    tracked = sorted(set().union(*undefined))
    companions = {number: len(kernel.register_bits) + n for n, number in enumerate(tracked)}
    kernel.register_bits.extend([1] * len(tracked))
    constants[_TRUE] = np.True_
    for block, code, here in zip(blocks, codes, undefined, strict=True):
        _Follower(block, code, here, companions).run()
    return True


def _propagates(operation: Operation) -> bool:
    return operation.pure or "= warp_shuffle(" in operation.code


def _flow(code: BlockCode, undefined: dict[int, Origins]) -> dict[int, Origins]:
    """Registers that may be undefined after a block, given those before it."""
    values: dict[str, Origins] = {}
    for operation in code.operations:
        if (read := _READ.fullmatch(operation.code)) is not None:
            if (origins := undefined.get(int(read[2]))) is not None:
                values[read[1]] = origins
        elif _LOAD in operation.code:
            values.update(dict.fromkeys(operation.writes, _LOCAL))
        elif values and _propagates(operation):
            sources = [values[name] for name in operation.reads if name in values]
            if sources:
                values.update(dict.fromkeys(operation.writes, frozenset().union(*sources)))
    kept = {number: origins for number, origins in undefined.items() if number not in code.killed}
    kept.update({number: values[name] for number, (name, _) in code.final.items() if name in values})
    return {number: origins for number, origins in kept.items() if number not in code.late}


def _may_be_undefined(
    codes: list[BlockCode], live_in: list[set[int]], entry: dict[int, Origins]
) -> list[dict[int, Origins]]:
    """By block: the registers that may be undefined where it begins, and be read."""
    before: list[dict[int, Origins]] = [{} for _ in codes]
    before[0] = entry
    waiting = deque(range(len(codes)))
    while waiting:
        number = waiting.popleft()
        after = _flow(codes[number], before[number])
        for successor in codes[number].successors:
            if successor >= EXIT:
                continue
            known = before[successor]
            merged = {r: known.get(r, frozenset()) | o for r, o in after.items() if r in live_in[successor]}
            if any(known.get(register) != origins for register, origins in merged.items()):
                before[successor] = {**known, **merged}
                waiting.append(successor)
    return before


class _Follower:
    """Rewrites one block: `bits` are the names of the bits of values that may be undefined, `origins` where from."""

    def __init__(
        self, block: list[Instruction], code: BlockCode, undefined: dict[int, Origins], companions: dict[int, int]
    ) -> None:
        self.instructions = {instruction.index: instruction for instruction in block}
        self.last = block[-1].index
        self.code = code
        self.undefined = undefined
        self.companions = companions
        self.bits: dict[str, str] = {}
        self.origins: dict[str, Origins] = {}
        self.operations: list[Operation] = []

    def run(self) -> None:
        if self.undefined or any(_LOAD in operation.code for operation in self.code.operations):
            for operation in self.code.operations:
                self._follow(operation)
            self._require_end()
            self.code.operations[:] = self.operations
        written = [number for number in self.companions if number in self.code.killed | self.code.late]
        if written:
            self.code.operations.append(Operation(f"defined = {_TRUE}", (), ("defined",), "definedness"))
        for number in written:
            name = "" if number in self.code.late else self.code.final[number][0]
            self.code.final[self.companions[number]] = (self.bits.get(name, "defined"), "bool")
            self.code.killed.add(self.companions[number])

    # ---- building

    def _follow(self, operation: Operation) -> None:
        read = _READ.fullmatch(operation.code)
        if read is not None:
            self.operations.append(operation)
            number = int(read[2])
            if number in self.undefined:
                self.code.live_in.add(self.companions[number])
                self._name_bits(operation, f"R[{self.companions[number]}]", self.undefined[number])
        elif _LOAD in operation.code:
            self._require(operation)
            self.operations.append(operation)
            call = next(node for node in ast.walk(ast.parse(operation.code)) if isinstance(node, ast.Call))
            _, address, size, count, mask, index = (ast.unparse(argument) for argument in call.args)
            self._name_bits(operation, f"local_written(G, {address}, {size} * {count}, {mask}, {index})", _LOCAL)
        elif not any(name in self.bits for name in operation.reads):
            self.operations.append(operation)
        elif operation.pure:
            self.operations.append(operation)
            expression = ast.parse(operation.code).body[0].value  # type: ignore[attr-defined]
            self._name_bits(operation, self._bits(expression, operation.index), self._from(operation.reads))
        else:
            self._require(operation)
            self.operations.append(operation)

    def _name_bits(self, operation: Operation, expression: str | None, origins: Origins) -> None:
        """Names the bits of what an operation writes."""
        if expression is None:
            return
        (written,) = operation.writes
        name = f"d{len(self.bits)}"
        reads = tuple(dict.fromkeys(re.findall(r"\b[dv]\d+\b", expression)))
        self.operations.append(
            Operation(f"{name} = {expression}", reads, (name,), "definedness", index=operation.index)
        )
        self.bits[written], self.origins[written] = name, origins

    def _from(self, names: Iterable[str]) -> Origins:
        found = [self.origins[name] for name in names if name in self.origins]
        return frozenset().union(*found)

    def _bits(self, node: ast.AST, index: int | None) -> str | None:
        """The expression of the bits of an expression; None if it is defined."""
        if isinstance(node, ast.Name):
            return self.bits.get(node.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "where":
            condition, first, second = node.args
            chosen = [self._bits(branch, index) for branch in (first, second)]
            selected = None
            if chosen != [None, None]:
                selected = f"where({ast.unparse(condition)}, {chosen[0] or _TRUE}, {chosen[1] or _TRUE})"
            return _all_of([self._bits(condition, index), selected])
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
            instruction = self.instructions.get(-1 if index is None else index)
            opcode = () if instruction is None else instruction.parts
            if opcode[:1] == ("mov",):
                parts = [self._bits(part, index) for part in (node.left, node.right)]
                return None if None in parts else f"({parts[0]} | {parts[1]})"
            if "pred" in opcode or "setp" in opcode:
                return self._logic(node, index)
        return _all_of([self._bits(child, index) for child in ast.iter_child_nodes(node)])

    def _logic(self, node: ast.BinOp, index: int | None) -> str | None:
        """and: defined too where one is false and defined; or: where one is true and defined."""
        left, right = self._bits(node.left, index), self._bits(node.right, index)
        if left is None and right is None:
            return None
        decides = "~" if isinstance(node.op, ast.BitAnd) else ""
        terms = [_all_of([left, right]) or _TRUE]
        for bits, operand in ((left, node.left), (right, node.right)):
            terms.append(f"({decides}({ast.unparse(operand)})" + (f" & {bits})" if bits else ")"))
        return f"({' | '.join(terms)})"

    # ---- what decides

    def _require(self, operation: Operation) -> None:
        """Requires an operation that does something to be given defined values."""
        if operation.payload is not None and not operation.code:
            for name in operation.reads:
                if name in self.bits:
                    self._check(self.bits[name], "None", operation.index, "an operand", self.origins[name])
            return
        statement = ast.parse(operation.code).body[0]
        value = statement.value  # type: ignore[attr-defined]
        call = next((node for node in ast.walk(value) if isinstance(node, ast.Call)), None)
        if call is None or not isinstance(call.func, ast.Name):
            return
        function = call.func.id
        if function == "warp_shuffle":
            self._shuffle(operation, call)
        elif function == "wgmma":
            self._accumulate(call, operation.index)
        arguments = list(zip_longest(_parameters(function), call.args))
        mask = next((_name(argument) for parameter, argument in arguments if parameter in _GUARDS), "None")
        for parameter, argument in arguments:
            if parameter in _TOLERATED.get(function, ()) or (bits := self._bits(argument, operation.index)) is None:
                continue
            origins = self._from(node.id for node in ast.walk(argument) if isinstance(node, ast.Name))
            role = _ROLES.get(parameter, "an operand")
            if function in ("store_global", "store_generic") and parameter == "values":
                role = "the value stored"
            self._check(bits, "None" if parameter in _GUARDS else mask, operation.index, role, origins)

    def _shuffle(self, operation: Operation, call: ast.Call) -> None:
        """The bits of a shuffled value are shuffled as it is."""
        bits = self._bits(call.args[2], operation.index)
        if bits is not None:
            arguments = [ast.unparse(argument) for argument in call.args]
            arguments[2] = f"{bits}.astype(uint32)"
            origins = self._from(operation.reads)
            self._name_bits(operation, f"warp_shuffle({', '.join(arguments)})[0] != 0", origins)

    def _accumulate(self, call: ast.Call, index: int | None) -> None:
        """wgmma reads its accumulator only where scale-d is true."""
        bits = self._bits(call.args[2], index)
        if bits is not None:
            names = (node.id for node in ast.walk(call.args[2]) if isinstance(node, ast.Name))
            adds = ast.unparse(call.args[5])
            self._check(bits, adds, index, "the accumulator", self._from(names))

    def _require_end(self) -> None:
        if not any(name in self.bits for name in self.code.end_reads):
            return
        kind, *elements = ast.parse(self.code.end).body[0].value.elts  # type: ignore[attr-defined]
        guard = _name(elements[0]) if kind.value != "branch" else "None"
        for n, element in enumerate(elements):
            if (bits := self._bits(element, self.last)) is not None:
                names = (node.id for node in ast.walk(element) if isinstance(node, ast.Name))
                role = "an operand" if n else "the condition" if kind.value == "branch" else "the guard"
                self._check(bits, guard if n else "None", self.last, role, self._from(names))

    def _check(self, bits: str, mask: str, index: int | None, role: str, origins: Origins) -> None:
        some = tuple(sorted(origins)[:_NAMED_ORIGINS])
        code = f"require_defined(G, {bits}, {mask}, {self.last if index is None else index}, {role!r}, {some!r})"
        reads = tuple(dict.fromkeys(re.findall(r"\b[dv]\d+\b", f"{bits} {mask}")))
        self.operations.append(Operation(code, reads, (), "definedness", pure=False, index=index))


@lru_cache(maxsize=1024)
def _parameters(function: str) -> tuple[str, ...]:
    """The names of a helper's parameters; none for what is no function of Python."""
    found = HELPERS.get(function)
    return tuple(inspect.signature(found).parameters) if inspect.isfunction(found) else ()


def _name(node: ast.AST) -> str:
    """The name of a value of the block, "None" for what is none."""
    return node.id if isinstance(node, ast.Name) and re.fullmatch(r"v\d+", node.id) else "None"


def _all_of(parts: list[str | None]) -> str | None:
    terms = list(dict.fromkeys(part for part in parts if part is not None))
    if not terms:
        return None
    return terms[0] if len(terms) == 1 else f"({' & '.join(terms)})"


@helper
def require_defined(group: Group, bits: Any, mask: Any, index: int, role: str, origins: tuple[str, ...]) -> None:
    """Reports lanes of `mask` whose bits are not set."""
    if mask is None:
        if bits.all():
            return
        bad = ~bits
    elif not (bad := ~bits & mask).any():
        return
    position = int(np.argmax(group.spread(bad)))
    group.fail(
        UninitializedRegister,
        index,
        position,
        f"{role} depends on what this thread never wrote: {' or '.join(origins)}",
    )
