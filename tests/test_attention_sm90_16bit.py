"""Recipes fp16 and bf16 of sm_90a's own kernel: K and V by TMA from ordinary tensors, against simulator and float64."""

from __future__ import annotations

import math

import pytest
import torch

from cute_attn import emulator, jit, reference, simulator
from cute_attn.kernels.attention_sm90 import AttentionSm90, AttentionSm90Config
from cute_attn.recipe import recipes

from .conftest import assert_lse_close, assert_out_close, assert_poison_stays
from .test_attention_sm90 import work_sharing
from .test_unquantised import DTYPES, ROUNDING, random_qkv


def configured(recipe: str = "fp16", **changes) -> AttentionSm90Config:
    usual = {"head_dim": 64, "has_lse": True, "warpgroups": 2, "stages": 3}
    dtype = str(DTYPES[recipe])[6:]
    return AttentionSm90Config(**(usual | {"recipe": recipe, "accumulate": "float32", "out_dtype": dtype} | changes))


def run(config: AttentionSm90Config, q, k, v, device: torch.device, key_lengths: list[int] | None = None):
    """out and lse of the kernel, on the CPU; both start as 7, so that what is not written shows."""
    lengths = None if key_lengths is None else torch.tensor(key_lengths, dtype=torch.int32, device=device)
    out = torch.full(q.shape, 7.0, dtype=q.dtype, device=device)
    lse = torch.full(q.shape[:3], 7.0, device=device)
    kernel = jit.load(AttentionSm90, config, "sm_90a", jit.backend())
    q, k, v = (x if x.device == device else x.to(device) for x in (q, k, v))
    scale, others = q.shape[3] ** -0.5 * math.log2(math.e), work_sharing(config, device)
    kernel(q, None, None, k, v, None, None, lengths, out, lse, k.shape[2], scale, *others)
    return out.cpu(), lse.cpu()


def check(config: AttentionSm90Config, q, k, v, device: torch.device, key_lengths: list[int] | None = None):
    """Runs the kernel, holds it to simulator and float64; returns output and LSE."""
    out, lse = run(config, q, k, v, device, key_lengths)
    recipe = recipes()[config.recipe]
    whole = [k.shape[2]] * len(q) if key_lengths is None else key_lengths
    for b, length in enumerate(whole):
        one = [x[b : b + 1].cpu() for x in (q, k[:, :, :length], v[:, :, :length])]
        simulated, simulated_lse = simulator.attention_unquantised(
            *one,
            recipe=recipe,
            causal=config.causal,
            softmax_scale=q.shape[3] ** -0.5,
            warp_rows=16,
            cta_rows=64 * config.warpgroups,
            tile_tokens=128,
        )
        assert_out_close(out[b : b + 1], simulated, recipe)
        assert_lse_close(lse[b : b + 1], simulated_lse, recipe)
        if length and not simulated.isnan().any():
            exact, exact_lse = reference.attention(*one, causal=config.causal)
            assert reference.errors(out[b : b + 1], exact).rel_l2 <= ROUNDING[config.recipe]
            torch.testing.assert_close(lse[b : b + 1].double(), exact_lse, rtol=0, atol=0.01)
    return out, lse


@pytest.mark.parametrize("recipe", ["fp16", "bf16"])
@pytest.mark.parametrize(("head_dim", "warpgroups"), [(64, 3), (128, 2)])
@pytest.mark.parametrize(
    ("seq_q", "seq_k", "causal"), [(1, 1, False), (200, 333, True), (193, 256, False), (200, 77, True), (65, 129, True)]
)
def test_shapes(device, recipe, head_dim, warpgroups, seq_q, seq_k, causal):
    """Ragged ends, tiles that need a mask and those that do not, warpgroups without rows, and rows without keys."""
    q, k, v = random_qkv(recipe, (2, 3, seq_q, head_dim), (2, 1, seq_k, head_dim), seed=seq_q)
    config = configured(recipe, head_dim=head_dim, warpgroups=warpgroups, causal=causal)
    out, lse = check(config, q, k, v, device)
    if causal and seq_q > seq_k:
        assert (out[:, :, : seq_q - seq_k] == 0).all()
        assert (lse[:, :, : seq_q - seq_k] == -math.inf).all()


@pytest.mark.parametrize(
    ("recipe", "head_dim"),
    [("fp16", 16), ("bf16", 24), ("fp16", 40), ("bf16", 72), ("fp16", 80), ("bf16", 96), ("fp16", 120)],
)
def test_padded_head_dims(device, recipe, head_dim):
    """Blocks that are part of a swizzled row, and half steps of the MMA's k; NaN lies between the rows."""
    q, k, v = random_qkv(recipe, (1, 3, 70, head_dim), (1, 1, 150, head_dim), seed=head_dim)
    k, v = (torch.cat([x, torch.full_like(x, math.nan)], -1)[..., :head_dim] for x in (k, v))
    check(configured(recipe, head_dim=head_dim, causal=True), q, k, v, device)


@pytest.mark.parametrize(("recipe", "head_dim", "stages"), [("bf16", 136, 3), ("fp16", 192, 3), ("bf16", 256, 2)])
def test_large_head_dims(device, recipe, head_dim, stages):
    q, k, v = random_qkv(recipe, (1, 2, 70, head_dim), (1, 1, 150, head_dim))
    check(configured(recipe, head_dim=head_dim, stages=stages, causal=True), q, k, v, device)


@pytest.mark.parametrize(("warpgroups", "stages"), [(1, 1), (1, 2), (2, 1), (3, 5), (3, 8)])
def test_tile_configs(device, warpgroups, stages):
    """Down to one stage, which K and V share by turns."""
    q, k, v = random_qkv("fp16", (1, 2, 230, 32), (1, 2, 600, 32))
    check(configured(head_dim=32, warpgroups=warpgroups, stages=stages, causal=True), q, k, v, device)


@pytest.mark.parametrize("causal", [False, True])
def test_strides(device, causal):
    """Slices of a fused projection [B, S, H, 3·D]: heads lie closer than tokens, and nothing is contiguous."""
    q, k, v = random_qkv("bf16", (2, 2, 50, 64), (2, 2, 50, 64))
    fused = torch.full((2, 50, 2, 3 * 64 + 8), math.nan, dtype=torch.bfloat16, device=device)
    views = [fused[..., 8 + 64 * i : 8 + 64 * (i + 1)].transpose(1, 2) for i in range(3)]
    for view, x in zip(views, (q, k, v), strict=True):
        view.copy_(x)
    config = configured("bf16", causal=causal)
    out, _ = check(config, *views, device)
    assert torch.equal(out, run(config, q, k, v, device)[0])


def test_keys_of_one_token_shared_by_all(device):
    """Strides of zero."""
    q, k, v = random_qkv("bf16", (1, 4, 40, 64), (1, 1, 1, 64))
    check(configured("bf16"), q, k.expand(1, 2, 140, 64), v.expand(1, 2, 140, 64), device)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_key_lengths(device, causal, head_dim):
    """What a sequence does not use may be NaN, within its last tile and beyond; lengths at a tile's end, and none."""
    lengths = [300, 130, 256, 1, 0, 299, 129]
    shapes = (len(lengths), 2, 90, head_dim), (len(lengths), 1, 300, head_dim)
    q, k, v = random_qkv("fp16", *shapes)
    for b, length in enumerate(lengths):
        k[b, :, length:], v[b, :, length:] = math.nan, math.nan
    out, lse = check(configured(head_dim=head_dim, causal=causal, varlen_k=True), q, k, v, device, lengths)
    assert out.isfinite().all() and (out[4] == 0).all() and (lse[4] == -math.inf).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_stays_in_its_row_and_channel(device, poison):
    q, k, v = random_qkv("fp16", (1, 2, 70, 64), (1, 2, 190, 64))
    q[0, 0, 33, 5], v[0, 1, 9, 7] = poison, poison
    out, _ = run(configured(), q, k, v, device)
    assert_poison_stays(out, 33, 7)


def test_what_lies_past_the_keys_is_not_read(device):
    """NaN in memory right after the last key must not reach anything."""
    q, k, v = random_qkv("fp16", (1, 1, 40, 64), (1, 1, 256, 64))
    k[:, :, 170:], v[:, :, 170:] = math.nan, math.nan
    out, _ = check(configured(), q, k[:, :, :170], v[:, :, :170], device)
    assert out.isfinite().all()


def test_no_keys(device):
    q, k, v = random_qkv("fp16", (1, 2, 100, 64), (1, 2, 30, 64))
    out, lse = run(configured(), q, k[:, :, :0], v[:, :, :0], device)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_scores_of_any_size(device, scale):
    q, k, v = random_qkv("bf16", (1, 2, 40, 64), (1, 2, 300, 64))
    check(configured("bf16"), q * scale, k, v, device)


def test_one_key_is_returned_as_it_is(device):
    """Rows are divided by the sum of the very probabilities that multiplied V, rounded as they are."""
    q, k, v = random_qkv("bf16", (1, 1, 100, 64), (1, 1, 1, 64))
    out, _ = run(configured("bf16"), q, k, v, device)
    assert torch.equal(out, v.expand_as(out))


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_order_of_warps_does_not_matter(monkeypatch, seed, varlen):
    """Nor how late copies and MMAs finish; and nothing reads what nobody wrote."""
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    cpu = torch.device("cpu")
    q, k, v = random_qkv("fp16", (1, 1, 230, 72), (1, 1, 500, 72))
    config = configured(head_dim=72, causal=True, warpgroups=3, stages=2, varlen_k=varlen)
    arguments = (config, q, k, v, cpu, [410] if varlen else None)
    with emulator.settings(uninitialized_shared="poison", races=True):
        plain = run(*arguments)
        with emulator.settings(seed=seed):
            again = run(*arguments)
    assert torch.equal(plain[0], again[0]) and torch.equal(plain[1], again[1])
