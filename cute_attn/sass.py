"""Machine code as text, basic blocks and loops.

`disassemble` runs nvdisasm; `Function` is one kernel's instructions with its control flow graph, dominators and
natural loops (Aho, Lam, Sethi, Ullman, *Compilers*, sections 9.6.1 to 9.6.6).
"""

from __future__ import annotations

import functools
import glob
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Function", "Instruction", "Loop", "disassemble", "parse", "sass_text"]


@dataclass(frozen=True)
class Instruction:
    """One machine instruction. ``predicate`` is "@P0", "@!UP3" ... or empty."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """The opcode without its modifiers: "LDS" of "LDS.128"."""
        return self.opcode.split(".", 1)[0]


@dataclass(frozen=True)
class Loop:
    """A natural loop: ``header`` and ``body`` are block numbers, ``latches`` the blocks that jump back."""

    header: int
    body: frozenset[int]
    latches: tuple[int, ...]


def _nvdisasm() -> str:
    """The disassembler: ``$NVDISASM``, the pip package nvidia-cuda-nvdisasm, or PATH."""
    packages = sysconfig.get_paths()["purelib"]
    named = os.environ.get("NVDISASM")
    candidates = [named] if named else [*glob.glob(f"{packages}/nvidia/*/bin/nvdisasm"), shutil.which("nvdisasm")]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise FileNotFoundError(
        f"nvdisasm, which reads machine code, was not found{f' at NVDISASM={named}' if named else ''}; "
        "install it with `pip install nvidia-cuda-nvdisasm`"
    )


def disassemble(cubin: bytes) -> dict[str, Function]:
    """The kernels of a cubin by name. Raises what `sass_text` raises."""
    return parse(sass_text(cubin))


def sass_text(cubin: bytes, *, lines: bool = False) -> str:
    """What ``nvdisasm -c`` prints of a cubin; with ``lines``, also the source lines that the compiler kept.

    Raises FileNotFoundError if nvdisasm is missing, RuntimeError if it cannot read the cubin.
    """
    program = _nvdisasm()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "program.cubin"
        file.write_bytes(cubin)
        command = [program, "-c", *(["-g"] if lines else []), str(file)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{program} cannot read the cubin: {result.stderr.strip()}")
    return result.stdout


_SECTION = re.compile(r'\s*\.section\s+"?\.text\.([^,"]+)"?\s*,')
_OTHER_SECTION = re.compile(r"\s*\.section\s")
_LABEL = re.compile(r"\s*(\.L_[\w.$]+)\s*:")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")


def parse(text: str) -> dict[str, Function]:
    """The functions in the text that ``nvdisasm -c`` prints."""
    functions: dict[str, tuple[list[Instruction], dict[str, int]]] = {}
    current: tuple[list[Instruction], dict[str, int]] | None = None
    for line in text.splitlines():
        if section := _SECTION.match(line):
            current = functions.setdefault(section[1], ([], {}))
        elif _OTHER_SECTION.match(line):
            current = None
        elif current is None:
            continue
        elif label := _LABEL.match(line):
            current[1][label[1]] = len(current[0])
        elif found := _INSTRUCTION.match(line):
            current[0].append(Instruction(int(found[1], 16), found[2] or "", found[3], found[4]))
    return {name: Function(name, *parts) for name, parts in functions.items()}


class Function:
    """One kernel's instructions, in address order, with what a compiler textbook derives from them.

    labels: label to the index of the instruction after it
    """

    def __init__(self, name: str, instructions: list[Instruction], labels: dict[str, int]) -> None:
        self.name = name
        self.instructions = instructions
        self._labels = labels

    def block(self, number: int) -> list[Instruction]:
        """The instructions of one basic block."""
        first, last = self._blocks[number]
        return self.instructions[first:last]

    def highest_register(self) -> int:
        """The largest number of a register that an instruction names; of a warpgroup's accumulators, the last one's."""
        return max((_last_register(instruction) for instruction in self.instructions), default=-1)

    def count(self, blocks: Iterable[int]) -> int:
        """Instructions in some blocks."""
        return sum(self._blocks[b][1] - self._blocks[b][0] for b in blocks)

    @functools.cached_property
    def _jumps(self) -> dict[int, list[int]]:
        """Index of each instruction that ends a block, to the indices that may come next."""
        reconvergence = self._reconvergence_points()
        end = len(self.instructions)
        jumps: dict[int, list[int]] = {}
        for i, instruction in enumerate(self.instructions):
            following = [i + 1] if i + 1 < end else []
            if instruction.base in ("BRA", "JMP"):
                target = self._target(instruction)
                jumps[i] = ([] if target is None else [target]) + (following if _conditional(instruction) else [])
            elif instruction.base in ("EXIT", "RET", "KILL", "BRX", "JMX", "BRXU"):
                jumps[i] = following if instruction.predicate else []
            elif instruction.base == "BSYNC":
                points = reconvergence.get(_barrier(instruction), following)
                jumps[i] = following if following and following[0] in points else points  # registers are used again
        return jumps

    def _target(self, instruction: Instruction) -> int | None:
        label = re.search(r"\((\.L_[\w.$]+)\)", instruction.operands)
        target = self._labels.get(label[1]) if label else None
        return target if target is not None and target < len(self.instructions) else None

    def _reconvergence_points(self) -> dict[str, list[int]]:
        """Convergence barrier to the instructions where its BSSYs say that threads meet again."""
        points: dict[str, list[int]] = {}
        for instruction in self.instructions:
            if instruction.base == "BSSY":
                target = self._target(instruction)
                if target is not None:
                    points.setdefault(_barrier(instruction), []).append(target)
        return points

    @functools.cached_property
    def _blocks(self) -> list[tuple[int, int]]:
        end = len(self.instructions)
        leaders = {0, *self._labels.values(), *(i + 1 for i in self._jumps)}
        leaders.update(target for targets in self._jumps.values() for target in targets)
        starts = sorted(leader for leader in leaders if leader < end)
        return list(zip(starts, [*starts[1:], end], strict=True))

    @functools.cached_property
    def successors(self) -> list[list[int]]:
        """Of each block, the blocks that may run next."""
        number = {first: b for b, (first, _) in enumerate(self._blocks)}
        result = []
        for _, end in self._blocks:
            targets = self._jumps.get(end - 1, [end])
            result.append([number[t] for t in dict.fromkeys(targets) if t in number])
        return result

    @functools.cached_property
    def predecessors(self) -> list[list[int]]:
        result: list[list[int]] = [[] for _ in self._blocks]
        for block, following in enumerate(self.successors):
            for successor in following:
                result[successor].append(block)
        return result

    @functools.cached_property
    def _dominator(self) -> dict[int, int]:
        """Of each reachable block, the closest block that every path to it passes (Cooper, Harvey, Kennedy 2001)."""
        order = _reverse_postorder(self.successors)
        position = {block: i for i, block in enumerate(order)}
        dominator = {0: 0}
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                candidates = [p for p in self.predecessors[block] if p in dominator]
                closest = functools.reduce(lambda a, b: _common(a, b, dominator, position), candidates)
                if dominator.get(block) != closest:
                    dominator[block] = closest
                    changed = True
        return dominator

    def dominates(self, above: int, below: int) -> bool:
        """Whether every path from the entry to block ``below`` passes block ``above``."""
        while below != above:
            parent = self._dominator.get(below, below)
            if parent == below:
                return False
            below = parent
        return True

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """The natural loops in address order; those with the same header are one loop."""
        latches: dict[int, list[int]] = {}
        for block in self._dominator:
            for successor in self.successors[block]:
                if self.dominates(successor, block):
                    latches.setdefault(successor, []).append(block)
        return [Loop(h, self._body(h, sources), tuple(sources)) for h, sources in sorted(latches.items())]

    def _body(self, header: int, latches: list[int]) -> frozenset[int]:
        body, pending = {header}, list(latches)
        while pending:
            block = pending.pop()
            if block not in body:
                body.add(block)
                pending.extend(p for p in self.predecessors[block] if p in self._dominator)
        return frozenset(body)

    def regions(self, blocks: Iterable[int]) -> list[frozenset[int]]:
        """Blocks in groups that are connected, in either direction, through blocks of the same set."""
        left, found = set(blocks), []
        while left:
            region, pending = set(), [min(left)]
            while pending:
                block = pending.pop()
                if block in left:
                    left.discard(block)
                    region.add(block)
                    pending.extend([*self.successors[block], *self.predecessors[block]])
            found.append(frozenset(region))
        return found


def _last_register(instruction: Instruction) -> int:
    """-1 if it names none. A warpgroup's MMA names the first of N / 2 accumulators, of N / 4 in F16."""
    numbers = [int(number) for number in re.findall(r"\bR(\d+)\b", instruction.operands)]
    if (shape := re.match(r"[A-Z]GMMA\.64x(\d+)x\d+\.(\w+)", instruction.opcode)) and numbers:
        numbers.append(numbers[0] + int(shape[1]) // (4 if shape[2] == "F16" else 2) - 1)
    return max(numbers, default=-1)


def _barrier(instruction: Instruction) -> str:
    found = re.search(r"B\d+", instruction.operands)
    return found[0] if found else ""


def _conditional(branch: Instruction) -> bool:
    """Whether the next instruction may follow: a predicate in front, or as an operand, or a test of divergence."""
    if branch.predicate and branch.predicate != "@PT":
        return True
    return bool(re.match(r"!?U?P\d", branch.operands)) or ".DIV" in branch.opcode or ".CONV" in branch.opcode


def _reverse_postorder(successors: list[list[int]]) -> list[int]:
    order: list[int] = []
    seen, pending = {0}, [(0, iter(successors[0]))]
    while pending:
        block, following = pending[-1]
        for successor in following:
            if successor not in seen:
                seen.add(successor)
                pending.append((successor, iter(successors[successor])))
                break
        else:
            order.append(block)
            pending.pop()
    return order[::-1]


def _common(a: int, b: int, dominator: dict[int, int], position: dict[int, int]) -> int:
    while a != b:
        while position[a] > position[b]:
            a = dominator[a]
        while position[b] > position[a]:
            b = dominator[b]
    return a
