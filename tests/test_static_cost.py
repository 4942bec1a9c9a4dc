"""What the attention kernels cost before anybody runs them: read off the machine code, per architecture.

The ceilings are what a main loop of this algorithm needs and what holds its competitors back: at head dim 128 on
sm_80, one warp instruction per 32 scores is 16.5 / 9.2 of the tensor pipe's time, so that slots above the floor of the
tensor pipe cost time. See `cute_attn.report` for the terms.
"""

from __future__ import annotations

import pytest

from cute_attn import Problem, jit, kernel_calls, recipes
from cute_attn.arch import ARCHS
from cute_attn.kernels.attention_sm80 import AttentionConfig, AttentionSm80
from cute_attn.recipe import Recipe
from cute_attn.report import KernelReport, report

ACCUMULATORS = ("float32", "float16", "float16+float32")
INT8 = recipes()["int8"]
ARCH_NAMES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120a")


def attention_report(arch: str, **config) -> KernelReport:
    built = AttentionConfig(**config)
    (kernel,) = report(jit.build(AttentionSm80, built, arch), built.head_dim)
    assert len(kernel.loops) == 2  # tiles that need a mask, and the steady loop
    return kernel


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("has_lse", [False, True])
def test_slots_at_head_dim_128(arch, causal, has_lse):
    steady = attention_report(arch, head_dim=128, causal=causal, has_lse=has_lse).steady
    assert steady.slots["all"] <= 12.5
    assert steady.slots["fast"] <= 9.5
    assert steady.spills == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("accumulate", "slots"), [("float32", 10.5), ("float16", 10.5), ("float16+float32", 14.0)])
def test_slots_of_int8_fp16_at_head_dim_128(arch, causal, accumulate, slots):
    """Two-level accumulation converts every sum of a tile to float32 and adds it: 4 slots more."""
    config = {"recipe": "int8_fp16", "accumulate": accumulate, "head_dim": 128, "causal": causal}
    steady = attention_report(arch, **config).steady
    assert steady.slots["fast"] <= slots
    # Known: two registers of sm_90a's loop without a mask, and one of the two-level loop under a causal one elsewhere.
    known = accumulate != "float16" and {("sm_90a", False): 4}.get((arch, causal), 0)
    if accumulate == "float16+float32" and causal and arch != "sm_90a":
        known = 2
    assert steady.spills <= known
    assert steady.floors["xu"] <= 8.0
    assert max(steady.floors, key=steady.floors.get) == "tensor" or arch == "sm_90a"  # twice as fast there


@pytest.mark.parametrize("arch", ARCH_NAMES)
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("accumulate", ACCUMULATORS)
def test_int8_fp16_does_not_spill_at_smaller_head_dims(arch, head_dim, accumulate):
    recipe = recipes()["int8_fp16"].replace(accumulate=accumulate)
    kernel = default_report(arch, head_dim, True, recipe=recipe)
    assert [loop.spills for loop in kernel.loops] == [0, 0]


@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_120a"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("accumulate", ACCUMULATORS)
def test_default_configs_of_int8_fp16_do_not_spill_at_head_dim_128(arch, causal, accumulate):
    recipe = recipes()["int8_fp16"].replace(accumulate=accumulate)
    kernel = default_report(arch, 128, causal, recipe=recipe)
    assert kernel.steady.spills <= (2 if accumulate == "float16+float32" else 0)
    assert kernel.resources.registers * 256 <= 65536  # eight warps fit


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_120a"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_unquantised_recipes_at_head_dim_128(arch, causal, name):
    """FlashAttention-2's example takes 16.14 slots on sm_80, with 32 spills."""
    steady = default_report(arch, 128, causal, recipe=recipes()[name]).steady
    assert steady.slots["fast"] <= (17.5 if arch == "sm_120a" else 11.0)  # 16-row warps there
    assert steady.spills == 0


def default_report(arch: str, head_dim: int, causal: bool, seq_q: int = 4096, recipe: Recipe = INT8) -> KernelReport:
    """The attention kernel that `cute_attn.attention` launches for a problem without a tile config."""
    problem = Problem(1, 1, 1, seq_q, 4096, head_dim, recipe.dtypes[0], causal)
    kernel_class, config = kernel_calls.kernels_of(problem, recipe, ARCHS[arch])["attention"]
    (kernel,) = report(jit.build(kernel_class, config, arch), head_dim)
    return kernel


@pytest.mark.parametrize("arch", ARCH_NAMES)
@pytest.mark.parametrize("causal", [False, True])
def test_default_configs_do_not_spill_at_head_dim_128(arch, causal):
    kernel = default_report(arch, 128, causal)
    assert kernel.steady.spills == 0
    # sm_90a's causal kernel keeps one address of the masked loop, at most three tiles per CTA, in local memory.
    assert sum(loop.spills for loop in kernel.loops) <= (1 if arch == "sm_90a" and causal else 0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCH_NAMES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seq_q", [16, 32, 64, 4096])
def test_no_default_config_spills_in_its_steady_loop(arch, head_dim, causal, seq_q):
    assert default_report(arch, head_dim, causal, seq_q).steady.spills == 0


@pytest.mark.parametrize("causal", [False, True])
def test_slots_of_sm_120a_at_head_dim_128(causal):
    """16-row warps, and 1.8 slots of UIADD3 that ptxas puts around IMMAs there; the tensor pipe takes 33 cycles."""
    steady = default_report("sm_120a", 128, causal).steady
    assert steady.slots["all"] <= 15.5
    assert steady.slots["fast"] <= 12.5
    assert max(steady.floors, key=steady.floors.get) == "tensor"


@pytest.mark.parametrize("arch", ["sm_80", "sm_89"])
def test_the_tensor_pipe_is_the_largest_floor(arch):
    floors = attention_report(arch, head_dim=128).steady.floors
    assert max(floors, key=floors.get) == "tensor"
    assert floors["xu"] <= 8.0  # 2^x and nothing else: no conversion between integer and float


@pytest.mark.parametrize("arch", ARCH_NAMES)
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_no_spills_at_smaller_head_dims(arch, head_dim, causal):
    kernel = attention_report(arch, head_dim=head_dim, causal=causal, has_lse=True)
    assert [loop.spills for loop in kernel.loops] == [0, 0]


@pytest.mark.parametrize("arch", ARCH_NAMES)
def test_two_ctas_share_a_multiprocessor(arch):
    """128 threads of at most 255 registers, and at head dim 128 half of the 100 KiB that sm_86 and sm_89 have."""
    resources = attention_report(arch, head_dim=128).resources
    assert resources.registers <= 255
    shared = AttentionSm80(AttentionConfig(head_dim=128)).shared_bytes
    assert shared + 1024 <= 50 * 1024  # 1 KiB of every CTA is the system's
