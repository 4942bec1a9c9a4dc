"""PTX text -> kernels (see `module`).

The parser knows the grammar, not the instruction set (`program` forms basic blocks). Names declared inside `{ }` scopes
(inline assembly) are made unique, `.loc` lines are kept so that findings can name the source line, vector operands
stay one operand, and calls of device functions are expanded (see `functions`).
"""

from __future__ import annotations

import re

from .declarations import VARIABLE, block_shape, declare_variable, number, parse_constants, parse_parameters
from .errors import ParseError
from .functions import Formal, Function, find_functions
from .module import Instruction, Kernel
from .ptx_text import matching_brace, split_operands, strip_comments, tokenize
from .types import ptx_type

_ENTRY = re.compile(r"(?:\.(?:visible|weak)\s+)*\.entry\s+(?P<name>[\w$]+)\s*(?:\((?P<params>[^)]*)\))?(?P<head>[^{]*)")


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
        elif match := VARIABLE.match(text):
            self._variable(match)

    def _variable(self, match: re.Match[str]) -> None:
        name = match["name"]
        if self.calls and match["space"] == "shared":
            # One variable, however often the function is called.
            unique = f"{self.calls[-1][0]}__{name}"
            self.scopes.alias(name, unique)
            if unique not in self.kernel.shared:
                declare_variable(self.kernel, match, unique)
            return
        unique = self.scopes.declare(name)
        declare_variable(self.kernel, match, unique)
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
        tokens = list(tokenize(function.body))
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


def _module_scope(text: str, bodies: list[tuple[int, int]]) -> str:
    kept, position = [], 0
    for start, end in bodies:
        kept.append(text[position:start])
        position = end
    return "".join([*kept, text[position:]])


def parse(ptx: str) -> dict[str, Kernel]:
    """All entries of a PTX module by name. Raises ParseError; unknown instructions are reported when reached."""
    text = strip_comments(ptx)
    target = re.search(r"\.target\s+(\w+)", text)
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    entries = list(_ENTRY.finditer(text))
    bodies = [(entry.end(), matching_brace(text, entry.end()) + 1) for entry in entries]
    spans = [(entry.start(), body[1]) for entry, body in zip(entries, bodies, strict=True)]
    functions, others = find_functions(text)
    outside = _module_scope(text, sorted([*spans, *others]))
    kernels = {}
    for entry, (start, end) in zip(entries, bodies, strict=True):
        parameters, size = parse_parameters(entry["params"] or "")
        required = block_shape(entry["head"], "reqntid")
        limit = required or block_shape(entry["head"], "maxntid")
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
            required_cluster=block_shape(entry["head"], "reqnctapercluster"),
            max_cluster=number(entry["head"], "maxclusterrank"),
            needs_cluster=".explicitcluster" in entry["head"],
            max_registers=number(entry["head"], "maxnreg"),
            least_ctas=number(entry["head"], "minnctapersm") or 1,
            constants=parse_constants(outside),
        )
        for match in VARIABLE.finditer(outside):
            declare_variable(kernel, match, match["name"])
        _BodyParser(kernel, files, functions).parse(list(tokenize(text[start + 1 : end - 1])))
        kernels[kernel.name] = kernel
    return kernels
