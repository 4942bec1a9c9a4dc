"""Device functions of a PTX module (PTX ISA, "Kernel and Function Directives: .func").

A call is expanded where it stands (see `parser`): the caller's variables take the places of the formal parameters, the
body's names are made unique, and `ret` goes to the end of the body. So divergence, barriers and liveness inside a
function need nothing of their own. A function that calls itself, or is called through a pointer, is not expanded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .ptx_text import matching_brace


@dataclass(frozen=True)
class Formal:
    """A formal parameter or result: in .param space, or a register; size and alignment in bytes."""

    name: str
    is_register: bool
    type: str
    count: int
    align: int | None

    @property
    def declaration(self) -> str:
        """The directive that declares a variable of this kind."""
        if self.is_register:
            return f".reg .{self.type} {self.name}"
        align = f".align {self.align} " if self.align else ""
        return f".param {align}.{self.type} {self.name}[{self.count}]"


@dataclass(frozen=True)
class Function:
    """One .func with a body."""

    name: str
    results: tuple[Formal, ...]
    parameters: tuple[Formal, ...]
    body: str


_HEADER = re.compile(
    r"(?:\.(?:visible|weak|extern)\s+)*\.func\s*(?:\((?P<results>[^)]*)\))?\s*(?P<name>[\w$]+)\s*"
    r"(?:\((?P<parameters>[^)]*)\))?(?P<head>[^{;]*)(?P<end>[{;])"
)
_FORMAL = re.compile(
    r"\.(?P<space>param|reg)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>[a-z]+\d*)\s+(?P<name>[%\w$]+)"
    r"(?:\[(?P<count>\d+)\])?"
)


def _formals(text: str | None) -> tuple[Formal, ...]:
    return tuple(
        Formal(m["name"], m["space"] == "reg", m["type"], int(m["count"] or 1), int(m["align"]) if m["align"] else None)
        for m in _FORMAL.finditer(text or "")
    )


def find_functions(text: str) -> tuple[dict[str, Function], list[tuple[int, int]]]:
    """(functions that have a body, spans of all .func declarations and definitions) of a module without comments."""
    functions, spans = {}, []
    for match in _HEADER.finditer(text):
        end = match.end()
        if match["end"] == "{":
            end = matching_brace(text, match.end() - 1) + 1
            results, parameters = _formals(match["results"]), _formals(match["parameters"])
            functions[match["name"]] = Function(match["name"], results, parameters, text[match.end() : end - 1])
        spans.append((match.start(), end))
    return functions, spans
