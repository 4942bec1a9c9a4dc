"""A kernel in executable form: basic blocks, their control flow and liveness, and the compiled Python functions."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np

from . import isa, registry
from .assembly import EXIT, BlockCode, assemble
from .codegen import BlockBuilder
from .definedness import follow_undefined
from .module import Instruction, Kernel

_NUMPY = """
    where maximum minimum fmax fmin abs signbit sqrt rint floor ceil trunc exp2 log2 copysign
    uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64
"""
_NAMES: dict[str, Any] = {name: getattr(np, name) for name in _NUMPY.split()}
"""What generated code may call besides the families' helpers."""


class Program:
    """Blocks of one kernel. `function(b)` is the callable of block b, compiled when first asked for.

    `whole_warpgroups`: the blocks that only whole warpgroups run. `derived`: what families find out about the program.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.constants: dict[str, Any] = {}
        starts = self._leaders(kernel)
        self.block_of = {start: number for number, start in enumerate(starts)}
        ends = [*starts[1:], len(kernel.instructions)]
        self.blocks = [kernel.instructions[a:b] for a, b in zip(starts, ends, strict=True)]
        targets = {label: self.block_of.get(at, EXIT) for label, at in kernel.labels.items()}
        self.whole_warpgroups = {
            number
            for number, block in enumerate(self.blocks)
            if any(registry.needs_whole_warpgroups(instruction.opcode) for instruction in block)
        }
        self._codes = [self._emit(number, block, targets) for number, block in enumerate(self.blocks)]
        live_in, self._live_out = _liveness(self._codes)
        if follow_undefined(kernel, self.blocks, self._codes, self.constants, live_in):
            _, self._live_out = _liveness(self._codes)
        self.derived: dict[str, Any] = {}
        self._functions: dict[tuple[int, bool, bool], Callable[..., Any]] = {}

    @staticmethod
    def _leaders(kernel: Kernel) -> list[int]:
        leaders = {0, *kernel.labels.values()}
        for i, instruction in enumerate(kernel.instructions):
            if registry.starts_block(instruction.opcode):
                leaders.add(i)
            if registry.ends_block(instruction.opcode):
                leaders.add(i + 1)
        return sorted(leader for leader in leaders if leader < len(kernel.instructions))

    def _emit(self, number: int, block: list[Instruction], targets: dict[str, int]) -> BlockCode:
        builder = BlockBuilder(self.kernel, number, targets, self.constants)
        for instruction in block:
            builder.add(instruction)
        if not builder.code.end:
            following = number + 1 if number + 1 < len(self.blocks) else EXIT
            builder.finish(f"('jump', {following})", following)
        return builder.code

    def uses(self, prefix: str) -> bool:
        """Whether an opcode begins with `prefix`."""
        return any(instruction.opcode.startswith(prefix) for instruction in self.kernel.instructions)

    def code(self, block: int) -> BlockCode:
        """The block before it becomes Python."""
        return self._codes[block]

    def source(self, block: int, *, profiled: bool = False, traced: bool = False) -> str:
        """The generated Python of a block, for reading."""
        live_out, bits = self._live_out[block], self.kernel.register_bits
        return assemble(self._codes[block], live_out, bits, profiled=profiled, traced=traced)

    def function(self, block: int, profiled: bool = False, traced: bool = False) -> Callable[..., Any]:
        """The callable of a block; the profiled one times every operation, the traced one says where it is."""
        key = (block, profiled, traced)
        if key not in self._functions:
            text = self.source(block, profiled=profiled, traced=traced)
            names = {**_NAMES, **registry.HELPERS, **self.constants, "clock": time.perf_counter}
            how = f"{'profiled ' if profiled else ''}{'traced ' if traced else ''}"
            place = f"<{self.kernel.name} block {how}{block}>"
            exec(compile(text, place, "exec"), names)
            self._functions[key] = names["block"]
        return self._functions[key]

    def instruction_at(self, trace: TracebackType | None) -> int | None:
        """Index of the instruction in whose statement an exception was raised; None if it was none's."""
        while trace is not None:
            frame = trace.tb_frame
            if frame.f_code.co_name == "block" and frame.f_code.co_filename.startswith(f"<{self.kernel.name} block"):
                words = frame.f_code.co_filename[:-1].split()
                source = self.source(int(words[-1]), profiled="profiled" in words, traced="traced" in words)
                text = source.splitlines()[trace.tb_lineno - 1]
                match = re.search(r"  # (\d+)$", text)
                return int(match[1]) if match else None
            trace = trace.tb_next
        return None


def _liveness(codes: list[BlockCode]) -> tuple[list[set[int]], list[set[int]]]:
    """Per block: the registers that it or some path after it reads before writing them, and those that a path does."""
    live_in = [set(code.live_in) for code in codes]
    live_out: list[set[int]] = [set() for _ in codes]
    changed = True
    while changed:
        changed = False
        for i in range(len(codes) - 1, -1, -1):
            out: set[int] = set().union(*(live_in[s] for s in codes[i].successors if s < EXIT))
            if out != live_out[i]:
                live_out[i] = out
                live_in[i] = codes[i].live_in | (out - codes[i].killed)
                changed = True
    return live_in, live_out


def compile_kernel(kernel: Kernel) -> Program:
    """The kernel's program, made once, from the instructions that the families of `isa` have registered."""
    assert isa.FAMILIES
    if kernel.program is None:
        kernel.program = Program(kernel)
    return kernel.program
