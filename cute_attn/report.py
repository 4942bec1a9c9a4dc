"""Static report of a compiled program: what a kernel's main loop costs, read off its machine code.

Nothing runs. The *main loops* of a kernel are its innermost loops with tensor instructions; the *steady* one is the
cheapest of them (the others carry masks). Costs are given per 32 scores, one warp instruction's worth of the matrix
S = Q·Kᵀ: ``slots`` are warp instructions issued, ``floors`` the cycles each pipe is busy at the rates of `pipe_costs`.
The largest of slots and floors bounds the kernel.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cute_attn.cubin import KernelResources, kernel_resources
from cute_attn.jit import Program
from cute_attn.pipe_costs import PIPES, classify, costs_for, macs
from cute_attn.sass import Function, Instruction, Loop, disassemble

__all__ = ["KernelReport", "LoopReport", "report", "report_kernel"]

_SPILLS = ("LDL", "STL")
_ARITHMETIC = {"fp32", "fp16", "integer", "move", "uniform", "branch"}
# Marks of code that runs only when something is waited for, or a warp has diverged.
_RARE = ("SYNCS.PHASECHK", "NANOSLEEP", "WARPSYNC.COLL", "CALL", "BRA.DIV")


@dataclass(frozen=True)
class LoopReport:
    """One main loop.

    first, last:  addresses of its first and last instruction
    scores:       elements of S per iteration and warp
    slots:        warp instructions issued per 32 scores: "all", and "fast" without the rescaling of the accumulators,
                  conditional regions with shuffles or of arithmetic alone, skipped while the running maximum holds
    floors:       pipe to cycles per 32 scores, of the fast path; empty where the architecture's rates are not known
    mix:          instruction class to instructions per 32 scores, of the fast path
    spills:       loads and stores of local memory in the loop, the rescaling included
    instructions: those of the fast path, by address
    """

    first: int
    last: int
    scores: int
    slots: dict[str, float]
    floors: dict[str, float]
    mix: dict[str, float]
    spills: int
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class KernelReport:
    """One kernel.

    resources: of the ELF file; its registers are those at launch, which warps may change by setmaxnreg
    highest_register: the largest number of a register in its code
    loops:  the main loops in address order; none for a kernel without tensor instructions
    steady: the cheapest of them, None if there are none
    """

    name: str
    arch: str
    resources: KernelResources
    highest_register: int
    dynamic_shared_bytes: int | None
    instructions: int
    local_instructions: int
    loops: tuple[LoopReport, ...]
    steady: LoopReport | None

    def to_json(self) -> dict[str, Any]:
        """Plain values.

        ``registers`` per thread, at launch or in the warps with most of them; ``spills`` local loads and stores in the
        main loops, or in the whole kernel where it has none; ``smem`` bytes per CTA, static and, where known, dynamic;
        ``slots_per_32`` and ``floors`` of the steady loop, None without one.
        """
        in_loops = sum(loop.spills for loop in self.loops)
        return {
            "kernel": self.name,
            "arch": self.arch,
            "registers": max(self.resources.registers, self.highest_register + 1),
            "spills": in_loops if self.loops else self.local_instructions,
            "smem": self.resources.static_shared_bytes + (self.dynamic_shared_bytes or 0),
            "slots_per_32": self.steady and self.steady.slots,
            "floors": self.steady and self.steady.floors,
            "mix": self.steady and self.steady.mix,
            "stack_bytes": self.resources.stack_bytes,
            "static_smem": self.resources.static_shared_bytes,
            "dynamic_smem": self.dynamic_shared_bytes,
            "main_loops": [
                {"scores": loop.scores, "slots_per_32": loop.slots, "spills": loop.spills} for loop in self.loops
            ],
        }


def report(program: Program, head_dim: int, value_dim: int | None = None) -> list[KernelReport]:
    """One report per kernel of a program.

    head_dim:  D, elements of a row of Q and K; a loop's scores follow from its multiply-adds, which are D + Dv a score
    value_dim: Dv, elements of a row of V; D if not given

    Raises FileNotFoundError if nvdisasm is missing.
    """
    resources, functions = kernel_resources(program.cubin), disassemble(program.cubin)
    reports = []
    for name in program.kernels:
        facts = report_kernel(functions[name], program.arch, head_dim, value_dim or head_dim)
        local = sum(i.base in _SPILLS for i in functions[name].instructions)
        reports.append(
            KernelReport(
                name=name,
                arch=program.arch,
                resources=resources[name],
                highest_register=functions[name].highest_register(),
                dynamic_shared_bytes=program.shared_bytes,
                instructions=len(functions[name].instructions),
                local_instructions=local,
                loops=facts,
                steady=min(facts, key=lambda loop: loop.slots["fast"], default=None),
            )
        )
    return reports


def report_kernel(function: Function, arch: str, head_dim: int, value_dim: int) -> tuple[LoopReport, ...]:
    """The main loops of one kernel."""
    return tuple(_report_loop(function, loop, arch, head_dim, value_dim) for loop in _main_loops(function))


def _main_loops(function: Function) -> list[Loop]:
    """Loops with tensor instructions that contain no smaller loop with some."""
    with_tensor = [loop for loop in function.loops if any(macs(i.opcode) for i in _instructions(function, loop.body))]
    return [loop for loop in with_tensor if not any(other.body < loop.body for other in with_tensor)]


def _instructions(function: Function, blocks: Iterable[int]) -> list[Instruction]:
    return [instruction for block in sorted(blocks) for instruction in function.block(block)]


def _report_loop(function: Function, loop: Loop, arch: str, head_dim: int, value_dim: int) -> LoopReport:
    body = loop.body - _rare_blocks(function, loop)
    fast = body - _rescaling(function, loop, body)
    everything, instructions = _instructions(function, body), _instructions(function, fast)
    scores = scores_from_macs(sum(macs(i.opcode) for i in instructions), head_dim + value_dim)
    unit = scores / 32
    mix = collections.Counter(classify(i.opcode) for i in instructions)
    costs, busy = costs_for(arch), collections.Counter[str]()
    if costs is not None:
        for instruction in instructions:
            busy.update(costs.of(instruction.opcode))
    return LoopReport(
        first=function.block(loop.header)[0].address,
        last=max(function.block(latch)[-1].address for latch in loop.latches),
        scores=scores,
        slots={"all": round(len(everything) / unit, 3), "fast": round(len(instructions) / unit, 3)},
        floors={pipe: round(busy[pipe] / unit, 3) for pipe in PIPES} if costs is not None else {},
        mix={kind: round(count / unit, 3) for kind, count in mix.most_common()},
        spills=sum(i.base in _SPILLS for i in everything),
        instructions=tuple(sorted(instructions, key=lambda instruction: instruction.address)),
    )


def scores_from_macs(total: int, per_score: int) -> int:
    """Elements of S that ``total`` multiply-adds compute.

    per_score: D + Dv. A row sum by MMA with a matrix of ones adds an n8 tile, 8 a score. Which of the two it is shows
    in the result: tiles are powers of two, or a few of them, so the rounder of the two numbers is taken.
    """
    fits = [total // each for each in (per_score, per_score + 8) if total % each == 0]
    return max(fits, key=lambda n: n & -n, default=round(total / per_score))


def _rare_blocks(function: Function, loop: Loop) -> frozenset[int]:
    """Blocks placed outside the loop's addresses that retry a wait or gather a diverged warp."""
    first = function.block(loop.header)[0].address
    last = max(function.block(latch)[-1].address for latch in loop.latches)
    outlined = [b for b in loop.body if not first <= function.block(b)[0].address <= last]
    rare: set[int] = set()
    for region in function.regions(outlined):
        if any(i.opcode.startswith(_RARE) for i in _instructions(function, region)):
            rare |= region
    return frozenset(rare)


def _rescaling(function: Function, loop: Loop, body: frozenset[int]) -> frozenset[int]:
    """Conditional blocks of the loop, in regions that exchange values between lanes, or that do arithmetic and nothing
    else: the rescaling of the accumulators. Where these are still being multiplied when lanes agree on the new maximum,
    it takes a region of either kind.

    A block is conditional if an iteration can go round it. Regions with asynchronous copies are prefetches that are
    skipped in the last iteration only.
    """
    conditional = [b for b in body if not all(function.dominates(b, latch) for latch in loop.latches)]
    found: set[int] = set()
    for region in function.regions(conditional):
        kinds = {classify(i.opcode) for i in _instructions(function, region)}
        if kinds <= _ARITHMETIC or ("shuffle" in kinds and "asynchronous" not in kinds and "tensor" not in kinds):
            found |= region
    return frozenset(found)
