"""What INT4 and smoothing cost, read off the machine code; see test_static_cost.py."""

from __future__ import annotations

import pytest

from cute_attn import Problem, dispatch, jit
from cute_attn.arch import ARCHS
from cute_attn.attention_kernels import attention_kernel
from cute_attn.recipe import Recipe, recipes
from cute_attn.report import KernelReport, report
from cute_attn.sass import disassemble

CEILINGS = {"int32": 9.75, "float32": 10.5, "float16": 10.5, "float16+float32": 14.5}
"""Slots per 32 scores without rescaling, by `accumulate`: delta included."""

ARCH_NAMES = ("sm_80", "sm_89")  # sm_86 differs from sm_89 by little; the nightly sweep has it


def recipe_of(accumulate: str) -> Recipe:
    return recipes()["int4_int8" if accumulate == "int32" else "int4_fp16"].replace(accumulate=accumulate)


def built(recipe: Recipe, arch: str, head_dim: int, causal: bool) -> tuple[jit.Program, KernelReport]:
    """The default attention kernel for long sequences, and its report."""
    problem = Problem(1, 1, 1, 4096, 4096, head_dim, "float16", causal)
    tile = dispatch.default_config(recipe, problem, ARCHS[arch])
    program = jit.build(*attention_kernel(recipe, head_dim, "float16", causal, tile), arch)
    (kernel,) = report(program, head_dim)
    return program, kernel


@pytest.mark.parametrize("arch", ARCH_NAMES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("accumulate", CEILINGS)
def test_int4_at_head_dim_128(arch, causal, accumulate):
    program, kernel = built(recipe_of(accumulate), arch, 128, causal)
    assert [loop.spills for loop in kernel.loops] == [0, 0]
    assert kernel.steady.slots["fast"] <= CEILINGS[accumulate]
    assert max(kernel.steady.floors, key=kernel.steady.floors.get) == "tensor"
    (function,) = disassemble(program.cubin).values()
    opcodes = [i.opcode for i in function.instructions if "S4" in i.opcode]
    assert opcodes == ["IMMA.16864.S4.S4"] * 64  # 32 by 64 scores of 128 dims, in either loop; nothing emulates them


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("name", "slots"), [("int8", 10.5), ("int8_fp16", 11.25)])
def test_smoothing_q_in_int8(causal, name, slots):
    """One FFMA more a score, loads of delta, and one register less for everything else."""
    kernel = built(recipes()[name].replace(smooth_q=True), "sm_80", 128, causal)[1]
    assert [loop.spills for loop in kernel.loops] == [0, 0]
    assert kernel.steady.slots["fast"] <= slots


@pytest.mark.parametrize("name", ["int8", "int8_fp16"])
def test_smoothing_v_costs_nothing_in_the_loop(name):
    plain, smoothed = (built(recipes()[name].replace(smooth_v=v), "sm_80", 128, False)[1].steady for v in (False, True))
    assert smoothed.mix == plain.mix
