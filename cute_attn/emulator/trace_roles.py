"""What a trace calls things, and what they cost: instructions, stretches of a block, warps.

Where the program keeps line information, a stretch of instructions is called after the function that they come from,
and otherwise after the work that fills most of it. A warp's role is a method that the kernel calls and in which not all
warps spend their time, or else follows from the instructions that it issues.
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cute_attn.pipe_costs import TENSOR_RATES, Costs, costs_for

from .module import Instruction, Kernel

STRETCH = 32
"""Units of time that a stretch of a block has at least: compilers mix the instructions of neighbouring statements."""
_PLAIN_WEIGHT = 0.25
"""How much a unit of arithmetic counts where a stretch is to be named, against one of the work it serves."""

Roles = Mapping[int | tuple[int, int], str] | Callable[[int], str | None]
"""Names of warps: by number, by half-open range of numbers, or by a function; those left out are inferred."""

_RARER = 10
"""How many times as much time as some other warp a warp spends in a method that is its role."""

# ---- instructions

_SHAPE = re.compile(r"\.m(\d+)n(\d+)k(\d+)\.")
_WORK = {
    "wgmma.mma_async": "wgmma",
    "mma": "mma.sync",
    "ex2": "exp2",
    "cp.async.bulk.prefetch": "prefetch",
    "cp.async.bulk.commit_group": "",
    "cp.async.bulk.wait_group": "",
    "cp.async.commit_group": "",
    "cp.async.wait_group": "",
    "cp.async.wait_all": "",
    "cp.async.mbarrier": "mbarrier",
    "cp.async.ca": "cp.async",
    "cp.async.cg": "cp.async",
    "cp.reduce.async.bulk": "TMA reduce",
    "ldmatrix": "ldmatrix",
    "stmatrix": "stmatrix",
    "atom": "atomics",
    "red": "atomics",
    "mbarrier": "mbarrier",
    "shfl": "shuffle",
    **dict.fromkeys(["bra", "bar", "barrier", "fence", "wgmma", "setmaxnreg", "ret", "exit"], ""),
    **dict.fromkeys(["lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div"], "special functions"),
}
"""Work by dotted prefix of the opcode, the longest first; "" is no work of its own."""
_SPECIAL_FUNCTIONS = frozenset(name for name, kind in _WORK.items() if kind in ("exp2", "special functions"))


@lru_cache(maxsize=4096)
def work(opcode: str) -> str:
    """The work that an instruction belongs to: "wgmma m64n128k16", "exp2", "TMA load"; "" if to no work of its own."""
    parts = opcode.split(".")
    spaces = [part.split("::")[0] for part in parts if part.startswith(("shared", "global"))]
    for length in range(len(parts), 0, -1):
        if (name := _WORK.get(".".join(parts[:length]))) is not None:
            shape = _SHAPE.search(opcode)
            return f"{name} {shape[0].strip('.')}" if shape and name == "wgmma" else name
    if opcode.startswith("cp.async.bulk"):  # the destination's state space comes first
        return "TMA store" if spaces[:1] == ["global"] else "TMA load" if "global" in spaces else "TMA send"
    if parts[0] in ("ld", "st"):
        return f"{spaces[0]} {'load' if parts[0] == 'ld' else 'store'}" if spaces else ""
    return "arithmetic"


def _weight(name: str, cost: int) -> float:
    """How much an instruction counts where a stretch is named: what it starts, and not what issuing it costs."""
    if name.startswith(("wgmma", "TMA")):
        return float(STRETCH)
    return cost * (_PLAIN_WEIGHT if name == "arithmetic" else 1.0)


def _tensor_units(opcode: str, rates: Mapping[str, int]) -> int:
    shape = _SHAPE.search(opcode)
    assert shape is not None
    macs = int(shape[1]) * int(shape[2]) * int(shape[3])
    if opcode.startswith("wgmma"):
        macs //= 4  # a warp's quarter of the warpgroup's
    types = {*opcode.split(".")}
    if types & {"s8", "u8", "s4", "u4", "b1"}:
        kind = "i8"
    elif "e2m1" in types and not types & {"kind::f8f6f4", "kind::mxf8f6f4"}:
        kind = "f4"
    else:
        kind = "f8" if types & {"e4m3", "e5m2", "e2m3", "e3m2", "e2m1"} else "f16"
    if "tf32" in types:
        macs *= 2  # half the rate of f16
    rate = rates.get(f"{kind}_f32", 0) if "f32" in types else 0
    return max(1, math.ceil(macs / (rate or rates.get(kind) or rates["f16"])))


def _bytes_per_thread(opcode: str) -> int:
    if opcode.startswith(("ldmatrix", "stmatrix")):
        return 4 * int(re.search(r"\.x(\d)", opcode)[1])  # type: ignore[index]
    bits = re.search(r"\.[bsuf](\d+)$", opcode)
    count = re.search(r"\.v(\d)\.", opcode)
    return int(bits[1]) // 8 * (int(count[1]) if count else 1) if bits else 4


@lru_cache(maxsize=4096)
def units(opcode: str, target: str) -> int:
    """What one warp instruction costs its warp, in units of time, at the rates assumed in `pipe_costs`."""
    costs = costs_for(target) or Costs(TENSOR_RATES["sm_90"])
    base = opcode.split(".", 1)[0]
    if base == "mma":
        return _tensor_units(opcode, costs.tensor)
    if base in _SPECIAL_FUNCTIONS:
        return int(costs.xu)
    if base == "shfl":
        return int(costs.shuffle)
    if opcode.startswith(("ld.shared", "st.shared", "ldmatrix", "stmatrix")):
        return max(4, _bytes_per_thread(opcode))  # 128 bytes per clock of an SM with four schedulers
    return 1


@lru_cache(maxsize=4096)
def wgmma_units(opcode: str, target: str) -> int:
    """How long the tensor cores are busy with a wgmma, which costs the warps that issue it one unit."""
    return _tensor_units(opcode, (costs_for(target) or Costs(TENSOR_RATES["sm_90"])).tensor)


# ---- functions


@dataclass(frozen=True)
class Function:
    """A function of the kernel's source: where it is defined, and its class ("" outside of classes)."""

    file: str
    owner: str
    name: str


@dataclass(frozen=True)
class _Definition:
    function: Function
    calls: frozenset[str]  # names of the methods that it calls
    first: int  # of the decorators
    line: int  # of the `def`
    last: int


@lru_cache(maxsize=256)
def _definitions(file: str) -> tuple[_Definition, ...]:
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ()
    found: list[_Definition] = []

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
                    _Definition(function, frozenset(calls), first, child.lineno, child.end_lineno or child.lineno)
                )
            visit(child, child.name if isinstance(child, ast.ClassDef) else owner)

    visit(tree, "")
    return tuple(found)


@lru_cache(maxsize=65536)
def _definition_at(source: str) -> tuple[_Definition | None, bool]:
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


def _kernel_definition(kernel: Kernel) -> _Definition | None:
    """The function that is the kernel: the DSL puts the first instruction on its first line."""
    sources = (i.source for i in kernel.instructions if i.source)
    return _definition_at(next(sources, ""))[0]


# ---- stretches of a block


@dataclass(frozen=True)
class Stretch:
    """Successive instructions under one name ("": whatever the others are called): what they cost, how many they are,
    the first's index, and the work in them.
    """

    name: str
    units: int
    count: int
    first: int
    work: str

    @property
    def end(self) -> int:
        return self.first + self.count


def _heaviest(instructions: Iterable[Instruction], cost: Callable[[str], int]) -> tuple[str, str]:
    """(function, work) with most of the cost; "" where there is none."""
    functions: Counter[str] = Counter()
    works: dict[str, float] = {}
    for i in instructions:
        if (function := function_at(i.source)) is not None:
            functions[function.name] += cost(i.opcode)
        if name := work(i.opcode):
            works[name] = works.get(name, 0.0) + _weight(name, cost(i.opcode))
    return max(functions, key=functions.__getitem__, default=""), max(works, key=works.__getitem__, default="")


def stretches(instructions: list[Instruction], target: str) -> list[Stretch]:
    """Cuts successive instructions into stretches of at least `STRETCH` units; neighbours of one name are joined."""

    def cost(opcode: str) -> int:
        return units(opcode, target)

    cuts, spent = [0], 0
    total = sum(cost(i.opcode) for i in instructions)
    done = 0
    for n, i in enumerate(instructions):
        spent += cost(i.opcode)
        done += cost(i.opcode)
        if spent >= STRETCH and total - done >= STRETCH:
            cuts.append(n + 1)
            spent = 0
    joined: list[Stretch] = []
    for start, end in zip(cuts, [*cuts[1:], len(instructions)], strict=True):
        part = instructions[start:end]
        if not part:
            continue
        function, heaviest = _heaviest(part, cost)
        name = function or heaviest or (joined[-1].name if joined else "")
        spent = sum(cost(i.opcode) for i in part)
        if joined and joined[-1].name == name:
            last = joined.pop()
            bulk = last.work if last.units >= spent else heaviest
            joined.append(Stretch(name, last.units + spent, last.count + len(part), last.first, bulk))
        else:
            joined.append(Stretch(name, spent, len(part), part[0].index, heaviest))
    return joined


# ---- roles


def _given(roles: Roles | None, warp: int) -> str | None:
    if roles is None:
        return None
    if callable(roles):
        return roles(warp)
    for key, name in roles.items():
        if key == warp or (isinstance(key, tuple) and key[0] <= warp < key[1]):
            return name
    return None


_ISSUES = {
    "wgmma": "consumer (wgmma)",
    "mma.sync": "mma",
    "TMA load": "producer (TMA)",
    "cp.async": "producer (cp.async)",
    "TMA store": "store (TMA)",
    "TMA reduce": "store (TMA)",
}
"""Roles by the work that a warp does, the most telling first."""


@dataclass
class Activity:
    """What a warp did: units of time by function, and the kinds of work in which it took part."""

    functions: Counter[Function]
    works: set[str]


def _is_role(function: Function, entry: _Definition) -> bool:
    """Whether it is a method that the kernel calls."""
    kernel = entry.function
    return (function.file, function.owner) == (kernel.file, kernel.owner) and function.name in entry.calls


def name_roles(warps: Mapping[int, Activity], kernel: Kernel, roles: Roles | None = None) -> dict[int, str]:
    """The roles of a CTA's warps, by number."""
    entry = _kernel_definition(kernel)

    def is_special(function: Function, spent: int) -> bool:
        return min(a.functions[function] for a in warps.values()) * _RARER < spent

    names = {}
    for warp, activity in warps.items():
        own = {f: n for f, n in activity.functions.items() if entry and _is_role(f, entry) and is_special(f, n)}
        role = max(own, key=own.__getitem__).name if own else ""
        kinds = {w.split()[0] if w.startswith("wgmma") else w for w in activity.works}
        inferred = next((role for kind, role in _ISSUES.items() if kind in kinds), "other")
        names[warp] = _given(roles, warp) or role or inferred
    return names
