"""Which step of the main loop each machine instruction belongs to, by the source line that the compiler kept for it."""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from cute_attn import jit
from cute_attn.kernels.attention_sm80 import AttentionConfig, AttentionSm80
from cute_attn.report import KernelReport, report
from cute_attn.sass import sass_text

__all__ = ["STEPS", "Placed", "kernel_report", "opcode_table", "steady_loop", "step_of"]

STEPS = {
    "next tile": ("kv_*.*", "row_copy.*", "delta_source.*", "ptx.cp_async_zfill", "attention_sm80.visit"),
    "S = Q·Kᵀ": ("scores_*.multiply", "scores_*._multiply", "ptx.mma_*"),
    "y = S·c, row maxima": ("scores_*.dequantise", "mask.*"),
    "vote": ("softmax_*.update", "ptx.any_greater"),
    "P = 2^x": ("softmax_*.probabilities", "softmax_*._probability", "softmax_*._exponent", "ptx.pack_*"),
    "O += P·V, sums += P·1": (
        "softmax_*.accumulate", "softmax_*._multiply", "softmax_*._add_*", "softmax_*._output_pair", "atoms.*",
        "*.value_fragment",
    ),
    "loop, no line": (),
}  # fmt: skip
"""Steps of one KV tile by name, and the kernels' functions whose lines make them, as patterns of file.function. The
last one takes all others."""

_LINE = re.compile(r'\s*//## File "([^"]+)", line (\d+)')
_ADDRESS = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+\S")
_SECTION = re.compile(r'\s*\.section\s+"?\.text\.')


@dataclass(frozen=True)
class Placed:
    """One instruction of a loop: its name without and with modifiers, and the step it serves."""

    opcode: str
    full: str
    step: str


@cache
def kernel_report(config: AttentionConfig, arch: str) -> KernelReport:
    return report(jit.build(AttentionSm80, config, arch), config.head_dim)[0]


@cache
def steady_loop(config: AttentionConfig, arch: str) -> tuple[Placed, ...]:
    """The fast path of the steady loop by address. Raises RuntimeError if the program was compiled without lines."""
    lines = _source_lines(sass_text(jit.build(AttentionSm80, config, arch).cubin, lines=True))
    if not lines:
        raise RuntimeError("no line information: set CUTE_DSL_LINEINFO=1 before cutlass is imported")
    steady = kernel_report(config, arch).steady
    assert steady is not None
    return tuple(Placed(i.base, i.opcode, step_of(*lines.get(i.address, ("", 0)))) for i in steady.instructions)


def _source_lines(text: str) -> dict[int, tuple[str, int]]:
    """(file, line) by address, from a disassembly of one kernel."""
    found, here = {}, ("", 0)
    for line in text.splitlines():
        if _SECTION.match(line):
            here = ("", 0)
        elif source := _LINE.match(line):
            here = source[1], int(source[2])
        elif (address := _ADDRESS.match(line)) and here[0]:
            found[int(address[1], 16)] = here
    return found


def step_of(file: str, line: int) -> str:
    """The step whose function contains a line of the kernels' source."""
    name = f"{Path(file).stem}.{_functions(file).get(line, '')}"
    steps = (step for step, patterns in STEPS.items() if any(fnmatchcase(name, pattern) for pattern in patterns))
    return next(steps, list(STEPS)[-1])


@cache
def _functions(file: str) -> dict[int, str]:
    """Name of the innermost function around every line of a file."""
    if not Path(file).is_file():
        return {}
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lines: dict[int, str] = {}
    for node in functions:  # ast.walk goes from the outside inwards
        lines |= dict.fromkeys(range(node.lineno, (node.end_lineno or node.lineno) + 1), node.name)
    return lines


def opcode_table(loop: tuple[Placed, ...]) -> tuple[list[str], dict[str, Counter[str]]]:
    """Names of the commoner instructions, by how often they occur, and instructions by step and name."""
    total = Counter(placed.opcode for placed in loop)
    common = [name for name, count in total.most_common() if count >= 8]
    by_step: dict[str, Counter[str]] = {step: Counter() for step in STEPS}
    for placed in loop:
        by_step[placed.step][placed.opcode if placed.opcode in common else "other"] += 1
    return common, by_step
