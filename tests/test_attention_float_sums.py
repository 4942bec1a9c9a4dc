"""The warp-MMA kernel of every recipe that sums P·V in floating point, on random operands against its simulator."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cute_attn.kernels.attention_sm80 import AttentionSm80
from cute_attn.tile_images import unpack_tile_images

from .attention_operands import (
    assert_only_nan_row,
    assert_rows_without_keys,
    assert_same_in_any_order,
    case,
    check,
    run,
    two_scores,
)

ACCUMULATORS = {
    "int8_fp16": ("float32", "float16", "float16+float32"),
    "int8_fp8": ("float32+float32", "float16+float32"),
    "fp8": ("float32+float32", "float16+float32"),
}
SUMS = [(recipe, accumulate) for recipe, names in ACCUMULATORS.items() for accumulate in names]


@pytest.mark.parametrize(("recipe", "accumulate"), SUMS)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(
    ("seq_q", "seq_k", "causal"), [(1, 1, False), (63, 200, True), (130, 127, True), (130, 65, False)]
)
def test_lengths(device, head_dim, recipe, accumulate, seq_q, seq_k, causal):
    shape = {"heads": 3, "kv_heads": 1, "seq_q": seq_q, "seq_k": seq_k, "head_dim": head_dim, "seed": seq_k}
    check(*case(recipe, accumulate, causal=causal, **shape), device)


@pytest.mark.parametrize(
    ("recipe", "accumulate", "head_dim"),
    [(*sums, head_dim) for sums, head_dim in zip(SUMS, (24, 48, 112, 24, 40, 56, 112), strict=True)],
)
@pytest.mark.parametrize(("seq_q", "seq_k", "causal"), [(1, 65, False), (70, 150, True)])
def test_padded_head_dims(device, recipe, accumulate, head_dim, seq_q, seq_k, causal):
    shape = {"heads": 3, "kv_heads": 1, "seq_q": seq_q, "seq_k": seq_k, "head_dim": head_dim, "seed": head_dim}
    check(*case(recipe, accumulate, causal=causal, **shape), device)


@pytest.mark.parametrize(
    ("recipe", "accumulate", "head_dim", "tile"),
    [
        ("int8_fp16", "float32", 200, {"m_tiles": 1}),
        ("int8_fp16", "float32", 256, {"m_tiles": 1, "stages": 1}),
        ("int8_fp16", "float16", 256, {"stages": 1}),
        ("int8_fp16", "float16+float32", 168, {"m_tiles": 1, "stages": 1}),
        ("int8_fp8", "float32+float32", 256, {"m_tiles": 1}),
        ("int8_fp8", "float16+float32", 168, {"m_tiles": 1, "stages": 1}),
        ("fp8", "float32+float32", 256, {"m_tiles": 1, "stages": 1}),
        ("fp8", "float32+float32", 200, {"m_tiles": 1, "warps": 8}),
    ],
)
def test_large_head_dims(device, recipe, accumulate, head_dim, tile):
    shape = {"heads": 3, "kv_heads": 1, "seq_q": 70, "seq_k": 150, "head_dim": head_dim}
    check(*case(recipe, accumulate, tile=tile, causal=True, **shape), device)


@pytest.mark.parametrize(
    ("recipe", "accumulate"), [sums for sums in SUMS if "16" in sums[0] or sums[1] == "float32+float32"]
)
@pytest.mark.parametrize("k_scale", [1e-6, 1e-2, 1.0, 1e4])
def test_scores_of_any_size(device, recipe, accumulate, k_scale):
    """From a flat softmax to one in which a single key counts: scores up to ten billion."""
    check(*case(recipe, accumulate, seq_q=40, seq_k=300, k_scale=k_scale), device)


@pytest.mark.parametrize("recipe", ["int8_fp16", "int8_fp8"])
@pytest.mark.parametrize("k_scale", [1e30, 1e35])
def test_scores_beyond_float32_give_nan(device, recipe, k_scale):
    out, lse = check(*case(recipe, seq_q=40, seq_k=70, k_scale=k_scale), device)
    assert out.isnan().any()
    assert torch.equal(out.isnan().all(-1), lse.isnan())


@pytest.mark.parametrize("recipe", ["int8_fp16", "fp8"])
@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("tile", [{"warps": 1}, {"warps": 8, "stages": 3}, {"m_tiles": 1}])
def test_tile_configs_and_dtypes(device, recipe, tile, out_dtype):
    fields = {"out_dtype": out_dtype, **tile}
    check(*case(recipe, tile=fields, causal=True, seq_q=150, seq_k=400, head_dim=32), device)


FLOAT16_RISES = [(start, rise) for start in (-90, 0) for rise in (-20, -1, 0, 1, 3, 4, 5, 7, 8, 9, 20, 127)]
E4M3_RISES = [(0, -9), (0, -1), (0, 0), (-7, 1), (8, 2), (-16, 3), (16, 16)]
RISES = {
    "int8_fp16": FLOAT16_RISES,
    "int8_fp8": [*E4M3_RISES, (-8, 120)],
    "fp8": [*E4M3_RISES, (-8, 40)],  # scores are products with an E4M3: 112 is none
}


@pytest.mark.parametrize(
    ("recipe", "accumulate", "start", "rise"),
    [(recipe, accumulate, start, rise) for recipe, accumulate in SUMS for start, rise in RISES[recipe]],
)
def test_the_max_rises(device, recipe, accumulate, start, rise):
    """By less than the headroom, by just as much, by more: what the first tile left counts 2^-rise.

    The top of E4M3's P is no whole number, so the biases are rounded: their difference must not become a count too
    small by one.
    """
    out, lse = check(*two_scores(recipe, accumulate, start + rise, start), device)
    ratio = 2.0**-rise
    torch.testing.assert_close(out, torch.full_like(out, (1 - ratio) / (1 + ratio)), rtol=1e-3, atol=1e-5)
    expected = math.log(64 * (1 + ratio)) + (start + rise) * math.log(2)
    torch.testing.assert_close(lse, torch.full_like(lse, expected), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("recipe", ACCUMULATORS)
@pytest.mark.parametrize("name", ["q_scale", "q_bias"])
def test_a_row_that_is_not_finite_stays_alone(device, recipe, name):
    operands, config = case(recipe, seq_q=100, seq_k=200)
    getattr(operands, name)[0, 0, 33] = math.nan
    assert_only_nan_row(*check(operands, config, device), 33)


@pytest.mark.parametrize("recipe", ["int8_fp16", "int8_fp8"])
def test_causal_rows_without_keys(device, recipe):
    assert_rows_without_keys(*check(*case(recipe, causal=True, seq_q=200, seq_k=70), device), 130)


@pytest.mark.parametrize("recipe", ["int8_fp16", "int8_fp8"])
def test_rows_of_zero_scale_are_the_mean_of_v(device, recipe):
    """P is a power of two, or 224, an E4M3, so that neither output nor LSE is off."""
    operands, config = case(recipe, seq_q=40, seq_k=100)
    operands.q_scale[0, 0, 5] = operands.q_bias[0, 0, 5] = 0.0
    out, lse = check(operands, config, device)
    values = unpack_tile_images(operands.image, 64, 100, operands.recipe.pv_format)[2][0, 0].float()
    expected = (values * operands.v_scale[0, 0]).mean(0)
    torch.testing.assert_close(out[0, 0, 5].float(), expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(lse[0, 0, 5], torch.tensor(math.log(100)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "accumulate", "stages"),
    [
        ("int8_fp16", "float32", 2),
        ("int8_fp8", "float32+float32", 2),
        ("int8_fp8", "float16+float32", 1),
        ("fp8", "float32+float32", 2),
    ],
)
def test_order_of_warps_does_not_matter(monkeypatch, recipe, accumulate, stages):
    operands, config = case(recipe, accumulate, tile={"stages": stages}, causal=True, seq_q=130, seq_k=300)
    assert_same_in_any_order(monkeypatch, lambda device: run(operands, config, device), range(2))


@pytest.mark.parametrize(
    ("recipe", "accumulate", "offered"),
    [
        ("int8_fp16", "int32", "float32, float16+float32, float16"),
        ("int8_fp8", "float32", "float32+float32, float16+float32"),
        ("int8", "float16", "int32"),
    ],
)
def test_refused_accumulators(recipe, accumulate, offered):
    _, config = case(recipe)
    config = replace(config, accumulate=accumulate)
    assert AttentionSm80.can_implement(config) == f"accumulate={accumulate!r} is not one of {offered}"
