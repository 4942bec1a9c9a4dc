"""Recipe int8_fp16 by itself: the attention kernel on random operands against its simulator, every accumulator."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cute_attn import emulator, simulator
from cute_attn.kernels.attention_sm80 import AttentionConfig, AttentionSm80
from cute_attn.recipe import recipes
from cute_attn.tile_images import pack_tile_images

from .attention_operands import Operands, check, run

ACCUMULATORS = ("float32", "float16", "float16+float32")


def operands_of(accumulate: str = "float32", **shape) -> Operands:
    return Operands(recipe=recipes()["int8_fp16"].replace(accumulate=accumulate), **shape)


def config_of(accumulate: str = "float32", **fields) -> AttentionConfig:
    return AttentionConfig(**{"head_dim": 64, "has_lse": True} | fields, recipe="int8_fp16", accumulate=accumulate)


@pytest.mark.parametrize("accumulate", ACCUMULATORS)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(
    ("seq_q", "seq_k", "causal"), [(1, 1, False), (63, 200, True), (130, 127, True), (130, 65, False)]
)
def test_lengths(device, head_dim, accumulate, seq_q, seq_k, causal):
    operands = operands_of(accumulate, heads=3, kv_heads=1, seq_q=seq_q, seq_k=seq_k, head_dim=head_dim, seed=seq_k)
    check(operands, config_of(accumulate, head_dim=head_dim, causal=causal), device)


@pytest.mark.parametrize(("accumulate", "head_dim"), [("float32", 24), ("float16", 48), ("float16+float32", 112)])
@pytest.mark.parametrize(("seq_q", "seq_k", "causal"), [(1, 65, False), (70, 150, True)])
def test_padded_head_dims(device, accumulate, head_dim, seq_q, seq_k, causal):
    operands = operands_of(accumulate, heads=3, kv_heads=1, seq_q=seq_q, seq_k=seq_k, head_dim=head_dim, seed=seq_k)
    check(operands, config_of(accumulate, head_dim=head_dim, causal=causal), device)


@pytest.mark.parametrize(
    ("accumulate", "head_dim", "tile"),
    [
        ("float32", 200, {"m_tiles": 1}),
        ("float32", 256, {"m_tiles": 1, "stages": 1}),
        ("float16", 256, {"stages": 1}),
        ("float16+float32", 168, {"m_tiles": 1, "stages": 1}),
    ],
)
def test_large_head_dims(device, accumulate, head_dim, tile):
    operands = operands_of(accumulate, heads=3, kv_heads=1, seq_q=70, seq_k=150, head_dim=head_dim)
    check(operands, config_of(accumulate, head_dim=head_dim, causal=True, **tile), device)


@pytest.mark.parametrize("accumulate", ACCUMULATORS)
@pytest.mark.parametrize("k_scale", [1e-6, 1e-2, 1.0, 1e4])
def test_scores_of_any_size(device, accumulate, k_scale):
    """From a flat softmax to one in which a single key counts: scores up to ten billion."""
    check(operands_of(accumulate, seq_q=40, seq_k=300, k_scale=k_scale), config_of(accumulate), device)


@pytest.mark.parametrize("k_scale", [1e30, 1e35])
def test_scores_beyond_float32_give_nan(device, k_scale):
    out, lse = check(operands_of(seq_q=40, seq_k=70, k_scale=k_scale), config_of(), device)
    assert out.isnan().any()
    assert torch.equal(out.isnan().all(-1), lse.isnan())


@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("tile", [{"warps": 1}, {"warps": 8, "stages": 3}, {"m_tiles": 1}])
def test_tile_configs_and_dtypes(device, tile, out_dtype):
    config = config_of(head_dim=32, causal=True, out_dtype=out_dtype, **tile)
    check(operands_of(seq_q=150, seq_k=400, head_dim=32), config, device)


def two_tiles(accumulate: str, first: int, second: int) -> Operands:
    """One query; 64 keys of score ``second`` in base 2 and V = -1, visited before 64 of score ``first`` and V = 1."""
    operands = operands_of(accumulate, seq_q=1, seq_k=128, head_dim=32)
    keys, values = torch.zeros(1, 1, 128, 32, dtype=torch.int8), torch.ones(1, 1, 128, 32).half()
    keys[:, :, :64, 0], keys[:, :, 64:, 0], values[:, :, 64:] = first, second, -1
    operands.q.zero_()
    operands.q[..., 0], operands.q_scale, operands.q_bias = 1, torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    operands.image = pack_tile_images(keys, torch.ones(1, 1, 128), values)
    operands.v_scale, operands.softmax_scale = torch.ones(1, 1, 32), math.log(2)
    return operands


@pytest.mark.parametrize("accumulate", ACCUMULATORS)
@pytest.mark.parametrize("rise", [-20, -1, 0, 1, 3, 4, 5, 7, 8, 9, 20, 127])
@pytest.mark.parametrize("start", [-90, 0])
def test_the_max_rises(device, accumulate, rise, start):
    """By less than the headroom, by just as much, by more: what the first tile left counts 2^-rise."""
    operands = two_tiles(accumulate, start + rise, start)
    out, lse = check(operands, config_of(accumulate, head_dim=32), device)
    ratio = 2.0**-rise
    torch.testing.assert_close(out, torch.full_like(out, (1 - ratio) / (1 + ratio)), rtol=1e-3, atol=1e-5)
    expected = math.log(64 * (1 + ratio)) + (start + rise) * math.log(2)
    torch.testing.assert_close(lse, torch.full_like(lse, expected), rtol=1e-6, atol=1e-5)


def test_float16_does_not_overflow(device):
    """Keys of the largest score that rows still cover, and V at its largest: the output stops growing at 4096."""
    operands = operands_of("float16", seq_q=1, seq_k=64, head_dim=32)
    tiles = 600
    operands.q.zero_()
    operands.q[..., 0] = 1
    operands.q_scale, operands.softmax_scale = torch.ones(1, 1, 1), math.log(2)
    keys, values = torch.zeros(1, 1, 64 * tiles, 32, dtype=torch.int8), torch.full((1, 1, 64 * tiles, 32), 1.99).half()
    keys[..., 0] = 4
    keys[:, :, -64:, 0] = 0  # visited first: the other tiles are 4 higher, just what the headroom covers
    operands.image = pack_tile_images(keys, torch.ones(1, 1, 64 * tiles), values)
    operands.seq_k, operands.v_scale = 64 * tiles, torch.ones(1, 1, 32)
    out, _ = check(operands, config_of("float16", head_dim=32, warps=1, m_tiles=1), device)
    assert (out.float() < 4200 / (64 * tiles * 2**-4)).all()
    assert (out > 1.5).all()


@pytest.mark.parametrize("name", ["q_scale", "q_bias"])
def test_a_row_that_is_not_finite_stays_alone(device, name):
    operands = operands_of(seq_q=100, seq_k=200)
    getattr(operands, name)[0, 0, 33] = math.nan
    out, lse = check(operands, config_of(), device)
    bad = torch.arange(100) == 33
    assert torch.equal(out.isnan().any(-1)[0, 0], bad)
    assert torch.equal(lse.isnan()[0, 0], bad)


def test_causal_rows_without_keys(device):
    out, lse = check(operands_of(seq_q=200, seq_k=70), config_of(causal=True), device)
    assert (out[:, :, :130] == 0).all()
    assert (lse[:, :, :130] == -math.inf).all()


def test_rows_of_zero_scale_are_the_mean_of_v(device):
    operands = operands_of(seq_q=40, seq_k=100)
    operands.q_scale[0, 0, 5] = operands.q_bias[0, 0, 5] = 0.0
    out, lse = check(operands, config_of(), device)
    values = simulator.unpack_tile_images(operands.image, 64, 100, "float16")[2][0, 0].float() * operands.v_scale[0, 0]
    torch.testing.assert_close(out[0, 0, 5].float(), values.mean(0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(lse[0, 0, 5], torch.tensor(math.log(100)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_order_of_warps_does_not_matter(monkeypatch, seed):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    operands, config = operands_of(seq_q=130, seq_k=300), config_of(causal=True)
    plain = run(operands, config, torch.device("cpu"))
    with emulator.settings(seed=seed):
        shuffled = run(operands, config, torch.device("cpu"))
    assert torch.equal(plain[0], shuffled[0])
    assert torch.equal(plain[1], shuffled[1])


def test_refused_accumulators():
    for config, offered in (
        (replace(config_of(), accumulate="int32"), "float32, float16+float32, float16"),
        (AttentionConfig(64, accumulate="float16"), "int32"),
    ):
        assert AttentionSm80.can_implement(config) == f"accumulate={config.accumulate!r} is not one of {offered}"
