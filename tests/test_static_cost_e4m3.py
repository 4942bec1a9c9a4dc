"""Static cost of P and V in E4M3 on the warp-MMA family: sm_89 and sm_120a.

SageAttention's kernels take 12.4 slots (FP32+FP32) and 14.8 with spills (FP16+FP32) on sm_89. The tensor cores of these
chips take 50 and 34 cycles for 32 scores of head dim 128, row sums included: they are what bounds the kernels.
"""

from __future__ import annotations

import pytest

from cute_attn import recipes

from .test_static_cost import attention_report, default_report

TWO_LEVELS = ("float32+float32", "float16+float32")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("name", "accumulate", "slots", "tensor"),
    [
        ("int8_fp8", "float32+float32", 11.0, 50.0),
        ("int8_fp8", "float16+float32", 13.0, 34.0),
        ("fp8", "float32+float32", 11.5, 66.0),
        ("fp8", "float16+float32", 13.7, 50.0),
    ],
)
def test_slots_on_sm_89(name, accumulate, causal, slots, tensor):
    """ptxas puts a NOP between two QMMAs where it has nothing else for there: .6 to 1.6 slots of these."""
    kernel = attention_report("sm_89", head_dim=128, recipe=name, accumulate=accumulate, causal=causal, has_lse=True)
    assert kernel.steady.slots["fast"] <= slots
    assert kernel.steady.floors["tensor"] == tensor == max(kernel.steady.floors.values())
    assert kernel.steady.floors["xu"] == 8.0
    assert [loop.spills for loop in kernel.loops] == [0, 0]


@pytest.mark.parametrize("name", ["int8_fp8", "fp8"])
@pytest.mark.parametrize("accumulate", TWO_LEVELS)
def test_slots_on_sm_120a(name, accumulate):
    """16-row warps; there one instruction, FHADD, adds a float16 to a float32."""
    recipe = recipes()[name].replace(accumulate=accumulate)
    kernel = default_report("sm_120a", 128, True, recipe=recipe)
    assert kernel.steady.slots["fast"] <= 13.2
    assert max(kernel.steady.floors, key=kernel.steady.floors.get) == "tensor"
    assert [loop.spills for loop in kernel.loops] == [0, 0]


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("arch", ["sm_89", "sm_120a"])
@pytest.mark.parametrize("accumulate", TWO_LEVELS)
@pytest.mark.parametrize("name", ["int8_fp8", "fp8"])
def test_default_configs_do_not_spill(name, accumulate, arch, head_dim):
    kernel = default_report(arch, head_dim, True, recipe=recipes()[name].replace(accumulate=accumulate))
    assert [loop.spills for loop in kernel.loops] == [0, 0]
