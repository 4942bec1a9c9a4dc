"""What the attention kernels cost before anybody runs them: read off the machine code, per architecture.

The ceilings are what a main loop of this algorithm needs and what holds its competitors back: at head dim 128 on
sm_80, one warp instruction per 32 scores is 16.5 / 9.2 of the tensor pipe's time, so that slots above the floor of the
tensor pipe cost time. See `cute_attn.report` for the terms.
"""

from __future__ import annotations

import pytest

from cute_attn import jit
from cute_attn.kernels.attention_sm80 import AttentionConfig, AttentionSm80
from cute_attn.report import KernelReport, report

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120a")


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


@pytest.mark.parametrize("causal", [False, True])
def test_sm_120a_at_head_dim_128(causal):
    """ptxas pads IMMAs there with 1.8 slots of UIADD3, and keeps one address of the causal loop in local memory."""
    steady = attention_report("sm_120a", head_dim=128, causal=causal, has_lse=True).steady
    assert steady.slots["all"] <= 14.0
    assert steady.slots["fast"] <= 11.0
    assert steady.spills <= 1


@pytest.mark.parametrize("arch", ["sm_80", "sm_89"])
def test_the_tensor_pipe_is_the_largest_floor(arch):
    floors = attention_report(arch, head_dim=128).steady.floors
    assert max(floors, key=floors.get) == "tensor"
    assert floors["xu"] <= 8.0  # 2^x and nothing else: no conversion between integer and float


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_no_spills_at_smaller_head_dims(arch, head_dim, causal):
    kernel = attention_report(arch, head_dim=head_dim, causal=causal, has_lse=True)
    assert [loop.spills for loop in kernel.loops] == [0, 0]


@pytest.mark.parametrize("arch", ARCHS)
def test_two_ctas_share_a_multiprocessor(arch):
    """128 threads of at most 255 registers, and at head dim 128 half of the 100 KiB that sm_86 and sm_89 have."""
    resources = attention_report(arch, head_dim=128).resources
    assert resources.registers <= 255
    shared = AttentionSm80(AttentionConfig(head_dim=128)).shared_bytes
    assert shared + 1024 <= 50 * 1024  # 1 KiB of every CTA is the system's
