"""What the attention kernels of sm_90a cost before anybody runs them: read off the machine code.

At head dim 128 the tensor pipe takes 8.25 cycles per 32 scores and 2^x alone 8 of the XU pipe, so that slots are not
what bounds the kernels as long as they stay well below. See `cute_attn.report` for the terms.
"""

from __future__ import annotations

import pytest

from cute_attn import jit, recipes
from cute_attn.kernels.attention_sm90 import AttentionSm90, AttentionSm90Config
from cute_attn.report import KernelReport, LoopReport, report

SLOTS = {"int8_fp8": 6.3, "fp8": 5.75, "int8": 6.25, "int8_fp16": 5.4}


def attention_report(name: str, head_dim: int = 128, **changes) -> KernelReport:
    config = AttentionSm90Config(head_dim, recipe=name, accumulate=recipes()[name].accumulate, **changes)
    image = AttentionSm90(config).image
    (kernel,) = report(jit.build(AttentionSm90, config, "sm_90a"), image.key_dims, image.value_channels)
    assert len(kernel.loops) == 2  # tiles that need a mask, and the steady loop
    return kernel


ORDER = ["multiply", "exponentials", "multiply", "wait", "maximum", "wait"]


def order(loop: LoopReport) -> list[str]:
    """What an iteration with overlap does in which order: every product, where its first instruction is issued, and
    every wait, the last exponential and the first comparison of scores.
    """
    steps = {"WARPGROUP.ARRIVE": "multiply", "MUFU.EX2": "exponentials", "WARPGROUP.DEPBAR": "wait"}
    steps |= dict.fromkeys(("VIMNMX", "FMNMX"), "maximum")
    found = [step for i in loop.instructions for start, step in steps.items() if i.opcode.startswith(start)]
    last = len(found) - 1 - found[::-1].index("exponentials")
    where = {"exponentials": last, "maximum": found.index("maximum")}
    return [step for n, step in enumerate(found) if where.get(step, n) == n]


def waits(loop: LoopReport) -> int:
    """How often an iteration waits for the tensor cores: more than the source says, and ptxas serialised the wgmmas."""
    return sum(instruction.opcode.startswith("WARPGROUP.DEPBAR") for instruction in loop.instructions)


@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize(
    ("causal", "pack_gqa"), [(False, False), (True, False), pytest.param(True, True, marks=pytest.mark.slow)]
)
def test_head_dim_128(name, causal, pack_gqa):
    """Packed heads, whose rows take divisions, hold no register more in the main loop."""
    kernel = attention_report(name, causal=causal, has_lse=causal, pack_gqa=pack_gqa)
    assert kernel.steady.slots["fast"] <= SLOTS[name]
    assert [waits(loop) for loop in kernel.loops] == [2, 2]
    assert kernel.highest_register < 160
    assert kernel.local_instructions == 0
    assert kernel.steady.floors["xu"] <= 8.0  # 2^x and nothing else
    assert max(kernel.steady.floors, key=kernel.steady.floors.get) == "tensor"


@pytest.mark.parametrize(("name", "slots"), [("int8_fp8", 6.6), ("fp8", 6.05), ("int8", 6.3), ("int8_fp16", 5.45)])
@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_overlap(name, slots, causal):
    """A quarter of a slot more, and still a wait each for Q·Kᵀ and P·V: ptxas has serialised neither."""
    stages = 3 if name == "int8_fp16" else 4
    kernel = attention_report(name, causal=causal, has_lse=causal, warpgroups=2, overlap=True, stages=stages)
    assert kernel.steady.slots["fast"] <= slots
    assert [waits(loop) for loop in kernel.loops] == [2, 2]
    assert [order(loop) for loop in kernel.loops] == [ORDER, ORDER]
    assert kernel.highest_register < 240
    assert kernel.local_instructions == 0
    assert max(kernel.steady.floors, key=kernel.steady.floors.get) == "tensor"


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize("head_dim", range(16, 257, 8))
@pytest.mark.parametrize("k_scale_per_token", [False, True])
def test_overlap_spills_nothing(name, head_dim, k_scale_per_token):
    """Wherever it is not refused."""
    changes = {"causal": True, "has_lse": True, "warpgroups": 2, "overlap": True, "stages": 2}
    changes["k_scale_per_token"] = k_scale_per_token
    config = AttentionSm90Config(head_dim, recipe=name, accumulate=recipes()[name].accumulate, **changes)
    if AttentionSm90.can_implement(config):
        assert head_dim > 96
        return
    kernel = attention_report(name, head_dim, **changes)
    assert [order(loop) for loop in kernel.loops] == [ORDER, ORDER]
    assert kernel.highest_register < 240
    assert kernel.local_instructions == 0


@pytest.mark.parametrize("name", ["int8_fp8", "fp8"])
def test_exponentials_on_the_fma_pipe(name):
    """Two of eight: 2 of 8 cycles of the XU pipe for at most 1.4 slots, and no more registers."""
    kernel = attention_report(name, causal=True, fma_eighths=2)
    assert kernel.steady.floors["xu"] == 6.0
    assert kernel.steady.slots["fast"] <= SLOTS[name] + 1.4
    assert [waits(loop) for loop in kernel.loops] == [2, 2]
    assert kernel.local_instructions == 0


@pytest.mark.parametrize(("causal", "pack_gqa"), [(False, False), (True, False), (True, True)])
def test_tiles_with_a_mask(causal, pack_gqa):
    """A comparison and a selection a score, and maxima of floats instead of integers, two at a time."""
    masked = max(
        attention_report("int8_fp8", causal=causal, has_lse=causal, pack_gqa=pack_gqa).loops,
        key=lambda loop: loop.slots["fast"],
    )
    assert masked.slots["fast"] <= 9.0
    assert masked.spills == 0


@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize("head_dim", [64, 96])
def test_smaller_head_dims(name, head_dim):
    kernel = attention_report(name, head_dim, causal=True)
    assert [waits(loop) for loop in kernel.loops] == [2, 2]
    assert kernel.highest_register < 160
    assert kernel.local_instructions == 0


@pytest.mark.parametrize("name", SLOTS)
def test_a_scale_per_token_costs_a_multiplication_per_score(name):
    kernel = attention_report(name, k_scale_per_token=True)
    assert kernel.steady.slots["fast"] <= SLOTS[name] + 2.0
    assert kernel.steady.spills == 0


@pytest.mark.parametrize(("name", "head_dim", "parts"), [("int8", 256, 1), ("int8_fp8", 192, 1), ("int8_fp8", 256, 2)])
def test_two_warpgroups_of_large_heads(name, head_dim, parts):
    """E4M3's sums of one tile take registers besides the output: V is multiplied in two parts above 192 channels."""
    kernel = attention_report(name, head_dim, warpgroups=2, stages=2)
    assert [waits(loop) for loop in kernel.loops] == [1 + parts, 1 + parts]
    assert kernel.highest_register < 240
    assert kernel.steady.spills == 0


@pytest.mark.parametrize(
    ("name", "causal"),
    [
        ("int8_fp8", True),
        *(
            pytest.param(n, c, marks=pytest.mark.slow)
            for n in SLOTS
            for c in (False, True)
            if (n, c) != ("int8_fp8", True)
        ),
    ],
)
def test_clusters(name, causal):
    """A consumer's arrival at two CTAs' barriers is an eighth of a slot at most, and no fence of the GPU's memory."""
    changes = {"causal": causal, "has_lse": causal}
    alone, kernel = (attention_report(name, cluster=cluster, **changes) for cluster in (1, 2))
    assert kernel.steady.slots["fast"] <= alone.steady.slots["fast"] + 0.125
    assert [waits(loop) for loop in kernel.loops] == [2, 2]
    assert kernel.highest_register < 160
    assert kernel.local_instructions == 0
    assert not any(i.opcode.startswith("MEMBAR") for i in kernel.steady.instructions)
