"""What the attention kernels cost before anybody runs them: read off the machine code, per architecture.

The ceilings are what a main loop of this algorithm needs and what holds its competitors back: at head dim 128 on
sm_80, one warp instruction per 32 scores is 16.5 / 9.2 of the tensor pipe's time, so that slots above the floor of the
tensor pipe cost time. See `cute_attn.report` for the terms.
"""

from __future__ import annotations

import pytest

from cute_attn import Problem, jit, kernel_calls, recipes, supports
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
@pytest.mark.parametrize(("causal", "has_lse"), [(False, False), (False, True), (True, False)])
def test_slots_at_head_dim_128(arch, causal, has_lse):
    kernel = attention_report(arch, head_dim=128, causal=causal, has_lse=has_lse)
    assert kernel.steady.slots["all"] <= (12.7 if arch == "sm_90a" else 12.5)
    assert kernel.steady.slots["fast"] <= 9.5
    assert [loop.spills for loop in kernel.loops] == [0, 0]


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("accumulate", "slots"), [("float32", 10.5), ("float16", 10.5), ("float16+float32", 14.1)])
def test_slots_of_int8_fp16_at_head_dim_128(arch, causal, accumulate, slots):
    """Two-level accumulation converts every sum of a tile to float32 and adds it: 4 slots more, and a bit on sm_90a."""
    config = {"recipe": "int8_fp16", "accumulate": accumulate, "head_dim": 128, "causal": causal}
    kernel = attention_report(arch, **config)
    steady = kernel.steady
    assert steady.slots["fast"] <= slots + (0.15 if arch == "sm_90a" else 0.0)
    assert [loop.spills for loop in kernel.loops] == [0, 0]
    assert steady.floors["xu"] <= 8.0
    assert max(steady.floors, key=steady.floors.get) == "tensor" or arch == "sm_90a"  # twice as fast there


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_120a"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_unquantised_recipes_at_head_dim_128(arch, causal, name):
    """FlashAttention-2's example takes 16.14 slots on sm_80, with 32 spills."""
    steady = default_report(arch, 128, causal, recipe=recipes()[name]).steady
    assert steady.slots["fast"] <= (17.5 if arch == "sm_120a" else 11.0)  # 16-row warps, and 132 cycles of tensor work
    assert steady.spills == 0


def default_report(arch: str, head_dim: int, causal: bool, seq_q: int = 4096, recipe: Recipe = INT8) -> KernelReport:
    """The attention kernel that `cute_attn.attention` launches for a problem without a tile config."""
    problem = Problem(1, 1, 1, seq_q, 4096, head_dim, recipe.dtypes[0], causal)
    kernel_class, config = kernel_calls.kernels_of(problem, recipe, ARCHS[arch])["attention"]
    image = kernel_class(config).image
    (kernel,) = report(jit.build(kernel_class, config, arch), image.key_dims, image.value_channels)
    assert kernel.resources.registers * kernel_class(config).threads <= 65536
    return kernel


def recipe_of(name: str) -> Recipe:
    """ "int8", or "int8_fp16 float16" for one with an accumulator."""
    base, _, accumulate = name.partition(" ")
    return recipes()[base].replace(accumulate=accumulate) if accumulate else recipes()[base]


RECIPE_NAMES = (
    *(name for name in recipes() if not name.endswith("_fp16")),
    *(f"{name} {how}" for name in ("int8_fp16", "int4_fp16") for how in ACCUMULATORS),
)


def has_kernel(arch: str, name: str, head_dim: int) -> bool:
    problem = Problem(1, 1, 1, 4096, 4096, head_dim, recipe_of(name).dtypes[0])
    return bool(supports(recipe_of(name), arch, problem))


# Every recipe, arch and number of channels near the end of the registers, each a few times; what differs in the others
# is predication, and the slow test below has them all.
SOME_DEFAULTS = (
    *(("sm_80", name, head_dim) for name in RECIPE_NAMES for head_dim in (128, 256)),
    *(("sm_90a", name, 128) for name in RECIPE_NAMES),
    *(("sm_120a", name, 128) for name in RECIPE_NAMES),
    *(("sm_86", name, 256) for name in RECIPE_NAMES[::2]),
    *(("sm_89", name, 72) for name in RECIPE_NAMES[1::2]),
)


@pytest.mark.parametrize(
    ("arch", "name", "head_dim"), [case for case in SOME_DEFAULTS if has_kernel(*case)], ids=lambda value: str(value)
)
def test_default_configs_do_not_spill(arch, name, head_dim):
    kernel = default_report(arch, head_dim, True, recipe=recipe_of(name))
    assert [loop.spills for loop in kernel.loops] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", range(16, 257, 8))
@pytest.mark.parametrize("name", RECIPE_NAMES)
@pytest.mark.parametrize("arch", ARCH_NAMES)
def test_no_default_config_spills(arch, name, head_dim, causal):
    """Hours. sm_89 differs from sm_86 by little, and is asked at every 64th head dim only."""
    if has_kernel(arch, name, head_dim) and (arch != "sm_89" or head_dim % 64 == 0):
        kernel = default_report(arch, head_dim, causal, recipe=recipe_of(name))
        assert [loop.spills for loop in kernel.loops] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCH_NAMES)
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seq_q", [16, 32, 64])
@pytest.mark.parametrize("name", ["int8", "int8_fp16 float32", "bf16"])
def test_no_default_config_of_few_queries_spills(arch, head_dim, causal, seq_q, name):
    kernel = default_report(arch, head_dim, causal, seq_q, recipe_of(name))
    assert [loop.spills for loop in kernel.loops] == [0, 0]


@pytest.mark.parametrize("causal", [False, True])
def test_slots_of_sm_120a_at_head_dim_128(causal):
    """1.3 slots of UIADD3 that ptxas puts around IMMAs there; the tensor pipe takes 33 cycles."""
    steady = default_report("sm_120a", 128, causal).steady
    assert steady.slots["all"] <= 14.0
    assert steady.slots["fast"] <= 11.0
    assert max(steady.floors, key=steady.floors.get) == "tensor"


@pytest.mark.parametrize("arch", ["sm_80", "sm_89"])
def test_the_tensor_pipe_is_the_largest_floor(arch):
    floors = attention_report(arch, head_dim=128).steady.floors
    assert max(floors, key=floors.get) == "tensor"
    assert floors["xu"] <= 8.0  # 2^x and nothing else: no conversion between integer and float


@pytest.mark.parametrize("arch", ARCH_NAMES)
def test_two_ctas_share_a_multiprocessor(arch):
    """128 threads of at most 255 registers, and at head dim 128 half of the 100 KiB that sm_86 and sm_89 have."""
    resources = attention_report(arch, head_dim=128).resources
    assert resources.registers <= 255
    shared = AttentionSm80(AttentionConfig(head_dim=128)).shared_bytes
    assert shared + 1024 <= 50 * 1024  # 1 KiB of every CTA is the system's
