"""What recipes fp16 and bf16 cost on sm_90a's own kernel, read off the machine code.

At head dim 128 the tensor pipe takes 16 cycles per 32 scores. FlashAttention-4 issues 7.11 slots there, with row sums
of probabilities that are not rounded; sums of the rounded ones take one slot more, and bf16 is below it all the same.
"""

from __future__ import annotations

import pytest

from cute_attn import jit
from cute_attn.kernels.attention_sm90 import AttentionSm90, AttentionSm90Config
from cute_attn.report import KernelReport, report

from .test_static_cost_sm90 import ORDER, order, waits

DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


def attention_report(name: str, head_dim: int, **changes) -> KernelReport:
    config = AttentionSm90Config(head_dim, recipe=name, accumulate="float32", out_dtype=DTYPES[name], **changes)
    image = AttentionSm90(config).image
    (kernel,) = report(jit.build(AttentionSm90, config, "sm_90a"), image.key_dims, image.value_channels)
    assert len(kernel.loops) == 2  # tiles that need a mask, and the steady loop
    assert [waits(loop) for loop in kernel.loops] == [2, 2]
    assert kernel.local_instructions == 0
    return kernel


@pytest.mark.parametrize(("name", "slots"), [("fp16", 7.45), ("bf16", 7.11)])
@pytest.mark.parametrize(
    ("causal", "pack_gqa"), [(False, False), (True, False), pytest.param(True, True, marks=pytest.mark.slow)]
)
def test_head_dim_128(name, slots, causal, pack_gqa):
    which = {"causal": causal, "has_lse": causal, "varlen_k": causal, "pack_gqa": pack_gqa}
    kernel = attention_report(name, 128, stages=5, **which)
    assert kernel.steady.slots["fast"] <= slots
    assert kernel.highest_register < 160
    assert max(kernel.steady.floors, key=kernel.steady.floors.get) == "tensor"


@pytest.mark.parametrize(("name", "slots"), [("fp16", 7.4), ("bf16", 6.9)])
def test_head_dim_64(name, slots):
    kernel = attention_report(name, 64, stages=8, causal=True)
    assert kernel.steady.slots["fast"] <= slots
    assert kernel.highest_register < 160


@pytest.mark.parametrize(("name", "head_dim", "stages"), [("bf16", 128, 5), ("fp16", 192, 3), ("bf16", 256, 2)])
def test_two_warpgroups(name, head_dim, stages):
    kernel = attention_report(name, head_dim, warpgroups=2, stages=stages, causal=True)
    assert kernel.highest_register < 240


@pytest.mark.parametrize(("name", "slots"), [("fp16", 7.3), ("bf16", 7.3)])
@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_overlap(name, slots, causal):
    kernel = attention_report(name, 128, warpgroups=2, overlap=True, stages=4, causal=causal, has_lse=causal)
    assert kernel.steady.slots["fast"] <= slots
    assert [order(loop) for loop in kernel.loops] == [ORDER, ORDER]
    assert kernel.highest_register < 240


@pytest.mark.slow
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("head_dim", range(16, 257, 8))
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_is_spilled(name, head_dim, causal):
    warpgroups = 3 if head_dim <= 128 else 2
    kernel = attention_report(name, head_dim, warpgroups=warpgroups, stages=2, causal=causal, has_lse=True)
    assert kernel.highest_register < {3: 160, 2: 240}[warpgroups]
