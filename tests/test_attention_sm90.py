"""The attention kernels of sm_90a by themselves, on random quantised operands, against their simulator."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cute_attn import reference
from cute_attn.commands.check import LSE_TOLERANCE
from cute_attn.kernels.attention_sm90 import AttentionSm90, AttentionSm90Config
from cute_attn.recipe import recipes
from cute_attn.tile_images import pack_tile_images, unpack_tile_images

from .attention_operands import (
    Operands,
    assert_only_nan_row,
    assert_rows_without_keys,
    assert_same_in_any_order,
    run,
    simulate_rows,
)
from .conftest import assert_lse_close, assert_out_close

NAMES = ("int8_fp8", "fp8", "int8", "int8_fp16")


def configured(name: str = "int8_fp8", **changes) -> AttentionSm90Config:
    recipe = recipes()[name]
    usual = {"head_dim": 64, "has_lse": True, "stages": 2}
    return AttentionSm90Config(**(usual | {"recipe": name, "accumulate": recipe.accumulate} | changes))


def operands(config: AttentionSm90Config, smooth_v: bool = False, **problem) -> Operands:
    """Of the config's recipe; rows of ones, and scales as the config reads them."""
    recipe = recipes()[config.recipe].replace(smooth_v=config.smooth_v)
    tiles = {"tile_tokens": 128, "sum_rows": 8, "share_k_scale": not config.k_scale_per_token}
    return Operands(head_dim=config.head_dim, recipe=recipe, **tiles, **problem)


CTAS = 3
"""That run at the same time, so that a CTA has several blocks of rows, and CTAs different numbers of them."""


def work_sharing(config: AttentionSm90Config, device: torch.device) -> tuple[torch.Tensor | None, int]:
    """The arguments that the kernel takes besides those of AttentionSm80."""
    draws = AttentionSm90(config).draws
    return torch.zeros(1, dtype=torch.int32, device=device) if draws else None, CTAS


def launch(o: Operands, config: AttentionSm90Config, device: torch.device, out: torch.Tensor | None = None):
    others = work_sharing(config, device)
    results = run(o, config, device, out, AttentionSm90, "sm_90a", others)
    assert others[0] is None or others[0].item() == 0  # as it was, for the next launch
    return results


def check(
    o: Operands, config: AttentionSm90Config, device: torch.device, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel, into ``out`` if given, holds it to the simulator, returns what it gave.

    Where K's and Q's scales meet in one factor, a score may be rounded otherwise than the simulator's, and with it a P.
    """
    out, lse = launch(o, config, device, out)
    expected, expected_lse = simulate_rows(o, config.causal, out.dtype, warp_rows=16, cta_rows=64)
    assert_out_close(out, expected, o.recipe)
    if config.k_scale_per_token:
        assert_lse_close(lse.to(device), expected_lse, o.recipe)
    else:
        tolerance = {"rtol": 1e-5, "atol": LSE_TOLERANCE[o.recipe.pv_format]}
        torch.testing.assert_close(lse, expected_lse, equal_nan=True, **tolerance)
    return out, lse


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("head_dim", "k_scale_per_token"),
    [(64, True), (128, False), pytest.param(64, False, marks=SLOW), pytest.param(128, True, marks=SLOW)],
)
@pytest.mark.parametrize(
    ("seq_q", "seq_k", "causal"), [(1, 1, False), (200, 333, True), (193, 256, False), (65, 129, True)]
)
def test_recipes(device, name, head_dim, k_scale_per_token, seq_q, seq_k, causal):
    """Ragged ends, tiles that need a mask and those that do not, and warpgroups without rows."""
    config = configured(name, head_dim=head_dim, causal=causal, k_scale_per_token=k_scale_per_token)
    check(operands(config, heads=3, kv_heads=1, seq_q=seq_q, seq_k=seq_k, seed=seq_k), config, device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [40, 256, *(pytest.param(d, marks=SLOW) for d in (16, 72, 96, 160, 224))])
def test_head_dims(device, name, head_dim):
    """Padded dims and channels, V in one part and in several; the memory after a row of the output is left alone."""
    stages = 1 if (name, head_dim) == ("int8_fp16", 256) else 2
    config = configured(name, head_dim=head_dim, causal=True, warpgroups=2, stages=stages)
    o = operands(config, heads=2, kv_heads=1, seq_q=70, seq_k=300, seed=head_dim)
    frame = torch.full((1, 2, 70, head_dim + 24), 7.0, dtype=torch.float16, device=device)
    check(o, config, device, frame[..., :head_dim])
    assert (frame[..., head_dim:] == 7.0).all()


@pytest.mark.parametrize("warpgroups", [1, 2, 3])
@pytest.mark.parametrize(("stages", "causal"), [(1, True), (3, False)])
def test_tile_configs(device, warpgroups, stages, causal):
    """More tiles than stages, and rows for which some of the tiles that their CTA brings are of no use."""
    config = configured(warpgroups=warpgroups, stages=stages, causal=causal)
    check(operands(config, seq_q=400, seq_k=900), config, device)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 3), (5, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_batches_heads_and_mean_of_values(device, name, heads, kv_heads):
    config = configured(name, smooth_v=True, k_scale_per_token=name == "fp8")
    check(operands(config, batch=2, heads=heads, kv_heads=kv_heads, seq_q=70, seq_k=150), config, device)


@pytest.mark.parametrize(("name", "causal"), [("int8_fp8", True), ("int8", False)])
def test_key_lengths(device, name, causal):
    lengths = [0, 1, 128, 129, 300, 10_000, -5]
    config = configured(name, causal=causal, varlen_k=True)
    check(operands(config, batch=7, seq_q=100, seq_k=300, key_lengths=lengths), config, device)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_warps_does_not_matter(monkeypatch, name):
    config = configured(name, causal=True, stages=2)
    o = operands(config, seq_q=250, seq_k=700)
    assert_same_in_any_order(monkeypatch, lambda device: launch(o, config, device), range(3))


@pytest.mark.parametrize(("name", "align"), [("int8_fp8", 2), ("int8", 4), ("int8_fp16", 16)])
def test_strided_bfloat16_output(device, name, align):
    """The elements between the rows are left alone."""
    config = configured(name, head_dim=72, out_dtype="bfloat16", out_align=align)
    o, gap = operands(config, batch=2, heads=2, kv_heads=1, seq_q=70, seq_k=90), align // 2
    frame = torch.full((2, 70, 2, 72 + gap), 7.0, dtype=torch.bfloat16, device=device)
    check(o, config, device, frame[..., :72].transpose(1, 2))
    assert (frame[..., 72:] == 7.0).all()


@pytest.mark.parametrize("name", ["int8_fp8", "int8"])
def test_zero_keys(device, name):
    config = configured(name)
    o = operands(config, seq_q=40, seq_k=1)
    o.seq_k, o.image = 0, o.image[:, :, :0]
    out, lse = launch(o, config, device)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("name", ["int8_fp8", "int8"])
def test_causal_rows_without_keys(device, name):
    config = configured(name, causal=True)
    assert_rows_without_keys(*check(operands(config, seq_q=200, seq_k=70), config, device), 130)


@pytest.mark.parametrize("name", ["q_scale", "q_bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_alone(device, name, value):
    config = configured()
    o = operands(config, seq_q=100, seq_k=200)
    getattr(o, name)[0, 0, 33] = value
    assert_only_nan_row(*check(o, config, device), 33)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k_scale", [1e-6, 1e-2, 1.0])
def test_scores_of_any_size(device, name, k_scale):
    """From a flat softmax to one in which a single key counts, scores of a million."""
    config = configured(name)
    check(operands(config, seq_q=40, seq_k=300, k_scale=k_scale), config, device)


@pytest.mark.parametrize("name", ["int8_fp8", "fp8"])
def test_exponentials_on_the_fma_pipe(device, name):
    """Each is within 0.18 %, of which next to E4M3's own rounding of P, 2.65 % in root mean square, nothing is left."""
    errors = []
    for eighths in (0, 2, 8):
        config = configured(name, causal=True, fma_eighths=eighths)
        o = operands(config, heads=2, kv_heads=1, seq_q=150, seq_k=700, k_scale=1e-4)
        out, lse = launch(o, config, device)
        k, k_scale, v = unpack_tile_images(o.image, 64, 700, "e4m3", o.recipe.qk_format, 128, 8)
        q, k = o.q.double() * o.q_scale[..., None], k.double() * k_scale[..., None]
        expected, expected_lse = reference.attention(q, k, v.double() * o.v_scale[:, :, None], causal=True)
        errors.append(reference.errors(out.double(), expected).rel_l2)
        torch.testing.assert_close(lse.double(), expected_lse + o.softmax_scale * o.q_bias, rtol=0, atol=0.01)
    assert max(errors[1:]) <= 1.02 * errors[0] <= 0.03


def test_lse_can_be_left_out(device):
    config = configured()
    o = operands(config, seq_q=40, seq_k=100)
    assert torch.equal(launch(o, replace(config, has_lse=False), device)[0], launch(o, config, device)[0])


def test_more_heads_than_fit_in_one_group(device):
    """Heads are started in groups whose tiles fit in L2; a last group that is not full must not run past the end."""
    config = configured(causal=True, warpgroups=1)
    o = operands(config, heads=5, kv_heads=5, seq_q=70, seq_k=130)
    check(o, replace(config, l2_bytes=2 * o.image[0, 0].numel()), device)


@pytest.mark.slow
def test_row_sums_are_halved_before_the_output_overflows(device):
    """147456 keys of equal weight and V = 127: without the forced shift the output passes 2^31 by 11 %."""
    config = configured("int8", head_dim=32, warpgroups=1)
    o = operands(config, seq_q=20, seq_k=128)
    o.q.zero_()
    keys = torch.ones(1, 1, 128, 32, dtype=torch.int8)
    tile = pack_tile_images(keys, torch.full((1, 1, 128), 2.0**-8), 127 * keys, tokens=128, sum_rows=8)
    o.image, o.seq_k = tile.expand(1, 1, 1152, -1).contiguous(), 128 * 1152
    out, _ = launch(o, config, device)
    expected = 127 * o.v_scale[:, :, None].expand(1, 1, 20, 32)
    torch.testing.assert_close(out.float(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 20}, "head_dim=20 is not a multiple of 8 from 16 to 256"),
        ({"recipe": "int4_int8"}, "recipe='int4_int8' is not one of int8_fp8, fp8, int8, int8_fp16"),
        (
            {"accumulate": "float16+float32"},
            "accumulate='float16\\+float32' is not float32\\+float32, which recipe='int8_fp8'",
        ),
        ({"warpgroups": 4}, "warpgroups=4 is not one of 1, 2, 3"),
        ({"head_dim": 160, "stages": 1}, "warpgroups=3 leave 160 registers a thread, too few for head_dim=160"),
        ({"head_dim": 256, "warpgroups": 2, "stages": 4}, "stages=4 need .* bytes of shared memory .*: use fewer"),
    ],
)
def test_refused_configs(change, reason):
    config = configured(**{"warpgroups": 3, **change})
    with pytest.raises(ValueError, match=reason):
        AttentionSm90(config)
