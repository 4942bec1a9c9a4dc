"""What is E4M3's own in the warp-MMA kernels of int8_fp8 and fp8; the rest is in test_attention_float_sums."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cute_attn import emulator
from cute_attn.kernels.attention_sm80 import AttentionSm80
from cute_attn.tile_images import pack_tile_images, unpack_tile_images

from .attention_operands import case, check, run, two_scores


@pytest.mark.parametrize("recipe", ["int8_fp8", "fp8"])
def test_key_lengths(device, recipe):
    shape = {"batch": 4, "heads": 2, "seq_q": 40, "seq_k": 150, "head_dim": 32, "key_lengths": [0, 1, 64, 150]}
    check(*case(recipe, causal=True, **shape), device)


@pytest.mark.parametrize(("recipe", "smooth"), [("int8_fp8", "qv"), ("fp8", "v")])
def test_smoothed(device, recipe, smooth):
    check(*case(recipe, smooth=smooth, causal=True, heads=5, seq_q=130, seq_k=150, head_dim=32), device)


@pytest.mark.parametrize("accumulation", ["float32", "hardware"])
@pytest.mark.parametrize("sign", [1, -1])
def test_float16_sums_of_the_largest_p_and_v_do_not_overflow(monkeypatch, sign, accumulation):
    """Every P is 448, every |V| 2.25: a tile's sum is 64512, the last but two of float16's numbers.

    The 64 keys that are visited first, with P = 224, only set the max to 0, which just covers the score of the others.
    """
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    operands, config = two_scores("int8_fp8", "float16+float32", 0, -1, sign * 2.25)
    k, scale, v = unpack_tile_images(operands.image, 32, 128, "e4m3", "int8")
    operands.image = pack_tile_images(k, scale, torch.full_like(v.float(), sign * 2.25).to(v.dtype))
    with emulator.settings(accumulation=accumulation):
        out, lse = run(operands, config, torch.device("cpu"))
    torch.testing.assert_close(out, torch.full_like(out, sign * 2.25), rtol=1e-3, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(64 * 1.5)), rtol=1e-3, atol=0)


def test_float16_sums_would_overflow_with_v_a_step_larger(device):
    """2.5 is the next E4M3: 64·448·2.5 is beyond float16, so that the bound of 2.25 is no larger than it must be."""
    out, _ = run(*two_scores("int8_fp8", "float16+float32", 0, -1, 2.5), device)
    assert out.isinf().all()


def test_bias_of_the_lse(device):
    """Rows of equal P, wherever between two E4M3: the LSE is off by up to log(1 + 2^-4), half a step, and no more."""
    shifts = torch.linspace(0, 1, 101)[:-1]
    operands, config = case("int8_fp8", seq_q=100, seq_k=64, head_dim=32)
    operands.q.zero_()
    operands.q[..., 0], operands.q_bias = -1, torch.zeros(1, 1, 100)
    operands.q_scale = shifts[None, None]
    keys = torch.ones(1, 1, 64, 32, dtype=torch.int8)
    operands.image = pack_tile_images(keys, torch.ones(1, 1, 64), keys.to(torch.float8_e4m3fn))
    operands.softmax_scale = math.log(2)
    _, lse = check(operands, config, device)
    error = lse[0, 0] - (math.log(64) - shifts * math.log(2))
    assert 0.05 <= error.abs().max() <= math.log(1 + 2**-4)


def test_q_of_fp8_is_not_smoothed():
    config = replace(case("fp8")[1], smooth_q=True)
    assert AttentionSm80.can_implement(config).startswith("recipe='fp8' does not smooth Q; use 'int8_fp8'")
