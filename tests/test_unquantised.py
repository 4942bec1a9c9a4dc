"""Recipes fp16 and bf16: Q, K and V read from the caller's tensors, against simulator and float64."""

from __future__ import annotations

import math

import pytest
import torch

import cute_attn
from cute_attn import Problem, TileConfig, arguments, dispatch, emulator, reference, simulator
from cute_attn.recipe import as_recipe

from .conftest import assert_lse_close, assert_out_close, assert_poison_stays

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDING = {"fp16": 1e-3, "bf16": 8e-3}
"""Relative L2 distance from float64: P and the output rounded to the dtype."""


def random_qkv(recipe, q_shape, k_shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=generator).to(DTYPES[recipe]) for s in (q_shape, k_shape, k_shape))


def check(recipe, q, k, v, device, *, config=None, causal=False, **options):
    """Runs the kernel on views of the given strides, holds it to simulator and float64; returns output and LSE."""
    out, lse = cute_attn.attention(
        *(x if x.device == device else x.to(device) for x in (q, k, v)),
        recipe=recipe,
        causal=causal,
        config=config,
        return_lse=True,
        **options,
    )
    sizes = dict(zip(("batch", "heads", "seq_q", "head_dim"), q.shape, strict=True))
    problem = Problem(**sizes, kv_heads=k.shape[1], seq_k=k.shape[2], dtype=str(q.dtype)[6:], causal=causal)
    arch = arguments.resolve_arch(None, torch.empty(0, device=device))
    tile = config or dispatch.default_config(as_recipe(recipe), problem, arch)
    q, k, v = (x.cpu() for x in (q, k, v))
    simulated, simulated_lse = simulator.attention(
        q, k, v, recipe=recipe, causal=causal, warp_rows=16 * tile.m_tiles, cta_rows=tile.rows
    )
    out = out.cpu()
    assert_out_close(out, simulated, as_recipe(recipe))
    assert_lse_close(lse, simulated_lse, as_recipe(recipe))
    if not out.isnan().any():
        exact, exact_lse = reference.attention(q, k, v, causal=causal)
        assert reference.errors(out, exact).rel_l2 <= ROUNDING[recipe]
        torch.testing.assert_close(lse.cpu().double(), exact_lse, rtol=0, atol=0.01)
    return out, lse


@pytest.mark.parametrize("recipe", ["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(
    ("seq_q", "seq_k", "causal"), [(1, 1, False), (130, 200, True), (200, 77, True), (30, 65, False)]
)
def test_shapes(device, recipe, head_dim, seq_q, seq_k, causal):
    q, k, v = random_qkv(recipe, (2, 4, seq_q, head_dim), (2, 2, seq_k, head_dim), seed=seq_q)
    check(recipe, q, k, v, device, causal=causal)


@pytest.mark.parametrize(
    ("recipe", "head_dim"), [("fp16", 16), ("bf16", 24), ("fp16", 40), ("bf16", 80), ("fp16", 104)]
)
@pytest.mark.parametrize(("seq_q", "seq_k", "causal"), [(1, 65, False), (70, 150, True)])
def test_padded_head_dims(device, recipe, head_dim, seq_q, seq_k, causal):
    """Half planes, and planes that are not a multiple of what neighbouring threads fill; NaN lies between the rows."""
    q, k, v = random_qkv(recipe, (1, 3, seq_q, head_dim), (1, 1, seq_k, head_dim), seed=head_dim)
    k, v = (torch.cat([x, torch.full_like(x, math.nan)], -1)[..., :head_dim] for x in (k, v))
    check(recipe, q, k, v, device, causal=causal)


def test_a_probability_that_rounds_the_other_way(device):
    """A score whose last bit differs, for the MMA sums in another order, moves the largest P of a row by one step."""
    q, k, v = random_qkv("fp16", (2, 4, 200, 16), (2, 2, 77, 16), seed=200)
    check("fp16", q, k, v, device, causal=True)


@pytest.mark.parametrize(("recipe", "head_dim", "stages"), [("bf16", 136, 2), ("fp16", 200, 1), ("bf16", 256, 1)])
def test_large_head_dims(device, recipe, head_dim, stages):
    """16-row warps, and one stage whose K and V take turns."""
    q, k, v = random_qkv(recipe, (1, 3, 70, head_dim), (1, 1, 150, head_dim))
    check(recipe, q, k, v, device, causal=True, config=TileConfig(m_tiles=1, stages=stages))


@pytest.mark.parametrize(
    "tile", [{"warps": 1}, {"warps": 2}, {"warps": 8, "m_tiles": 1}, {"stages": 3}, {"warps": 8, "stages": 1}]
)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_tile_configs(device, tile, head_dim):
    """With one warp a thread's rows are less than eight apart, and the swizzle differs from one to the next."""
    q, k, v = random_qkv("fp16", (1, 1, 70, head_dim), (1, 1, 190, head_dim))
    check("fp16", q, k, v, device, config=TileConfig(**{"m_tiles": 1} | tile), causal=True)


@pytest.mark.parametrize("offset", [0, 1, 4, 8])
def test_strides(device, offset):
    """Slices of a fused projection; rows that are not aligned to 16 bytes are copied."""
    q, k, v = random_qkv("fp16", (2, 2, 50, 64), (2, 2, 50, 64))
    fused = torch.full((2, 50, 2, 3 * 64 + offset), 7.0, dtype=torch.float16, device=device)
    views = [fused[..., offset + 64 * i : offset + 64 * (i + 1)].transpose(1, 2) for i in range(3)]
    for view, x in zip(views, (q, k, v), strict=True):
        view.copy_(x)
    out, _ = check("fp16", *views, device)
    assert torch.equal(out, cute_attn.attention(*(x.to(device) for x in (q, k, v)), recipe="fp16").cpu())


def test_keys_of_one_token_shared_by_all(device):
    """Strides of zero, and tokens in reverse order of heads: any strides will do."""
    q, k, v = random_qkv("bf16", (1, 4, 40, 64), (1, 1, 1, 64))
    check("bf16", q, k.expand(1, 2, 100, 64), v.expand(1, 2, 100, 64), device)


@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_scores_of_any_size(device, scale):
    q, k, v = random_qkv("bf16", (1, 2, 40, 64), (1, 2, 150, 64))
    check("bf16", q * scale, k, v, device)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_stays_in_its_row_and_channel(device, poison):
    q, k, v = random_qkv("fp16", (1, 2, 70, 64), (1, 2, 90, 64))
    q[0, 0, 33, 5], v[0, 1, 9, 7] = poison, poison
    out = cute_attn.attention(*(x.to(device) for x in (q, k, v)), recipe="fp16").cpu()
    assert_poison_stays(out, 33, 7)


def test_what_lies_past_the_keys_is_not_read(device):
    """NaN in memory right after the last key must not reach anything."""
    q, k, v = random_qkv("fp16", (1, 1, 40, 64), (1, 1, 128, 64))
    k[:, :, 70:], v[:, :, 70:] = math.nan, math.nan
    out, _ = check("fp16", q, k[:, :, :70], v[:, :, :70], device)
    assert out.isfinite().all()


def test_causal_rows_without_keys_and_no_keys(device):
    q, k, v = random_qkv("fp16", (1, 2, 100, 64), (1, 2, 30, 64))
    out, lse = check("fp16", q, k, v, device, causal=True)
    assert (out[:, :, :70] == 0).all()
    assert (lse[:, :, :70] == -math.inf).all()
    out, lse = cute_attn.attention(
        *(x.to(device) for x in (q, k[:, :, :0], v[:, :, :0])), recipe="fp16", return_lse=True
    )
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("seed", range(2))
def test_order_of_warps_does_not_matter(monkeypatch, seed):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    q, k, v = random_qkv("fp16", (1, 1, 130, 64), (1, 1, 300, 64))
    plain = cute_attn.attention(q, k, v, recipe="fp16", causal=True)
    with emulator.settings(seed=seed):
        assert torch.equal(plain, cute_attn.attention(q, k, v, recipe="fp16", causal=True))
