"""Blocks cut into stretches under one name: the function that most of it comes from, or else the work that fills it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..module import Instruction
from .costs import units
from .source import function_at
from .work import work

STRETCH = 32
"""Units of time that a stretch of a block has at least: compilers mix the instructions of neighbouring statements."""
_PLAIN_WEIGHT = 0.25
"""How much a unit of arithmetic counts where a stretch is to be named, against one of the work it serves."""


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


def _weight(name: str, cost: int) -> float:
    """How much an instruction counts where a stretch is named: what it starts, and not what issuing it costs."""
    if name.startswith(("wgmma", "TMA")):
        return float(STRETCH)
    return cost * (_PLAIN_WEIGHT if name == "arithmetic" else 1.0)


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
