"""Packed query heads of the attention kernels of sm_90a: rows of a CTA are the heads that share K and V, by token."""

from __future__ import annotations

import math

import pytest
import torch

import cute_attn
from cute_attn import Problem, TileConfig, WarpgroupTileConfig, dispatch, emulator, recipes
from cute_attn.arch import ARCHS

from . import test_attention_sm90_16bit as floats
from .test_attention import assert_close, random_qkv
from .test_attention_sm90 import check, configured, launch, operands
from .test_unquantised import random_qkv as random_floats

PACKED = WarpgroupTileConfig(pack_gqa=True)


@pytest.mark.parametrize("group", [3, 8, *(pytest.param(group, marks=pytest.mark.slow) for group in (1, 2, 7))])
@pytest.mark.parametrize(("seq_q", "seq_k", "causal"), [(1, 1, False), (5, 130, True), (70, 333, True)])
def test_groups(device, group, seq_q, seq_k, causal):
    """Those that divide the 8 rows between a lane's two and those that do not; warpgroups that begin within a token,
    and some that have no rows."""
    config = configured(causal=causal, pack_gqa=True)
    check(operands(config, batch=2, heads=2 * group, kv_heads=2, seq_q=seq_q, seq_k=seq_k, seed=group), config, device)


@pytest.mark.parametrize(
    ("name", "head_dim", "causal"),
    [("int8_fp8", 128, True), ("fp8", 40, False), ("int8", 128, True), ("int8_fp16", 72, True)],
)
def test_recipes(device, name, head_dim, causal):
    config = configured(name, head_dim=head_dim, causal=causal, smooth_v=True, pack_gqa=True)
    check(operands(config, heads=6, kv_heads=2, seq_q=45, seq_k=300), config, device)


@pytest.mark.parametrize("recipe", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("group", "seq_q", "seq_k"),
    [(3, 50, 170), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((8, 1, 200), (2, 100, 60)))],
)
def test_16_bit_recipes(device, recipe, group, seq_q, seq_k):
    q, k, v = random_floats(recipe, (2, 2 * group, seq_q, 64), (2, 2, seq_k, 64), seed=group)
    floats.check(floats.configured(recipe, causal=True, pack_gqa=True), q, k, v, device)


def test_causal_rows_without_keys(device):
    """The boundary lies within a warpgroup: among its rows are some of tokens before the first key."""
    config = configured(causal=True, pack_gqa=True)
    out, lse = check(operands(config, heads=3, kv_heads=1, seq_q=100, seq_k=90), config, device)
    assert (out[:, :, :10] == 0).all()
    assert (lse[:, :, :10] == -math.inf).all()
    assert lse[:, :, 10:].isfinite().all()


def test_far_causal_boundary(device):
    """Limits are counted from the tile that they lie in: how many tiles come before it does not matter."""
    config = configured(head_dim=16, causal=True, warpgroups=1, pack_gqa=True)
    check(operands(config, heads=3, kv_heads=1, seq_q=10, seq_k=17_000), config, device)


@pytest.mark.parametrize("causal", [False, True])
def test_key_lengths(device, causal):
    lengths = [0, 1, 128, 129, 300, 10_000, -5]
    config = configured("int8", causal=causal, varlen_k=True, pack_gqa=True)
    o = operands(config, batch=7, heads=6, kv_heads=2, seq_q=30, seq_k=300, key_lengths=lengths)
    check(o, config, device)


def test_strided_bfloat16_output(device):
    """The elements between the rows are left alone."""
    config = configured(head_dim=72, out_dtype="bfloat16", out_align=4, pack_gqa=True)
    o = operands(config, batch=2, heads=6, kv_heads=2, seq_q=50, seq_k=90)
    frame = torch.full((2, 50, 6, 72 + 2), 7.0, dtype=torch.bfloat16, device=device)
    check(o, config, device, frame[..., :72].transpose(1, 2))
    assert (frame[..., 72:] == 7.0).all()


def test_strided_queries(device):
    """Slices of a fused projection [B, S, H, D + 8], whose heads lie closer than its tokens."""
    q, k, v = random_floats("bf16", (2, 6, 30, 64), (2, 2, 50, 64))
    frame = torch.full((2, 30, 6, 72), math.nan, dtype=torch.bfloat16, device=device)
    view = frame[..., :64].transpose(1, 2)
    view.copy_(q)
    config = floats.configured("bf16", causal=True, pack_gqa=True)
    out, _ = floats.check(config, view, k, v, device)
    assert torch.equal(out, floats.run(config, q, k, v, device)[0])


@pytest.mark.parametrize("name", ["q_scale", "q_bias"])
def test_a_row_that_is_not_finite_stays_alone(device, name):
    config = configured(causal=True, pack_gqa=True)
    o = operands(config, heads=3, kv_heads=1, seq_q=40, seq_k=200)
    getattr(o, name)[0, 1, 33] = math.nan
    out, lse = check(o, config, device)
    bad = torch.zeros(3, 40, dtype=torch.bool)
    bad[1, 33] = True
    assert torch.equal(out.isnan().any(-1)[0], bad)
    assert torch.equal(lse.isnan()[0], bad)


@pytest.mark.parametrize("name", ["int8_fp8", "fp16"])
def test_order_of_warps_does_not_matter(monkeypatch, name):
    """Nor how late copies and MMAs finish; and nothing reads what nobody wrote."""
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    cpu = torch.device("cpu")
    if name == "fp16":
        inputs = random_floats("fp16", (1, 3, 70, 64), (1, 1, 400, 64))
        of_floats = floats.configured(causal=True, pack_gqa=True)
    else:
        config = configured(causal=True, pack_gqa=True)
        o = operands(config, heads=3, kv_heads=1, seq_q=70, seq_k=400)
    with emulator.settings(uninitialized_shared="poison", races=True):
        results = []
        for seed in (None, 1, 2):
            with emulator.settings(seed=seed):
                results.append(floats.run(of_floats, *inputs, cpu) if name == "fp16" else launch(o, config, cpu))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("name", ["int8_fp8", "int8", "bf16"])
def test_attention_packs_few_queries(monkeypatch, name):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    q, k, v = random_qkv((2, 16, 1, 64), (2, 2, 200, 64), dtype)
    problem = Problem(2, 16, 2, 1, 200, 64, str(dtype)[6:])
    assert dispatch.default_config(recipes()[name], problem, ARCHS["sm_90a"]).pack_gqa
    out, lse = cute_attn.attention(q, k, v, recipe=name, arch="sm_90a", return_lse=True)
    assert_close(out, lse, q, k, v, recipe=name, arch="sm_90a")


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_a_tile_config_packs(monkeypatch, layout):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    q, k, v = random_qkv((2, 6, 70, 64), (2, 2, 150, 64))
    options = {"recipe": "int8_fp8", "causal": True, "arch": "sm_90a", "config": PACKED}
    given = [x if layout == "bhsd" else x.transpose(1, 2).contiguous() for x in (q, k, v)]
    lengths = torch.tensor([150, 40], dtype=torch.int32)
    out, lse = cute_attn.attention(*given, layout=layout, return_lse=True, key_lengths=lengths, **options)
    out = out if layout == "bhsd" else out.transpose(1, 2)
    for b, n in enumerate(lengths.tolist()):
        one, of_one = slice(b, b + 1), [x[b : b + 1, :, :n] for x in (k, v)]
        assert_close(out[one], lse[one], q[one], *of_one, **options)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "seq_q", "packs", "warpgroups"),
    [
        (32, 4, 1, True, 1),  # 8 of 192 rows, instead of 1
        (32, 4, 16, True, 2),  # 128 rows
        (32, 8, 64, True, 3),  # 256 of 384, instead of 64 of 192
        (32, 8, 190, False, 3),  # nothing to gain
        (32, 8, 200, True, 3),  # 800 of 960, instead of 200 of 384
        (32, 8, 4096, False, 3),
        (32, 32, 1, False, 1),
    ],
)
def test_when_heads_are_packed(heads, kv_heads, seq_q, packs, warpgroups):
    problem = Problem(1, heads, kv_heads, seq_q, 4096, 128, "float16")
    tile = dispatch.default_config(recipes()["int8_fp8"], problem, ARCHS["sm_90a"])
    assert (tile.pack_gqa, tile.warpgroups) == (packs, warpgroups)


def test_refusals():
    recipe = recipes()["int8_fp8"]
    problem = Problem(1, 8, 1, 65535 * PACKED.rows + 1, 4096, 128, "float16")
    assert dispatch.supports(recipe, "sm_90a", problem, PACKED)
    warp_tile = TileConfig()
    reason = dispatch.supports(recipes()["int8"], "sm_90a", problem, warp_tile).reason
    most = 65535 * warp_tile.rows
    assert reason == f"seq_q={problem.seq_q} has no kernel, a CUDA grid reaches {most}; split the call along that axis"
    with pytest.raises(ValueError, match="config.pack_gqa=1; use True or False"):
        WarpgroupTileConfig(pack_gqa=1)
