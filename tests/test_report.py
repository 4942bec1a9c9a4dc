"""The static report: ELF attributes, SASS, loops, and what they add up to, on kernels whose loops are known."""

from __future__ import annotations

import json

import pytest

from cute_attn import jit
from cute_attn.cubin import kernel_resources
from cute_attn.pipe_costs import PIPES, classify, costs_for, macs
from cute_attn.report import report, report_kernel, scores_from_macs
from cute_attn.sass import parse

from .mma_loop import MmaLoop, MmaLoopConfig
from .scaled_copy import ScaledCopy, ScaledCopyConfig

# A loop of 9 instructions: two MMAs of 4096 multiply-adds, a branch round a region of three with a shuffle, another
# round a prefetch, and a spill. Before it, a loop without MMA; after it, code that is in no loop.
SASS = """
	.section	.text.known,"ax",@progbits
.text.known:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R2, [R4.64] ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   IMMA.16832.S8.S8 R8, R4.ROW, R6.COL, R8 ;
        /*0040*/                   IMMA.16832.U8.S8 R12, R4.ROW, R6.COL, R12 ;
        /*0050*/              @!P1 BRA `(.L_x_2) ;
        /*0060*/                   SHFL.BFLY PT, R3, R2, 0x1, 0x1f ;
        /*0070*/                   FMUL R8, R8, R3 ;
        /*0080*/                   STL [R1], R8 ;
.L_x_2:
        /*0090*/              @!P2 BRA `(.L_x_3) ;
        /*00a0*/                   LDGSTS.E.BYPASS.128 [R5], [R6.64] ;
.L_x_3:
        /*00b0*/               @P3 BRA `(.L_x_1) ;
        /*00c0*/                   STL [R1], R9 ;
        /*00d0*/                   EXIT ;
.L_x_4:
        /*00e0*/                   BRA `(.L_x_4);
	.section	.nv.shared.known,"aw",@nobits
        /*0000*/                   NOP ;
"""


def test_known_sass() -> None:
    function = parse(SASS)["known"]
    assert len(function.instructions) == 15
    assert function.highest_register() == 12
    (loop,) = report_kernel(function, "sm_80", head_dim=32, value_dim=32)
    assert (loop.first, loop.last) == (0x30, 0xB0)
    assert loop.scores == 2 * 4096 // 64
    assert loop.slots == {"all": 9 / 4, "fast": 6 / 4}
    assert loop.spills == 1
    assert loop.mix == {"tensor": 0.5, "branch": 0.75, "asynchronous": 0.25}
    assert loop.floors == {"tensor": 2 * 8 / 4, "xu": 0, "alu": 0, "fma": 0, "lsu": 0}


@pytest.mark.parametrize(
    ("instruction", "highest"),
    [
        ("IGMMA.64x128x32.S8.S8.SAT R24, gdesc[UR8], R24", 24 + 63),
        ("QGMMA.64x136x32.F32.E4M3.E4M3 R16, R92, gdesc[UR8], R16", 92),
        ("HGMMA.64x256x16.F16 R8, gdesc[UR8], R8", 8 + 63),
        ("IADD3 R7, R3, UR90, RZ", 7),
    ],
)
def test_accumulators_of_a_warpgroup_count_as_registers(instruction: str, highest: int) -> None:
    function = parse(f'\t.section\t.text.one,"ax",@progbits\n        /*0000*/  {instruction} ;\n')["one"]
    assert function.highest_register() == highest


def test_blocks_and_dominators() -> None:
    function = parse(SASS)["known"]
    blocks = {function.block(b)[0].address: b for b in range(len(function.successors))}
    assert [loop.header for loop in function.loops] == [blocks[0x10], blocks[0x30]]  # nothing leads to 0xE0
    assert set(function.successors[blocks[0x30]]) == {blocks[0x60], blocks[0x90]}
    assert function.dominates(blocks[0x30], blocks[0xB0])
    assert not function.dominates(blocks[0x60], blocks[0xB0])


@pytest.mark.parametrize(
    ("total", "per_score", "scores"),
    [
        (2048 * 256, 256, 2048),  # D = Dv = 128
        (2048 * 264, 256, 2048),  # and a row sum by MMA
        (4096 * 72, 64, 4096),  # D = Dv = 32: without the row sum it would be 4608
        (3072 * 256, 256, 3072),
        (2048 * 256 + 100, 256, 2048),
    ],
)
def test_scores_follow_from_multiply_adds(total: int, per_score: int, scores: int) -> None:
    assert scores_from_macs(total, per_score) == scores


def test_instruction_classes_and_costs() -> None:
    assert [classify(op) for op in ("IMAD.MOV.U32", "IMAD", "LDSM.16.M88.4", "UMOV", "I2F.S8", "QQQ")] == [
        "move",
        "integer",
        "shared load",
        "uniform",
        "convert",
        "other",
    ]
    assert macs("HMMA.16816.F32") == 2048 and macs("IMMA.16832.S8.S8") == 4096 and macs("FFMA") == 0
    ampere = costs_for("sm_80")
    assert ampere is not None
    assert ampere.of("IMMA.16832.S8.S8") == {"tensor": 8}
    assert ampere.of("IMMA.16864.S4.S4") == {"tensor": 8}  # twice the multiply-adds
    assert ampere.of("MUFU.EX2") == ampere.of("I2F.S8") == {"xu": 8}
    assert ampere.of("LDSM.16.M88.4") == {"lsu": 16}
    assert ampere.of("BRA") == {}
    assert costs_for("sm_70") is None


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_120a"])
def test_a_compiled_loop(arch: str) -> None:
    """Per iteration 4 MMAs, and in the conditional region a shuffle and 16 multiplications."""
    program = jit.build(MmaLoop, MmaLoopConfig(), arch)
    (kernel,) = report(program, head_dim=32)
    facts = kernel.to_json()
    assert json.loads(json.dumps(facts)) == facts
    assert 16 < facts["registers"] < 64
    assert facts["spills"] == facts["stack_bytes"] == 0
    assert (facts["smem"], facts["static_smem"], facts["dynamic_smem"]) == (256, 0, 256)
    assert set(facts["floors"]) == set(PIPES)
    assert kernel.steady is not None and len(kernel.loops) == 1
    units = MmaLoop.macs_per_iteration / 64 / 32
    assert kernel.steady.scores == 32 * units
    assert kernel.steady.mix["tensor"] == MmaLoop.mmas_per_iteration / units
    assert "shuffle" not in kernel.steady.mix
    slots = facts["slots_per_32"]
    assert slots["all"] - slots["fast"] >= (1 + 16) / units
    assert slots["fast"] < 6  # 4 MMAs, the loop's counter and branches, moves
    rate = {"sm_80": 256, "sm_90a": 512}.get(arch, 64)
    assert facts["floors"]["tensor"] == MmaLoop.macs_per_iteration / rate / units


def test_a_kernel_without_tensor_instructions() -> None:
    (kernel,) = report(jit.build(ScaledCopy, ScaledCopyConfig(), "sm_80"), head_dim=128)
    facts = kernel.to_json()
    assert facts["slots_per_32"] is None and facts["floors"] is None
    assert facts["registers"] > 0 and facts["spills"] == 0 and facts["smem"] == 0


def test_what_is_no_cubin() -> None:
    with pytest.raises(ValueError, match="64-bit ELF"):
        kernel_resources(b"PTX")


def test_a_missing_disassembler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    program = jit.build(ScaledCopy, ScaledCopyConfig(), "sm_80")
    monkeypatch.setenv("NVDISASM", "/nowhere/nvdisasm")
    with pytest.raises(FileNotFoundError, match=r"NVDISASM=/nowhere/nvdisasm; install it with `pip install"):
        report(program, head_dim=128)
