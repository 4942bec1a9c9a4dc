"""The attention kernel with Q and K in INT4, and what smoothing adds to any recipe, against the simulator."""

from __future__ import annotations

import math

import pytest
import torch

from cute_attn.kernels.attention_sm80 import AttentionConfig, AttentionSm80
from cute_attn.tile_images import pack_tile_images

from .attention_operands import assert_only_nan_row, assert_same_in_any_order, case, check, run

ACCUMULATE = {"int8": ("int32",), "fp16": ("float32", "float16", "float16+float32")}
INT4 = [(f"int4_{pv}", accumulate) for pv, names in ACCUMULATE.items() for accumulate in names]
SMOOTHED = [("int8", "int32"), ("int8_fp16", "float32"), *INT4]


@pytest.mark.parametrize(("recipe", "accumulate"), INT4)
@pytest.mark.parametrize(("head_dim", "smooth"), [(64, ""), (64, "q"), (128, "q")])
@pytest.mark.parametrize(("seq_q", "seq_k", "causal"), [(1, 1, False), (63, 200, True), (130, 127, True)])
def test_int4(device, recipe, accumulate, head_dim, smooth, seq_q, seq_k, causal):
    shape = {"heads": 3, "kv_heads": 1, "seq_q": seq_q, "seq_k": seq_k, "head_dim": head_dim, "seed": seq_k}
    check(*case(recipe, accumulate, smooth, causal=causal, **shape), device)


@pytest.mark.parametrize("recipe", ["int4_int8", "int4_fp16"])
@pytest.mark.parametrize("head_dim", [16, 40, 72, 96, 256])
def test_int4_of_padded_head_dims(device, recipe, head_dim):
    shape = {"heads": 2, "kv_heads": 2, "seq_q": 40, "seq_k": 100, "head_dim": head_dim}
    check(*case(recipe, smooth="qv", tile={"m_tiles": 1}, **shape), device)


@pytest.mark.parametrize("value", [-7, -1, 7])
def test_int4_products_are_exact(device, value):
    """One dim of one key counts: its score is value · 5, whichever of the two elements of a byte it is."""
    operands, config = case("int4_fp16", seq_q=64, seq_k=1)
    k = torch.full((1, 1, 1, 64), value, dtype=torch.int8)
    operands.q = 5 * torch.eye(64, dtype=torch.int8)[None, None]
    operands.q_scale, operands.q_bias, operands.softmax_scale = torch.ones(1, 1, 64), torch.zeros(1, 1, 64), 1.0
    operands.image = pack_tile_images(k, torch.ones(1, 1, 1), torch.ones_like(k).half(), "int4")
    _, lse = check(operands, config, device)
    torch.testing.assert_close(lse, torch.full_like(lse, 5.0 * value), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("recipe", "accumulate"), SMOOTHED)
@pytest.mark.parametrize("causal", [False, True])
def test_delta_and_v_mean(device, recipe, accumulate, causal):
    """Ragged rows, grouped heads, and batch elements of their own lengths, one of them empty: zeros, not V's mean."""
    lengths = [190, 0, 64]
    shape = {"batch": 3, "heads": 6, "kv_heads": 2, "seq_q": 140, "seq_k": 190, "key_lengths": lengths}
    out, lse = check(*case(recipe, accumulate, "qv", causal=causal, **shape), device)
    assert (out[1] == 0).all()
    assert (lse[1] == -math.inf).all()


@pytest.mark.parametrize(("warps", "m_tiles", "stages"), [(1, 1, 1), (2, 2, 3), (4, 1, 2), (8, 2, 2), (8, 2, 1)])
@pytest.mark.parametrize("seq_q", [100, 300])
def test_every_cta_reads_the_delta_of_its_rows(device, warps, m_tiles, stages, seq_q):
    """CTAs of 16, 64 and 256 rows: parts of a block of 128, or two blocks of which the second may not be there."""
    tile = {"warps": warps, "m_tiles": m_tiles, "stages": stages}
    check(*case("int8", smooth="q", tile=tile, heads=2, kv_heads=1, seq_q=seq_q, seq_k=150, head_dim=32), device)


def test_delta_alone_decides(device):
    """Q of zeros: the softmax of delta, for rows of scale zero too."""
    operands, config = case("int4_fp16", smooth="q", seq_q=130, seq_k=70)
    operands.q.zero_()
    operands.q_scale[..., :5] = 0.0
    operands.q_bias.zero_()
    _, lse = check(operands, config, device)
    expected = torch.logsumexp(operands.delta[..., :70].double() * operands.softmax_scale, -1)
    blocks = (torch.arange(130) // 128)[None, None].expand_as(lse)
    torch.testing.assert_close(lse.double(), expected.gather(-1, blocks), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k_scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("recipe", ["int4_int8", "int4_fp16"])
def test_scores_of_any_size(device, recipe, k_scale):
    check(*case(recipe, smooth="q", seq_q=40, seq_k=300, k_scale=k_scale), device)


@pytest.mark.parametrize("name", ["q_scale", "q_bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_alone(device, name, value):
    operands, config = case("int4_int8", smooth="qv", seq_q=100, seq_k=200)
    getattr(operands, name)[0, 0, 33] = value
    assert_only_nan_row(*check(operands, config, device), 33)


def test_order_of_warps_does_not_matter(monkeypatch):
    operands, config = case("int4_int8", smooth="q", causal=True, seq_q=130, seq_k=300)
    assert_same_in_any_order(monkeypatch, lambda device: run(operands, config, device), range(2))


@pytest.mark.parametrize("field", ["smooth_q", "smooth_v"])
def test_unquantised_recipes_smooth_nothing(field):
    config = AttentionConfig(64, recipe="bf16", accumulate="float32", **{field: True})
    assert AttentionSm80.can_implement(config) == "recipe='bf16' smooths nothing, because it quantises nothing"
