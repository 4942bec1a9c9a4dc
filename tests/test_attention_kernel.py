"""The attention kernel of recipe int8 by itself, on random quantised operands, against its simulator."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cute_attn import simulator
from cute_attn.kernels.attention_sm80 import AttentionConfig, AttentionSm80
from cute_attn.tile_images import pack_tile_images

from .attention_operands import (
    Operands,
    assert_only_nan_row,
    assert_rows_without_keys,
    assert_same_in_any_order,
    check,
    run,
    simulate,
    two_scores,
)
from .conftest import assert_out_close

LSE = AttentionConfig(head_dim=64, has_lse=True)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seq_q", [1, 63, 130])
@pytest.mark.parametrize("seq_k", [1, 2, 64, 65, 127, 200])
def test_lengths(device, head_dim, causal, seq_q, seq_k):
    operands = Operands(heads=3, kv_heads=1, seq_q=seq_q, seq_k=seq_k, head_dim=head_dim, seed=seq_q * seq_k)
    check(operands, replace(LSE, head_dim=head_dim, causal=causal), device)


@pytest.mark.parametrize("head_dim", [16, 40, 56, 72, 88])
@pytest.mark.parametrize(("seq_q", "seq_k", "causal"), [(1, 65, False), (70, 150, True)])
def test_padded_head_dims(device, head_dim, seq_q, seq_k, causal):
    """One to three of the four runs of 8 channels in the last 32 are stored; the memory after a row is left alone."""
    o = Operands(heads=3, kv_heads=1, seq_q=seq_q, seq_k=seq_k, head_dim=head_dim, seed=head_dim)
    config = replace(LSE, head_dim=head_dim, causal=causal)
    frame = torch.full((1, 3, seq_q, head_dim + 24), 7.0, dtype=torch.float16, device=device)
    check(o, config, device, frame[..., :head_dim])
    assert (frame[..., head_dim:] == 7.0).all()


@pytest.mark.parametrize(("head_dim", "stages"), [(136, 2), (160, 1), (256, 2), (256, 1)])
@pytest.mark.parametrize(("seq_q", "seq_k", "causal"), [(1, 65, False), (70, 150, True)])
def test_large_head_dims(device, head_dim, stages, seq_q, seq_k, causal):
    """16-row warps, and one stage whose K and V take turns."""
    o = Operands(heads=3, kv_heads=1, seq_q=seq_q, seq_k=seq_k, head_dim=head_dim, seed=head_dim)
    check(o, replace(LSE, head_dim=head_dim, causal=causal, m_tiles=1, stages=stages), device)


def test_largest_products(device):
    """Every product 127² at head dim 256: accumulators of 4129024, just below 2^22."""
    o = Operands(seq_q=20, seq_k=70, head_dim=256, k_scale=1e-5)
    o.q.fill_(127)
    keys = torch.full((1, 1, 70, 256), 127, dtype=torch.int8)
    keys[:, :, ::2] = -127
    scale, values = torch.full((1, 1, 70), 2.0**-20), torch.randint(-127, 128, keys.shape, dtype=torch.int8)
    o.image = pack_tile_images(keys, scale, values)
    check(o, replace(LSE, head_dim=256, m_tiles=1), device)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 3), (5, 1), (3, 3)])
def test_head_counts(device, heads, kv_heads):
    check(Operands(batch=2, heads=heads, kv_heads=kv_heads, seq_q=70, seq_k=150), LSE, device)


@pytest.mark.parametrize("k_scale", [1e-6, 1e-2, 1.0, 1e4])
def test_scores_of_any_size(device, k_scale):
    """From a flat softmax to one in which a single key counts: scores up to ten billion."""
    check(Operands(seq_q=40, seq_k=300, k_scale=k_scale), LSE, device)


@pytest.mark.parametrize("top", [-120, -57, -25, -9, 3, 8, 23, 100])
def test_the_max_rises_by_one(device, top):
    """Two tiles whose scores are whole numbers, one apart: what the first one left counts half, at every exponent.

    log2(255) - m is rounded; its difference must not become a shift by 0 where m passes a power of two.
    """
    out, lse = check(*two_scores("int8", None, top, top - 1, 100), device)
    torch.testing.assert_close(out, torch.full_like(out, 100 / 3), rtol=0, atol=0.5)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(64 * 1.5) + top * math.log(2)), rtol=0, atol=0.01)


@pytest.mark.parametrize("k_scale", [1e30, 1e35])
def test_scores_beyond_float32_give_nan_and_not_the_answer_of_a_row_without_keys(device, k_scale):
    out, lse = check(Operands(seq_q=40, seq_k=70, k_scale=k_scale), LSE, device)
    assert out.isnan().any()
    assert torch.equal(out.isnan().all(-1), lse.isnan())


@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("align", [2, 4, 8, 16])
def test_strided_output(device, out_dtype, align):
    """Rows at every alignment that a config can promise; the elements between them are left alone."""
    o = Operands(batch=2, heads=2, kv_heads=1, seq_q=70, seq_k=90, head_dim=32)
    config = AttentionConfig(head_dim=32, out_dtype=out_dtype, out_align=align)
    gap = align // 2
    frame = torch.full((2, 70, 2, 32 + gap), 7.0, dtype=getattr(torch, out_dtype), device=device)
    out, _ = run(o, config, device, frame[..., :32].transpose(1, 2))
    expected, _ = simulate(o, config)
    assert_out_close(out, expected, o.recipe)
    assert (frame[..., 32:] == 7.0).all()


@pytest.mark.parametrize(
    "tile",
    [
        {"warps": 1},
        {"warps": 2, "stages": 3},
        {"warps": 8, "stages": 4},
        {"m_tiles": 1},
        {"m_tiles": 1, "stages": 3},
        {"stages": 1},
    ],
)
def test_tile_configs(device, tile):
    check(Operands(seq_q=150, seq_k=400, head_dim=32), replace(LSE, head_dim=32, causal=True, **tile), device)


def test_lse_can_be_left_out(device):
    operands = Operands(seq_q=40, seq_k=100)
    assert torch.equal(run(operands, AttentionConfig(head_dim=64), device)[0], run(operands, LSE, device)[0])


def test_zero_keys(device):
    operands = Operands(seq_q=40, seq_k=1)
    operands.seq_k, operands.image = 0, operands.image[:, :, :0]
    out, lse = run(operands, LSE, device)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_causal_rows_without_keys(device):
    assert_rows_without_keys(*check(Operands(seq_q=200, seq_k=70), replace(LSE, causal=True), device), 130)


@pytest.mark.parametrize("name", ["q_scale", "q_bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_alone(device, name, value):
    operands = Operands(seq_q=100, seq_k=200)
    getattr(operands, name)[0, 0, 33] = value
    assert_only_nan_row(*check(operands, LSE, device), 33)


def test_rows_of_zero_scale_are_the_mean_of_v(device):
    operands = Operands(seq_q=40, seq_k=100)
    operands.q_scale[0, 0, 5] = 0.0
    operands.q_bias[0, 0, 5] = 0.0
    out, lse = check(operands, LSE, device)
    values = simulator.unpack_tile_images(operands.image, 64, 100)[2][0, 0].float() * operands.v_scale[0, 0]
    torch.testing.assert_close(out[0, 0, 5].float(), values.mean(0), rtol=1e-2, atol=1e-3)
    # Every P is 127.5 rounded to 128: log(128/127.5) too much.
    torch.testing.assert_close(lse[0, 0, 5], torch.tensor(math.log(100 * 128 / 127.5)), rtol=1e-6, atol=1e-6)


def test_more_heads_than_fit_in_one_group(device):
    """Heads are started in groups whose tiles fit in L2; a last group that is not full must not run past the end."""
    operands = Operands(heads=5, kv_heads=5, seq_q=70, seq_k=130, head_dim=32)
    tiles_of_two_heads = 2 * operands.image[0, 0].numel()
    config = replace(LSE, head_dim=32, causal=True, warps=1, l2_bytes=tiles_of_two_heads)
    check(operands, config, device)


@pytest.mark.parametrize("change", [{}, {"head_dim": 40, "stages": 1}])
def test_order_of_warps_does_not_matter(monkeypatch, change):
    config = replace(LSE, causal=True, **change)
    operands = Operands(seq_q=130, seq_k=300, head_dim=config.head_dim)
    assert_same_in_any_order(monkeypatch, lambda device: run(operands, config, device), range(3))


def test_row_sums_are_halved_before_the_output_overflows(device):
    """147456 keys of equal weight and V = 127: without the forced shift the output passes 2^31 by 11 %."""
    seq_k = 64 * 2304
    operands = Operands(seq_q=20, seq_k=64, head_dim=32)
    operands.q.zero_()
    keys = torch.ones(1, 1, 64, 32, dtype=torch.int8)
    tile = pack_tile_images(keys, torch.full((1, 1, 64), 2.0**-8), 127 * keys)
    operands.image, operands.seq_k = tile.expand(1, 1, seq_k // 64, -1).contiguous(), seq_k
    out, lse = check(operands, AttentionConfig(head_dim=32, has_lse=True, warps=1), device)
    torch.testing.assert_close(out.float(), (127 * operands.v_scale[:, :, None]).expand_as(out), rtol=1e-3, atol=0)
    expected = operands.q_bias * operands.softmax_scale + math.log(seq_k)
    torch.testing.assert_close(lse, expected, rtol=0, atol=5e-3)  # P: 127.5 rounded to 128


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 100}, "head_dim=100 is not a multiple of 8 from 16 to 256"),
        ({"head_dim": 264}, "head_dim=264 is not a multiple of 8 from 16 to 256"),
        ({"out_dtype": "float32"}, "out_dtype='float32' is not one of float16, bfloat16"),
        ({"out_align": 1}, "out_align=1 is not one of 16, 8, 4, 2"),
        ({"warps": 3}, "warps=3 is not one of 1, 2, 4, 8"),
        ({"m_tiles": 3}, "m_tiles=3 is not one of 1, 2"),
        ({"stages": 5}, "stages=5 is not one of 1, 2, 3, 4"),
    ],
)
def test_refused_configs(change, reason):
    config = replace(LSE, **change)
    assert AttentionSm80.can_implement(config) == reason
    with pytest.raises(ValueError, match=reason):
        AttentionSm80(config)


def test_accepted_config():
    assert AttentionSm80.can_implement(LSE) is None
