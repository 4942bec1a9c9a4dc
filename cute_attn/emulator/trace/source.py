"""Which function of the kernel's source an instruction comes from, where the program keeps line information."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..module import Kernel


@dataclass(frozen=True)
class Function:
    """A function of the kernel's source: where it is defined, and its class ("" outside of classes)."""

    file: str
    owner: str
    name: str


@dataclass(frozen=True)
class Definition:
    function: Function
    calls: frozenset[str]  # names of the methods that it calls
    first: int  # of the decorators
    line: int  # of the `def`
    last: int


@lru_cache(maxsize=256)
def _definitions(file: str) -> tuple[Definition, ...]:
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ()
    found: list[Definition] = []

    def visit(node: ast.AST, owner: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                function = Function(file, owner, child.name)
                calls = (
                    n.func.attr
                    for n in ast.walk(child)
                    if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
                )
                found.append(
                    Definition(function, frozenset(calls), first, child.lineno, child.end_lineno or child.lineno)
                )
            visit(child, child.name if isinstance(child, ast.ClassDef) else owner)

    visit(tree, "")
    return tuple(found)


@lru_cache(maxsize=65536)
def _definition_at(source: str) -> tuple[Definition | None, bool]:
    """(innermost definition around "file:line", whether the line is in its body)."""
    file, _, line = source.rpartition(":")
    number = int(line) if line.isdigit() else 0
    around = [d for d in _definitions(file) if d.first <= number <= d.last]
    if not around:
        return None, False
    innermost = min(around, key=lambda d: d.last - d.first)
    return innermost, number > innermost.line


def function_at(source: str | None) -> Function | None:
    """The function that a line is in. What the DSL adds itself is on a `def` or its decorators: nobody's."""
    definition, in_body = _definition_at(source) if source else (None, False)
    return definition.function if definition is not None and in_body else None


def kernel_definition(kernel: Kernel) -> Definition | None:
    """The function that is the kernel: the DSL puts the first instruction on its first line."""
    sources = (i.source for i in kernel.instructions if i.source)
    return _definition_at(next(sources, ""))[0]
