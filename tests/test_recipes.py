"""Recipes and what their fields change, and key lengths, through the public calls."""

from __future__ import annotations

import math

import pytest
import torch

import cute_attn
from cute_attn import Problem, Recipe, arguments, dispatch, recipes, reference, simulator, supports
from cute_attn.recipe import RECIPES

from .conftest import assert_lse_close, assert_out_close

INTEGER = ("int8", "int8_fp16", "int4_int8", "int4_fp16")


def random_qkv(seq_q: int, seq_k: int, head_dim: int, *, batch: int = 1, heads: int = 3, kv_heads: int = 1, dtype=None):
    """N(0, 1) with means in some channels of q, k and v."""
    g = torch.Generator().manual_seed(head_dim + seq_q)
    shapes = (batch, heads, seq_q, head_dim), (batch, kv_heads, seq_k, head_dim), (batch, kv_heads, seq_k, head_dim)
    q, k, v = (torch.randn(shape, generator=g) for shape in shapes)
    for x, mean in ((q, 2.0), (k, 5.0), (v, 3.0)):
        x[..., ::5] += mean
    return tuple(x.to(dtype or torch.float16) for x in (q, k, v))


def check(q, k, v, device, recipe: Recipe, *, key_lengths=None, causal=True) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE of `attention` equal the simulator's within the recipe's tolerance; returns them."""
    batch, heads, seq_q, head_dim = q.shape
    problem = Problem(batch, heads, k.shape[1], seq_q, k.shape[2], head_dim, str(q.dtype)[6:], causal)
    tile = dispatch.default_config(recipe, problem, arguments.resolve_arch(None, torch.empty(0, device=device)))
    lengths = None if key_lengths is None else torch.tensor(key_lengths, dtype=torch.int32)
    options = {"recipe": recipe, "causal": causal}
    out, lse = cute_attn.attention(
        *(x.to(device) for x in (q, k, v)),
        **options,
        key_lengths=None if lengths is None else lengths.to(device),
        return_lse=True,
    )
    simulated, simulated_lse = simulator.attention(
        q, k, v, **options, key_lengths=lengths, warp_rows=16 * tile.m_tiles, cta_rows=tile.rows
    )
    assert_out_close(out, simulated, recipe)
    assert_lse_close(lse, simulated_lse, recipe)
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize(
    ("name", "changes", "head_dim", "largest_error"),
    [
        ("int8", {"qk_scale": "thread"}, 64, 0.03),
        ("int8", {"qk_scale": "warp", "smooth_v": True}, 40, 0.03),
        ("int8", {"qk_scale": "block", "smooth_q": True, "v_scale": "tensor"}, 72, 0.03),
        ("int8_fp16", {"qk_scale": "thread", "smooth_v": True}, 96, 0.01),
        ("int8_fp16", {"accumulate": "float16", "smooth_v": True, "smooth_q": True}, 64, 0.01),
        ("int4_int8", {}, 64, 0.15),
        ("int4_int8", {"qk_scale": "thread", "smooth_v": True}, 16, 0.15),
        ("int4_fp16", {}, 128, 0.15),
        ("int4_fp16", {"accumulate": "float16+float32", "qk_scale": "block"}, 64, 0.3),
        ("int4_fp16", {"smooth_q": False}, 200, 0.3),
    ],
)
def test_fields(device, name, changes, head_dim, largest_error):
    """Kernels against the simulator; against float64, what the recipe may cost on these inputs."""
    recipe = recipes()[name].replace(**changes)
    q, k, v = random_qkv(150, 201, head_dim)
    out, lse = check(q, k, v, device, recipe)
    exact, exact_lse = reference.attention(q, k, v, causal=True)
    assert reference.errors(out, exact).rel_l2 < largest_error
    assert (lse - exact_lse).abs().mean() < 0.2


@pytest.mark.parametrize("name", INTEGER)
def test_bfloat16(device, name):
    check(*random_qkv(70, 100, 64, dtype=torch.bfloat16), device, recipes()[name])


@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("seq_q", [1, 257])
def test_one_query_and_several_blocks(device, name, seq_q):
    check(*random_qkv(seq_q, 70, 64, heads=2), device, recipes()[name], causal=False)


@pytest.mark.parametrize("name", [*INTEGER, "fp16"])
def test_a_sequence_is_computed_as_if_it_were_alone(device, name):
    """Bit for bit, means and scales included, and whatever lies beyond its end."""
    recipe, lengths = recipes()[name].replace(), [130, 0, 65, 1]
    q, k, v = (x.to(device) for x in random_qkv(70, 130, 64, batch=4))
    for b, length in enumerate(lengths):
        k[b, :, length:] = v[b, :, length:] = math.nan
    if recipe.quantises:
        recipe = recipe.replace(smooth_v=True)
    key_lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    out, lse = cute_attn.attention(q, k, v, recipe=recipe, causal=True, key_lengths=key_lengths, return_lse=True)
    for b, length in enumerate(lengths):
        alone = (q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length])
        expected, expected_lse = cute_attn.attention(*alone, recipe=recipe, causal=True, return_lse=True)
        assert torch.equal(out[b : b + 1], expected)
        assert torch.equal(lse[b : b + 1], expected_lse)


@pytest.mark.parametrize("name", INTEGER)
def test_quantised_once(device, name):
    """`quantize` and `attention` apart give the same bits as together, and `to_plain` what was kept."""
    q, k, v = random_qkv(150, 100, 40, batch=2)
    recipe = recipes()[name].replace(smooth_v=True)
    lengths = torch.tensor([100, 60], dtype=torch.int32, device=device)
    given = [x.to(device) for x in (q, k, v)]
    quantised = cute_attn.quantize(*given, recipe=recipe, key_lengths=lengths)
    together = cute_attn.attention(*given, recipe=recipe, key_lengths=lengths)
    assert torch.equal(cute_attn.attention(*quantised), together)
    half_step = 0.5 / (7 if recipe.qk_format == "int4" else 127) * 1.01
    group_amax = q.float().abs().amax((2, 3), keepdim=True)
    assert ((quantised.q.to_plain().cpu() - q).abs() <= 2 * half_step * group_amax).all()
    keys, values = (x.cpu() for x in quantised.kv.to_plain())
    for b, length in enumerate(lengths.tolist()):
        kept, exact = keys[b, :, :length], k[b, :, :length].float()
        assert ((kept - exact).abs() <= 2 * half_step * exact.abs().amax()).all()
        assert reference.errors(values[b, :, :length], v[b, :, :length]).rel_l2 < 0.01


def test_quantised_keys_keep_their_lengths(device):
    """Growing the caller's lengths, as decoding does, must not show tokens that were not there."""
    q, k, v = (x.to(device) for x in random_qkv(20, 70, 32))
    lengths = torch.tensor([30], dtype=torch.int32, device=device)
    quantised = cute_attn.quantize(q, k, v, key_lengths=lengths)
    expected = cute_attn.attention(*quantised)
    lengths.fill_(70)
    assert torch.equal(cute_attn.attention(*quantised), expected)


def test_rows_without_keys_are_zeros_whatever_v_holds(device):
    for name in ("int8", "int8_fp16", "fp16"):
        q, k, v = (x.to(device) for x in random_qkv(70, 10, 32))
        v[..., 3] = math.nan
        out = cute_attn.attention(q, k, v, recipe=name, causal=True)
        assert (out[:, :, :60] == 0).all()
        assert out[:, :, 60:, 3].isnan().all()


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_an_inf_in_v_is_nan_in_its_channel(device, poison):
    q, k, v = (x.to(device) for x in random_qkv(20, 70, 32))
    v[0, 0, 5, 7] = poison
    for name in INTEGER:
        bad = cute_attn.attention(q, k, v, recipe=name).isnan()
        assert bad[..., 7].all()
        assert bad.sum() == 3 * 20
    shared = recipes()["int8"].replace(v_scale="tensor")
    assert cute_attn.attention(q, k, v, recipe=shared).isnan().all()


def test_millions_of_keys_of_which_few_count(device):
    """Sizes in bytes that are zero, or negative, in 32 bits."""
    k = torch.zeros(1, 1, 1, 256, dtype=torch.bfloat16, device=device).expand(1, 1, 1 << 22, 256)
    q = torch.zeros(1, 1, 4, 256, dtype=torch.bfloat16, device=device)
    lengths = torch.tensor([64], dtype=torch.int32, device=device)
    assert (cute_attn.attention(q, k, k, recipe="bf16", key_lengths=lengths) == 0).all()


def test_more_heads_than_a_grid_is_deep(device):
    """65535 groups of heads at most, also where the keys of one would fill the L2 cache."""
    q = torch.zeros(1025, 64, 1, 16, dtype=torch.float16, device=device)
    k = torch.ones(1, 1, 1, 16, dtype=torch.float16, device=device).expand(1025, 64, 1 << 17, 16)
    lengths = torch.ones(1025, dtype=torch.int32, device=device)
    out = cute_attn.attention(q, k, k, recipe="fp16", key_lengths=lengths, config=cute_attn.TileConfig(1, 1))
    assert (out == 1).all()


def test_strided_key_lengths(device):
    q, k, v = (x.to(device) for x in random_qkv(20, 70, 32, batch=2))
    every_other = torch.tensor([70, -1, 33, -1], dtype=torch.int32, device=device)[::2]
    expected = cute_attn.attention(q, k, v, key_lengths=every_other.clone())
    assert torch.equal(cute_attn.attention(q, k, v, key_lengths=every_other), expected)


def test_presets_are_what_their_names_say():
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        if recipe.quantises:
            qk, pv = name.split("_") if "_" in name else (name, name)
            formats = {"fp8": "e4m3", "fp16": "float16"}
            assert (recipe.qk_format, recipe.pv_format) == (formats.get(qk, qk), formats.get(pv, pv))
        assert recipe.smooth_q == (recipe.qk_format == "int4")


@pytest.mark.parametrize("name", ["int4_int8", "int4_fp16"])
def test_int4_is_refused_where_the_hardware_has_none(name):
    problem = Problem(1, 1, 1, 64, 64, 64, "float16")
    assert supports(name, "sm_89", problem)
    reason = supports(name, "sm_90a", problem).reason
    assert reason == f"recipe '{name}' has no kernel for sm_90a (H100, H200); it runs on sm_80, sm_86, sm_89"
