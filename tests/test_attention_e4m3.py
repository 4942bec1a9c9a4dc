"""P and V in E4M3, recipes int8_fp8 and fp8: the warp-MMA kernel on random operands against its simulator."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cute_attn import emulator
from cute_attn.kernels.attention_sm80 import AttentionConfig, AttentionSm80
from cute_attn.recipe import recipes
from cute_attn.tile_images import pack_tile_images, unpack_tile_images

from .attention_operands import Operands, check, run

TWO_LEVELS = ("float32+float32", "float16+float32")
RECIPES = [(name, how) for name in ("int8_fp8", "fp8") for how in TWO_LEVELS]
INT8, FP8 = ("int8_fp8", "float32+float32"), ("fp8", "float32+float32")


def operands_of(recipe: tuple[str, str] = INT8, *, smooth_q: bool = False, smooth_v: bool = False, **shape) -> Operands:
    name, accumulate = recipe
    changes = {"accumulate": accumulate, "smooth_q": smooth_q, "smooth_v": smooth_v}
    return Operands(recipe=recipes()[name].replace(**changes), **shape)


def config_of(recipe: tuple[str, str] = INT8, **fields) -> AttentionConfig:
    name, accumulate = recipe
    return AttentionConfig(**{"head_dim": 64, "has_lse": True} | fields, recipe=name, accumulate=accumulate)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(
    ("seq_q", "seq_k", "causal"), [(1, 1, False), (63, 200, True), (130, 127, True), (130, 65, False)]
)
def test_lengths(device, head_dim, recipe, seq_q, seq_k, causal):
    operands = operands_of(recipe, heads=3, kv_heads=1, seq_q=seq_q, seq_k=seq_k, head_dim=head_dim, seed=seq_k)
    check(operands, config_of(recipe, head_dim=head_dim, causal=causal), device)


@pytest.mark.parametrize(
    ("recipe", "head_dim"), [*zip(RECIPES, (24, 40, 56, 112), strict=True)], ids=lambda value: str(value)
)
def test_padded_head_dims(device, recipe, head_dim):
    operands = operands_of(recipe, heads=3, kv_heads=1, seq_q=70, seq_k=150, head_dim=head_dim, seed=head_dim)
    check(operands, config_of(recipe, head_dim=head_dim, causal=True), device)


@pytest.mark.parametrize(
    ("recipe", "head_dim", "tile"),
    [
        (INT8, 256, {"m_tiles": 1}),
        (FP8, 256, {"m_tiles": 1, "stages": 1}),
        (RECIPES[1], 168, {"m_tiles": 1, "stages": 1}),
        (FP8, 200, {"m_tiles": 1, "warps": 8}),
    ],
)
def test_large_head_dims(device, recipe, head_dim, tile):
    operands = operands_of(recipe, heads=3, kv_heads=1, seq_q=70, seq_k=150, head_dim=head_dim)
    check(operands, config_of(recipe, head_dim=head_dim, causal=True, **tile), device)


@pytest.mark.parametrize("recipe", [INT8, FP8])
@pytest.mark.parametrize("k_scale", [1e-6, 1e-2, 1.0, 1e4])
def test_scores_of_any_size(device, recipe, k_scale):
    """From a flat softmax to one in which a single key counts: scores up to ten billion."""
    check(operands_of(recipe, seq_q=40, seq_k=300, k_scale=k_scale), config_of(recipe), device)


@pytest.mark.parametrize("k_scale", [1e30, 1e35])
def test_scores_beyond_float32_give_nan(device, k_scale):
    out, lse = check(operands_of(seq_q=40, seq_k=70, k_scale=k_scale), config_of(), device)
    assert out.isnan().any()
    assert torch.equal(out.isnan().all(-1), lse.isnan())


@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("tile", [{"warps": 1}, {"warps": 8, "stages": 3}, {"m_tiles": 1}])
def test_tile_configs_and_dtypes(device, tile, out_dtype):
    config = config_of(FP8, head_dim=32, causal=True, out_dtype=out_dtype, **tile)
    check(operands_of(FP8, seq_q=150, seq_k=400, head_dim=32), config, device)


@pytest.mark.parametrize("recipe", [INT8, FP8])
def test_key_lengths(device, recipe):
    lengths = [0, 1, 64, 150]
    operands = operands_of(recipe, batch=4, heads=2, seq_q=40, seq_k=150, head_dim=32, key_lengths=lengths)
    check(operands, config_of(recipe, head_dim=32, causal=True, varlen_k=True), device)


@pytest.mark.parametrize(
    ("recipe", "smooth"), [(INT8, {"smooth_q": True, "smooth_v": True}), (FP8, {"smooth_v": True})]
)
def test_smoothed(device, recipe, smooth):
    operands = operands_of(recipe, **smooth, heads=5, seq_q=130, seq_k=150, head_dim=32)
    check(operands, config_of(recipe, head_dim=32, causal=True, **smooth), device)


def two_scores(recipe: tuple[str, str], first: int, second: int, values: float = 1.0) -> Operands:
    """One query; 64 keys of score ``second`` in base 2 and V = -values, visited before 64 of ``first`` and V = values.

    The score of a key is its first dim.
    """
    o = operands_of(recipe, seq_q=1, seq_k=128, head_dim=32)
    keys = torch.zeros(1, 1, o.seq_k, 32)
    keys[:, :, :64, 0], keys[:, :, 64:, 0] = first, second
    v = torch.full_like(keys, values)
    v[:, :, 64:] *= -1
    o.q = torch.zeros(1, 1, 1, 32).to(o.q.dtype)
    o.q[..., 0], o.q_scale, o.q_bias = 1, torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    o.image = pack_tile_images(
        keys.to(o.q.dtype), torch.ones(keys.shape[:3]), v.to(torch.float8_e4m3fn), o.recipe.qk_format
    )
    o.v_scale, o.softmax_scale = torch.ones(1, 1, 32), math.log(2)
    return o


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("start", "rise"), [(0, -9), (0, -1), (0, 0), (-7, 1), (8, 2), (-16, 3), (16, 16), (-8, 120)])
def test_the_max_rises(device, recipe, start, rise):
    """By less than the headroom, by just as much, by more: what the first tile left counts 2^-rise.

    The top is no whole number, so the biases are rounded: their difference must not become a count too small by one.
    """
    if recipe[0] == "fp8" and rise == 120:
        rise = 40  # 112 and 32 are E4M3, as are all others
    out, lse = check(two_scores(recipe, start + rise, start), config_of(recipe, head_dim=32), device)
    ratio = 2.0**-rise
    torch.testing.assert_close(out, torch.full_like(out, (1 - ratio) / (1 + ratio)), rtol=1e-3, atol=1e-5)
    expected = math.log(64 * (1 + ratio)) + (start + rise) * math.log(2)
    torch.testing.assert_close(lse, torch.full_like(lse, expected), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("accumulation", ["float32", "hardware"])
@pytest.mark.parametrize("sign", [1, -1])
def test_float16_sums_of_the_largest_p_and_v_do_not_overflow(monkeypatch, sign, accumulation):
    """Every P is 448, every |V| 2.25: a tile's sum is 64512, the last but two of float16's numbers.

    The 64 keys that are visited first, with P = 224, only set the max to 0, which just covers the score of the others.
    """
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    recipe = ("int8_fp8", "float16+float32")
    operands = two_scores(recipe, 0, -1, sign * 2.25)
    k, scale, v = unpack_tile_images(operands.image, 32, 128, "e4m3", "int8")
    operands.image = pack_tile_images(k, scale, torch.full_like(v.float(), sign * 2.25).to(v.dtype))
    with emulator.settings(accumulation=accumulation):
        out, lse = run(operands, config_of(recipe, head_dim=32), torch.device("cpu"))
    torch.testing.assert_close(out, torch.full_like(out, sign * 2.25), rtol=1e-3, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(64 * 1.5)), rtol=1e-3, atol=0)


def test_float16_sums_would_overflow_with_v_a_step_larger(device):
    """2.5 is the next E4M3: 64·448·2.5 is beyond float16, so that the bound of 2.25 is no larger than it must be."""
    recipe = ("int8_fp8", "float16+float32")
    out, _ = run(two_scores(recipe, 0, -1, 2.5), config_of(recipe, head_dim=32), device)
    assert out.isinf().all()


@pytest.mark.parametrize("recipe", [INT8, FP8])
@pytest.mark.parametrize("name", ["q_scale", "q_bias"])
def test_a_row_that_is_not_finite_stays_alone(device, recipe, name):
    operands = operands_of(recipe, seq_q=100, seq_k=200)
    getattr(operands, name)[0, 0, 33] = math.nan
    out, lse = check(operands, config_of(recipe), device)
    bad = torch.arange(100) == 33
    assert torch.equal(out.isnan().any(-1)[0, 0], bad)
    assert torch.equal(lse.isnan()[0, 0], bad)


def test_causal_rows_without_keys(device):
    out, lse = check(operands_of(seq_q=200, seq_k=70), config_of(causal=True), device)
    assert (out[:, :, :130] == 0).all()
    assert (lse[:, :, :130] == -math.inf).all()


def test_rows_of_zero_scale_are_the_mean_of_v(device):
    """P is 224, an E4M3, so that neither output nor LSE is off."""
    operands = operands_of(seq_q=40, seq_k=100)
    operands.q_scale[0, 0, 5] = operands.q_bias[0, 0, 5] = 0.0
    out, lse = check(operands, config_of(), device)
    values = unpack_tile_images(operands.image, 64, 100, "e4m3")[2][0, 0].float() * operands.v_scale[0, 0]
    torch.testing.assert_close(out[0, 0, 5].float(), values.mean(0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(lse[0, 0, 5], torch.tensor(math.log(100)), rtol=1e-6, atol=1e-6)


def test_bias_of_the_lse(device):
    """Rows of equal P, wherever between two E4M3: the LSE is off by up to log(1 + 2^-4), half a step, and no more."""
    shifts = torch.linspace(0, 1, 101)[:-1]
    operands = operands_of(seq_q=100, seq_k=64, head_dim=32)
    operands.q.zero_()
    operands.q[..., 0], operands.q_bias = -1, torch.zeros(1, 1, 100)
    operands.q_scale = shifts[None, None]
    keys = torch.ones(1, 1, 64, 32, dtype=torch.int8)
    operands.image = pack_tile_images(keys, torch.ones(1, 1, 64), keys.to(torch.float8_e4m3fn))
    operands.softmax_scale = math.log(2)
    _, lse = check(operands, config_of(head_dim=32), device)
    error = lse[0, 0] - (math.log(64) - shifts * math.log(2))
    assert 0.05 <= error.abs().max() <= math.log(1 + 2**-4)


@pytest.mark.parametrize("recipe", [INT8, RECIPES[1], FP8])
@pytest.mark.parametrize("seed", range(2))
def test_order_of_warps_does_not_matter(monkeypatch, recipe, seed):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    stages = 1 if recipe == RECIPES[1] else 2
    operands, config = operands_of(recipe, seq_q=130, seq_k=300), config_of(recipe, causal=True, stages=stages)
    plain = run(operands, config, torch.device("cpu"))
    with emulator.settings(seed=seed):
        shuffled = run(operands, config, torch.device("cpu"))
    assert torch.equal(plain[0], shuffled[0])
    assert torch.equal(plain[1], shuffled[1])


def test_refusals():
    for config, reason in (
        (replace(config_of(), accumulate="float32"), "accumulate='float32' is not one of float32+float32, "),
        (config_of(FP8, smooth_q=True), "recipe='fp8' does not smooth Q; use 'int8_fp8'"),
    ):
        assert AttentionSm80.can_implement(config).startswith(reason)
