"""PTX text -> kernels: parameters, shared and local variables, registers, instructions and labels.

The parser knows the grammar, not the instruction set (`program` forms basic blocks). Names declared inside `{ }` scopes
(inline assembly) are made unique, `.loc` lines are kept so that findings can name the source line, vector operands
stay one operand, and calls of device functions are expanded (see `functions`).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .errors import ParseError
from .functions import Formal, Function, find_functions
from .types import ptx_type


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
        return _align(self.static_shared_bytes, self.dynamic_shared_align)

    def parameter_offset(self, name: str) -> int | None:
        """Offset in bytes of the parameter called `name`; None if there is none."""
        return next((p.offset for p in self.parameters if p.name == name), None)


def split_operands(text: str) -> list[str]:
    """Splits at commas outside brackets: "{%r1, %r2}, [%rd1+8]" -> ["{%r1, %r2}", "[%rd1+8]"]."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,{\[(])+", text)
    return [p.strip() for p in parts if p.strip()]


def _strip_comments(ptx: str) -> str:
    pattern = r'("(?:[^"\\]|\\.)*")|//[^\n]*|/\*.*?\*/'
    return re.sub(pattern, lambda m: m[1] or " ", ptx, flags=re.S)


def _matching_brace(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise ParseError("unbalanced braces in the PTX text")


def _align(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def _tokens(body: str) -> Iterator[tuple[str, str]]:
    """Yields ("open" | "close" | "label" | "loc" | "statement", text) in order."""
    scan = re.compile(
        r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<loc>\.(?:loc|file)\b[^\n]*)|(?P<label>[\w$%]+)\s*:(?!:)"
        r"|(?P<statement>[^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)"
    )
    position = 0
    end = len(body.rstrip())
    while position < end:
        match = scan.match(body, position)
        if match is None or match.end() == position:
            raise ParseError(f"cannot parse PTX near: {body[position : position + 80].strip()!r}")
        position = match.end()
        kind = str(match.lastgroup)
        if text := " ".join(match[kind].split()):
            yield kind, text


class _Scopes:
    """Renames registers and labels declared inside nested `{ }` so that every name is unique in the kernel."""

    def __init__(self) -> None:
        self._stack: list[dict[str, str]] = [{}]
        self._count = 0

    @property
    def nested(self) -> bool:
        return len(self._stack) > 1

    def open(self, labels: list[str]) -> None:
        self._count += 1
        self._stack.append({name: f"{name}__{self._count}" for name in labels})

    def close(self) -> None:
        self._stack.pop()

    def alias(self, name: str, other: str) -> None:
        """In the innermost scope, `name` means what is called `other` in the kernel."""
        self._stack[-1][name] = other

    def declare(self, name: str) -> str:
        if not self.nested:
            return name
        self._stack[-1][name] = unique = f"{name}__{self._count}"
        return unique

    def rename(self, text: str) -> str:
        if not self.nested:
            return text

        def find(match: re.Match[str]) -> str:
            return next((s[match[0]] for s in reversed(self._stack) if match[0] in s), match[0])

        return re.sub(r"(?<![\w$%.])%?[\w$]+", find, text)


class _BodyParser:
    """Fills a `Kernel` from the text between the braces of its body."""

    def __init__(self, kernel: Kernel, files: dict[str, str], functions: dict[str, Function]) -> None:
        self.kernel = kernel
        self.files = files
        self.functions = functions
        self.scopes = _Scopes()
        self.vectors: dict[str, list[str]] = {}
        self.source: str | None = None
        self.calls: list[tuple[str, str]] = []
        """(function, label of its end) of the calls that are being expanded, outermost first."""

    def parse(self, tokens: list[tuple[str, str]]) -> None:
        label = ""
        for i, (kind, text) in enumerate(tokens):
            if kind == "open":
                self.scopes.open(self._labels_of_scope(tokens, i))
            elif kind == "close":
                self.scopes.close()
            elif kind == "label":
                label = self.scopes.rename(text)
                self.kernel.labels[label] = len(self.kernel.instructions)
            elif kind == "loc":
                self._loc(text)
            elif text.startswith(".branchtargets"):
                targets = split_operands(text.partition(" ")[2])
                self.kernel.branch_targets[label] = tuple(self.scopes.rename(target) for target in targets)
            elif text.startswith("."):
                self._directive(text)
            else:
                self._instruction(self.scopes.rename(text))

    @staticmethod
    def _labels_of_scope(tokens: list[tuple[str, str]], start: int) -> list[str]:
        """Labels are visible in their scope before they are defined."""
        depth, labels = 0, []
        for kind, text in tokens[start:]:
            depth += (kind == "open") - (kind == "close")
            if depth == 0:
                break
            if depth == 1 and kind == "label":
                labels.append(text)
        return labels

    def _loc(self, text: str) -> None:
        fields = text.split()
        if fields[0] == ".loc":
            self.source = f"{self.files.get(fields[1], 'file ' + fields[1])}:{fields[2].rstrip(',')}"

    def _directive(self, text: str) -> None:
        if match := re.match(r"\.reg\s+(?:\.v([24])\s+)?\.(\w+)\s+(.*)", text):
            kind = ptx_type(match[2])
            if kind is None:
                raise ParseError(f"register type .{match[2]} is not known: {text}")
            for name in split_operands(match[3]):
                if match[1]:
                    self._vector(name, int(match[1]), kind.bits)
                else:
                    self._registers(name, kind.bits)
        elif match := _VARIABLE.match(text):
            self._variable(match)

    def _variable(self, match: re.Match[str]) -> None:
        name = match["name"]
        if self.calls and match["space"] == "shared":
            # One variable, however often the function is called.
            unique = f"{self.calls[-1][0]}__{name}"
            self.scopes.alias(name, unique)
            if unique not in self.kernel.shared:
                _declare_variable(self.kernel, match, unique)
            return
        unique = self.scopes.declare(name)
        _declare_variable(self.kernel, match, unique)
        if match["space"] == "param":
            self.kernel.arguments.add(unique)

    def _registers(self, name: str, bits: int) -> None:
        ranged = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
        names = [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [name]
        for each in names:
            self.kernel.registers[self.scopes.declare(each)] = len(self.kernel.register_bits)
            self.kernel.register_bits.append(bits)

    def _vector(self, name: str, count: int, bits: int) -> None:
        """A vector register: its components become registers of their own, its name the list of them."""
        components = [f"{name}_{component}" for component in "xyzw"[:count]]
        for component in components:
            self._registers(component, bits)
        self.vectors[self.scopes.declare(name)] = [self.scopes.rename(component) for component in components]

    def _without_vectors(self, text: str) -> str:
        for name, components in self.vectors.items():
            for letter, component in zip("xyzw", components, strict=False):
                text = re.sub(rf"(?<![\w$%]){re.escape(name)}\.{letter}\b", component, text)
            text = re.sub(rf"(?<![\w$%]){re.escape(name)}(?![\w$.])", "{" + ", ".join(components) + "}", text)
        return text

    def _instruction(self, text: str) -> None:
        text = self._without_vectors(text) if self.vectors else text
        match = re.match(r"(?:@(?P<neg>!?)\s*(?P<guard>[\w$%]+)\s+)?(?P<opcode>[\w.:]+)\s*(?P<rest>.*)", text, re.S)
        if match is None:
            raise ParseError(f"cannot parse the instruction {text!r}")
        if self.calls and match["opcode"] in ("ret", "ret.uni"):
            guard = f"@{match['neg']}{match['guard']} " if match["guard"] else ""
            self._instruction(f"{guard}bra {self.calls[-1][1]}")
            return
        if match["opcode"] in ("call", "call.uni") and self._call(match):
            return
        self.kernel.instructions.append(
            Instruction(
                opcode=match["opcode"],
                operands=tuple(split_operands(match["rest"])),
                guard=match["guard"],
                guard_negated=match["neg"] == "!",
                text=text,
                source=self.source,
                index=len(self.kernel.instructions),
            )
        )

    def _call(self, match: re.Match[str]) -> bool:
        """Expands a call; False if it must stay one: the function's body is not here, or calls itself."""
        operands = split_operands(match["rest"])
        results = split_operands(operands.pop(0)[1:-1]) if operands and operands[0].startswith("(") else []
        function = self.functions.get(operands[0]) if operands else None
        if function is None or any(name == function.name for name, _ in self.calls):
            return False
        arguments = split_operands(operands[1][1:-1]) if len(operands) > 1 else []
        if (len(results), len(arguments)) != (len(function.results), len(function.parameters)):
            raise ParseError(f"{match[0]!r} has not the arguments of {function.name}")
        tokens = list(_tokens(function.body))
        self.scopes.open([*self._labels_of_scope([("open", ""), *tokens], 0), "end_of_body", "after_call"])
        end, after, source = self.scopes.rename("end_of_body"), self.scopes.rename("after_call"), self.source
        if match["guard"]:
            self._instruction(f"@{'' if match['neg'] else '!'}{match['guard']} bra {after}")
        for formal, given in zip(function.parameters, arguments, strict=True):
            if not self._same_variable(formal, given):
                self._copy(self._declare_formal(formal), given, formal)
        copied = [
            (wanted, self._declare_formal(formal), formal)
            for formal, wanted in zip(function.results, results, strict=True)
            if not self._same_variable(formal, wanted)
        ]
        self.calls.append((function.name, end))
        self.parse(tokens)
        self.calls.pop()
        self.kernel.labels[end] = len(self.kernel.instructions)
        for wanted, result, formal in copied:
            self._copy(wanted, result, formal)
        if match["guard"]:
            self.kernel.labels[after] = len(self.kernel.instructions)
        self.scopes.close()
        self.source = source
        return True

    def _same_variable(self, formal: Formal, given: str) -> bool:
        """Lets a formal parameter in .param space be the caller's own variable."""
        if formal.is_register or given not in self.kernel.arguments:
            return False
        self.scopes.alias(formal.name, given)
        return True

    def _declare_formal(self, formal: Formal) -> str:
        self._directive(formal.declaration)
        return self.scopes.rename(formal.name)

    def _copy(self, to: str, source: str, formal: Formal) -> None:
        """A scalar argument or result between registers, literals and .param variables."""
        if to in self.kernel.arguments:
            self._instruction(f"st.param.{formal.type} [{to}], {source}")
        elif source in self.kernel.arguments:
            self._instruction(f"ld.param.{formal.type} {to}, [{source}]")
        else:
            self._instruction(f"mov.{formal.type} {to}, {source}")


_VARIABLE = re.compile(
    r"(?P<extern>\.extern\s+)?(?:\.(?:visible|weak)\s+)?\.(?P<space>shared|local|param)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>[a-z]\d+)\s+(?P<name>[\w$]+)\s*(?P<dims>(?:\[\d*\])*)"
)
_CONSTANT = re.compile(
    r"(?:\.(?:visible|weak)\s+)?\.(?:global|const)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>[a-z]\d+)\s+"
    r"(?P<name>[\w$]+)\s*(?P<dims>(?:\[\d*\])*)\s*(?:=\s*\{?(?P<values>[^;}]*)\}?)?\s*;"
)
_ENTRY = re.compile(r"(?:\.(?:visible|weak)\s+)*\.entry\s+(?P<name>[\w$]+)\s*(?:\((?P<params>[^)]*)\))?(?P<head>[^{]*)")


_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.([a-z]\d+)\s+"
    r"(?:\.ptr\s+)?(?:\.(?:global|const|shared|local)\s+)?(?:\.align\s+\d+\s+)?([\w$]+)(?:\[(\d+)\])?"
)


def _declare_variable(kernel: Kernel, match: re.Match[str], name: str) -> None:
    element = ptx_type(match["type"])
    assert element is not None
    count = 1
    for dim in re.findall(r"\[(\d*)\]", match["dims"]):
        count *= int(dim or 0)
    size, align = element.bytes * count, int(match["align"] or element.bytes)
    if match["space"] in ("local", "param"):
        kernel.local[name] = Variable(_align(kernel.local_bytes, align), size)
        kernel.local_bytes = kernel.local[name].offset + size
    elif match["extern"] or size == 0:
        kernel.dynamic_shared.append(name)
        kernel.dynamic_shared_align = max(kernel.dynamic_shared_align, align)
    else:
        kernel.shared[name] = Variable(_align(kernel.static_shared_bytes, align), size)
        kernel.static_shared_bytes = kernel.shared[name].offset + size


def _parameters(text: str) -> tuple[list[Parameter], int]:
    parameters, offset = [], 0
    for item in split_operands(text):
        match = _PARAMETER.match(item)
        element = ptx_type(match[2]) if match else None
        if match is None or element is None:
            raise ParseError(f"cannot parse the kernel parameter {item!r}")
        size = element.bytes * int(match[4] or 1)
        offset = _align(offset, int(match[1] or element.bytes))
        parameters.append(Parameter(match[3], offset, size))
        offset += size
    return parameters, offset


def _constants(text: str) -> dict[str, bytes]:
    """Module-scope .global and .const variables with numeric initial values, as the bytes they start with."""
    found = {}
    for match in _CONSTANT.finditer(text):
        element = ptx_type(match["type"])
        if element is None:
            continue
        dims = [int(d) for d in re.findall(r"\[(\d+)\]", match["dims"])]
        values = [v.strip() for v in (match["values"] or "").split(",") if v.strip()]
        if not all(re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?|0[fFdD][0-9a-fA-F]+", v) for v in values):
            continue
        data = b"".join(_constant_bytes(v, element.bytes) for v in values)
        size = element.bytes
        for dim in dims:
            size *= dim
        found[match["name"]] = data.ljust(max(size, len(data)), b"\0")
    return found


def _constant_bytes(value: str, size: int) -> bytes:
    number = int(value[2:], 16) if value[:2].lower() in ("0f", "0d") else int(value.rstrip("U"), 0)
    return struct.pack("<Q", number & 0xFFFF_FFFF_FFFF_FFFF)[:size]


def _block_shape(head: str, directive: str) -> tuple[int, int, int] | None:
    match = re.search(rf"\.{directive}\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", head)
    if match is None:
        return None
    return int(match[1]), int(match[2] or 1), int(match[3] or 1)


def _number(head: str, directive: str) -> int | None:
    match = re.search(rf"\.{directive}\s+(\d+)", head)
    return int(match[1]) if match else None


def _module_scope(text: str, bodies: list[tuple[int, int]]) -> str:
    kept, position = [], 0
    for start, end in bodies:
        kept.append(text[position:start])
        position = end
    return "".join([*kept, text[position:]])


def parse(ptx: str) -> dict[str, Kernel]:
    """All entries of a PTX module by name. Raises ParseError; unknown instructions are reported when reached."""
    text = _strip_comments(ptx)
    target = re.search(r"\.target\s+(\w+)", text)
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    entries = list(_ENTRY.finditer(text))
    bodies = [(entry.end(), _matching_brace(text, entry.end()) + 1) for entry in entries]
    spans = [(entry.start(), body[1]) for entry, body in zip(entries, bodies, strict=True)]
    functions, others = find_functions(text)
    outside = _module_scope(text, sorted([*spans, *others]))
    kernels = {}
    for entry, (start, end) in zip(entries, bodies, strict=True):
        parameters, size = _parameters(entry["params"] or "")
        required = _block_shape(entry["head"], "reqntid")
        limit = required or _block_shape(entry["head"], "maxntid")
        kernel = Kernel(
            name=entry["name"],
            target=target[1] if target else "",
            parameters=parameters,
            parameter_bytes=size,
            required_block=required,
            max_threads=limit[0] * limit[1] * limit[2] if limit else None,
            shared={},
            static_shared_bytes=0,
            dynamic_shared_align=16,
            dynamic_shared=[],
            required_cluster=_block_shape(entry["head"], "reqnctapercluster"),
            max_cluster=_number(entry["head"], "maxclusterrank"),
            needs_cluster=".explicitcluster" in entry["head"],
            max_registers=_number(entry["head"], "maxnreg"),
            least_ctas=_number(entry["head"], "minnctapersm") or 1,
            constants=_constants(outside),
        )
        for match in _VARIABLE.finditer(outside):
            _declare_variable(kernel, match, match["name"])
        _BodyParser(kernel, files, functions).parse(list(_tokens(text[start + 1 : end - 1])))
        kernels[kernel.name] = kernel
    return kernels
