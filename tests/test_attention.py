"""`attention` and `quantize` end to end: torch tensors through compiled kernels, against simulator and float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import cute_attn
from cute_attn import Problem, TileConfig, arguments, dispatch, jit, reference, simulator
from cute_attn.recipe import as_recipe, recipes

from .conftest import assert_lse_close, assert_out_close


def random_qkv(q_shape, k_shape, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in (q_shape, k_shape, k_shape))


def simulate(q, k, v, *, causal=False, softmax_scale=None, recipe="int8", config=None, arch=None):
    """The simulator with the warps and CTAs that `attention` would use."""
    sizes = dict(zip(("batch", "heads", "seq_q", "head_dim"), q.shape, strict=True))
    problem = Problem(**sizes, kv_heads=k.shape[1], seq_k=k.shape[2], dtype=str(q.dtype)[6:], causal=causal)
    place = torch.empty(0, device="cuda" if jit.backend() == "cuda" else "cpu")
    tile = config or dispatch.default_config(as_recipe(recipe), problem, arguments.resolve_arch(arch, place))
    return simulator.attention(
        q,
        k,
        v,
        causal=causal,
        softmax_scale=softmax_scale,
        recipe=recipe,
        warp_rows=tile.warp_rows,
        pack_gqa=tile.pack_gqa,
        cta_rows=tile.rows,
        tile_tokens=tile.tile_tokens,
    )


def assert_close(out, lse, q, k, v, **options):
    """Output and LSE against the simulator (tight), and against float64 (what the recipe costs).

    Q and K in E4M3 have 4 significant bits, a relative error of 2.65 % rms each: scores err by 3.7 % of their spread.
    """
    simulated, simulated_lse = simulate(q, k, v, **options)
    recipe = as_recipe(options.get("recipe", "int8"))
    assert_out_close(out, simulated, recipe)
    assert_lse_close(lse, simulated_lse, recipe)
    exact, exact_lse = reference.attention(
        q, k, v, causal=options.get("causal", False), softmax_scale=options.get("softmax_scale")
    )
    rel_l2, of_lse = (0.08, 0.1) if recipe.qk_format == "e4m3" else (0.06, 0.05)
    assert reference.errors(out.cpu(), exact).rel_l2 < rel_l2
    torch.testing.assert_close(lse.cpu().double(), exact_lse, rtol=0, atol=of_lse)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 1), (1, 200), (63, 65), (130, 130), (200, 77)])
def test_shapes(device, head_dim, causal, seq_q, seq_k):
    q, k, v = random_qkv((2, 3, seq_q, head_dim), (2, 1, seq_k, head_dim), seed=seq_q)
    out, lse = cute_attn.attention(q.to(device), k.to(device), v.to(device), causal=causal, return_lse=True)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert lse.shape == q.shape[:3]
    assert lse.dtype == torch.float32
    assert_close(out, lse, q, k, v, causal=causal)


@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_90a", "sm_120a"])
def test_archs_on_the_emulator(arch, monkeypatch):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    q, k, v = random_qkv((1, 4, 70, 64), (1, 2, 100, 64))
    out, lse = cute_attn.attention(q, k, v, causal=True, return_lse=True, arch=arch)
    assert_close(out, lse, q, k, v, causal=True, arch=arch)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_bfloat16_and_layouts(device, layout):
    q, k, v = random_qkv((1, 4, 70, 64), (1, 2, 100, 64), torch.bfloat16)
    given_ = [(x if layout == "bhsd" else x.transpose(1, 2).contiguous()).to(device) for x in (q, k, v)]
    out, lse = cute_attn.attention(*given_, layout=layout, return_lse=True)
    assert out.shape == given_[0].shape
    assert_close(out if layout == "bhsd" else out.transpose(1, 2), lse, q, k, v)


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
def test_strided_inputs_and_output(device, offset):
    """Slices of a fused projection, at every alignment; inputs keep their values, memory around ``out`` its own."""
    q, k, v = random_qkv((2, 2, 50, 64), (2, 2, 50, 64))
    fused = torch.full((2, 50, 2, 3 * 64 + offset), 7.0, dtype=torch.float16, device=device)
    views = [fused[..., offset + 64 * i : offset + 64 * (i + 1)].transpose(1, 2) for i in range(3)]
    for view, x in zip(views, (q, k, v), strict=True):
        view.copy_(x)
    before = fused.clone()
    frame = torch.full((2, 50, 2, 64 + offset), 7.0, dtype=torch.float16, device=device)
    out = frame[..., offset:].transpose(1, 2)
    result, lse = cute_attn.attention(*views, out=out, return_lse=True)
    assert result is out
    assert torch.equal(fused, before)
    assert (frame[..., :offset] == 7.0).all()
    assert_close(out, lse, q, k, v)


def test_without_grad_inputs_may_require_it(device):
    q, k, v = (x.to(device) for x in random_qkv((1, 2, 40, 64), (1, 2, 40, 64)))
    expected = cute_attn.attention(q, k, v)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = torch.empty_like(q, requires_grad=True)
            assert cute_attn.attention(*leaves, out=out) is out
            assert torch.equal(out, expected)


@pytest.mark.parametrize("recipe", ["int8", "fp16"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_out_may_be_an_input(device, index, recipe):
    """With more CTAs than run at a time: the first ones' output must not be the last ones' input."""
    inputs = [x.to(device) for x in random_qkv((1, 200, 70, 16), (1, 200, 70, 16))]
    options = {"recipe": recipe, "config": TileConfig(warps=1, m_tiles=1)}
    expected = cute_attn.attention(*inputs, **options)
    assert torch.equal(cute_attn.attention(*inputs, **options, out=inputs[index]), expected)


def test_out_may_overlap_q_elsewhere(device):
    memory = random_qkv((1, 1, 1100, 16), (1, 1, 1000, 16))[0].to(device)
    k, v = (x.to(device) for x in random_qkv((1, 1, 1, 16), (1, 1, 70, 16))[1:])
    q, out = memory[:, :, :1000], memory[:, :, 100:]
    options = {"recipe": "fp16", "config": TileConfig(warps=1, m_tiles=1)}
    expected = cute_attn.attention(q, k, v, **options)
    assert torch.equal(cute_attn.attention(q, k, v, **options, out=out), expected)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_token_whose_stride_is_odd(device, index):
    """The stride of an axis of length one says nothing, but kernels compute the address of the next token with it."""
    inputs = [x.to(device) for x in random_qkv((1, 8, 1, 32), (1, 8, 1, 32))]
    expected = cute_attn.attention(*inputs, recipe="fp16")
    odd = torch.empty_strided((1, 8, 1, 32), (8 * 32, 32, 36, 1), dtype=torch.float16, device=device)
    inputs[index] = odd.copy_(inputs[index])
    assert torch.equal(cute_attn.attention(*inputs, recipe="fp16"), expected)


def test_out_whose_axes_interlock(device):
    """No axis steps over all that the smaller ones reach, and yet no two elements share memory."""
    q, k, v = (x.to(device) for x in random_qkv((1, 2, 3, 64), (1, 2, 70, 64)))
    out = torch.full((512,), 7.0, dtype=torch.float16, device=device).as_strided(q.shape, (0, 3 * 64, 2 * 64, 1))
    cute_attn.attention(q, k, v, out=out)
    assert torch.equal(out, cute_attn.attention(q, k, v))


def test_empty_batch(device):
    q, k, v = (x.to(device) for x in random_qkv((0, 2, 5, 64), (0, 2, 7, 64)))
    out, lse = cute_attn.attention(q, k, v, return_lse=True)
    exact, exact_lse = reference.attention(q, k, v)
    assert out.shape == exact.shape == (0, 2, 5, 64)
    assert lse.shape == exact_lse.shape == (0, 2, 5)


def test_autograd_sees_that_out_was_written(device):
    q, k, v = (x.to(device) for x in random_qkv((1, 2, 40, 64), (1, 2, 40, 64)))
    out = torch.empty_like(q)
    version = out._version
    cute_attn.attention(q, k, v, out=out)
    assert out._version > version


def test_numpy_in_numpy_out(monkeypatch):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    q, k, v = random_qkv((1, 2, 40, 64), (1, 2, 40, 64))
    out, lse = cute_attn.attention(q.numpy(), k.numpy(), v.numpy(), return_lse=True)
    assert isinstance(out, np.ndarray)
    assert isinstance(lse, np.ndarray)
    assert_close(torch.from_numpy(out), torch.from_numpy(lse), q, k, v)


def test_quantised_inputs_are_the_same_call(device):
    q, k, v = (x.to(device) for x in random_qkv((1, 4, 70, 64), (1, 2, 130, 64)))
    plain = cute_attn.attention(q, k, v, causal=True, return_lse=True)
    quantised = cute_attn.quantize(q, k, v)
    for inputs in (quantised, (q, quantised.kv)):
        again = cute_attn.attention(*inputs, causal=True, return_lse=True)
        assert torch.equal(plain[0], again[0])
        assert torch.equal(plain[1], again[1])


def test_quantised_inputs_are_checked(monkeypatch):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    q, k, v = random_qkv((1, 2, 40, 64), (1, 2, 40, 64))
    quantised, other = cute_attn.quantize(q, k, v), cute_attn.quantize(q, v, k)
    with pytest.raises(ValueError, match="q was quantised for other keys than k"):
        cute_attn.attention(quantised.q, other.kv)
    with pytest.raises(ValueError, match="k was quantised as .*; quantise it again"):
        cute_attn.attention(q, quantised.kv, recipe=cute_attn.recipes()["int8"].replace(v_scale="tensor"))
    with pytest.raises(TypeError, match="leave v out"):
        cute_attn.attention(q, quantised.kv, v)
    with pytest.raises(TypeError, match="pass the QuantizedKeyValue as k"):
        cute_attn.attention(quantised.q, k, v)
    with pytest.raises(ValueError, match=r"q has shape \(1, 3, 40, 64\) .* kv holds batch 1, 2 heads"):
        cute_attn.quantize_query(torch.zeros(1, 3, 40, 64, dtype=torch.float16), quantised.kv)


def test_to_plain_gives_back_what_was_kept(device):
    """Rounding moves an element by at most half a step of its scale (K's scale is rounded up, so a little less)."""
    q, k, v = random_qkv((1, 2, 70, 64), (1, 2, 70, 64))
    quantised = cute_attn.quantize(q.to(device), k.to(device), v.to(device))
    keys, values = (x.cpu() for x in quantised.kv.to_plain())
    centred = k.float() - k.float().mean(2, keepdim=True)
    for kept, x, amax in (
        (quantised.q.to_plain().cpu(), q.float(), q.float().abs().amax(-1, keepdim=True)),
        (keys, k.float(), centred.abs().amax(-1, keepdim=True)),
        (values, v.float(), v.float().abs().amax(2, keepdim=True)),
    ):
        assert ((kept - x).abs() <= amax / 254 * 1.001).all()


def test_one_scale_for_all_of_v(device):
    recipe = cute_attn.recipes()["int8"].replace(v_scale="tensor")
    q, k, v = random_qkv((1, 2, 70, 64), (1, 2, 70, 64))
    out, lse = cute_attn.attention(q.to(device), k.to(device), v.to(device), recipe=recipe, return_lse=True)
    assert_close(out, lse, q, k, v, recipe=recipe)


@pytest.mark.parametrize("accumulate", ["float32", "float16", "float16+float32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("seq_q", "seq_k", "head_dim"), [(1, 200, 128), (130, 130, 64), (40, 77, 32)])
def test_int8_fp16(device, accumulate, dtype, seq_q, seq_k, head_dim):
    recipe = cute_attn.recipes()["int8_fp16"].replace(accumulate=accumulate)
    q, k, v = random_qkv((2, 4, seq_q, head_dim), (2, 2, seq_k, head_dim), dtype)
    v[..., 5] *= 1e4  # beyond float16 after the sum, were it not for V's scale
    given_ = [x.to(device) for x in (q, k, v)]
    out, lse = cute_attn.attention(*given_, recipe=recipe, causal=True, return_lse=True)
    assert_close(out, lse, q, k, v, recipe=recipe, causal=True)


def test_int8_fp16_keeps_the_range_of_bfloat16(device):
    q, k, v = random_qkv((1, 2, 70, 64), (1, 2, 70, 64), torch.bfloat16)
    v[:, 0], v[:, 1] = v[:, 0] * 1e35, v[:, 1] * 1e-30
    out = cute_attn.attention(*(x.to(device) for x in (q, k, v)), recipe="int8_fp16").cpu()
    exact, _ = reference.attention(q, k, v)
    for head in range(2):
        assert reference.errors(out[:, head], exact[:, head]).rel_l2 < 0.02


def test_int8_fp16_poison(device):
    q, k, v = random_qkv((1, 2, 70, 64), (1, 2, 70, 64))
    v[0, 1, 9, 7] = math.inf
    out = cute_attn.attention(*(x.to(device) for x in (q, k, v)), recipe="int8_fp16", causal=True).cpu()
    assert not out[0, 1, :, 7].isfinite().any()
    assert out[0, 1, :, :7].isfinite().all()
    assert out[0, 0].isfinite().all()


def test_one_image_serves_every_accumulator(device):
    q, k, v = (x.to(device) for x in random_qkv((1, 2, 70, 64), (1, 2, 200, 64)))
    recipe = cute_attn.recipes()["int8_fp16"]
    quantised = cute_attn.quantize(q, k, v, recipe=recipe)
    assert quantised.kv.tile.values == "float16"
    for other in (recipe, recipe.replace(accumulate="float16")):
        expected = cute_attn.attention(q, k, v, recipe=other)
        assert torch.equal(cute_attn.attention(*quantised, recipe=other), expected)
    with pytest.raises(ValueError, match="k was quantised as .*; quantise it again"):
        cute_attn.attention(*quantised, recipe="int8")


@pytest.mark.parametrize("scale", [0.0, 0.3, 5.0])
def test_softmax_scale(device, scale):
    q, k, v = random_qkv((1, 2, 70, 64), (1, 2, 70, 64))
    out, lse = cute_attn.attention(q.to(device), k.to(device), v.to(device), softmax_scale=scale, return_lse=True)
    simulated, simulated_lse = simulate(q, k, v, softmax_scale=scale)
    assert_out_close(out, simulated, recipes()["int8"])
    assert_lse_close(lse, simulated_lse, recipes()["int8"])


@pytest.mark.parametrize(
    "config", [TileConfig(warps=2), TileConfig(m_tiles=1), TileConfig(stages=3), TileConfig(warps=8)]
)
def test_tile_configs(device, config):
    q, k, v = random_qkv((1, 2, 150, 64), (1, 2, 150, 64))
    out, lse = cute_attn.attention(
        q.to(device), k.to(device), v.to(device), config=config, causal=True, return_lse=True
    )
    assert_close(out, lse, q, k, v, causal=True, config=config)


def test_no_keys_and_no_queries(device):
    q, k, v = (x.to(device) for x in random_qkv((1, 2, 5, 64), (1, 2, 0, 64)))
    out, lse = cute_attn.attention(q, k, v, return_lse=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    out, lse = cute_attn.attention(k, q, q, return_lse=True)
    assert out.shape == (1, 2, 0, 64)
    assert lse.shape == (1, 2, 0)


def test_causal_rows_that_see_no_key(device):
    q, k, v = random_qkv((1, 2, 100, 64), (1, 2, 30, 64))
    out, lse = cute_attn.attention(q.to(device), k.to(device), v.to(device), causal=True, return_lse=True)
    assert (out[:, :, :70] == 0).all()
    assert (lse[:, :, :70] == -math.inf).all()
    assert_close(out, lse, q, k, v, causal=True)


def test_nan_in_one_row_of_q_stays_there(device):
    q, k, v = random_qkv((1, 2, 100, 64), (1, 2, 100, 64))
    clean = cute_attn.attention(q.to(device), k.to(device), v.to(device)).cpu()
    for bad in (math.nan, math.inf, -math.inf):
        q[0, 1, 33, 5] = bad
        out = cute_attn.attention(q.to(device), k.to(device), v.to(device)).cpu()
        assert out[0, 1, 33].isnan().all()
        q[0, 1, 33, 5] = 0.0
        out[0, 1, 33], expected = 0.0, clean.clone()
        expected[0, 1, 33] = 0.0
        # The rows of the same warp may have rescaled at other tiles: the last bits may differ, no more.
        assert reference.errors(out, expected).rel_l2 < 1e-3


def test_nan_in_k_and_v_is_seen(device):
    q, k, v = random_qkv((1, 2, 70, 64), (1, 2, 70, 64))
    k_bad, v_bad = k.clone(), v.clone()
    k_bad[0, 0, 3, 3] = math.nan
    v_bad[0, 1, 9, 7] = math.inf
    out = cute_attn.attention(q.to(device), k_bad.to(device), v.to(device)).cpu()
    assert out[0, 0].isnan().all()
    assert out[0, 1].isfinite().all()
    out = cute_attn.attention(q.to(device), k.to(device), v_bad.to(device)).cpu()
    assert not out[0, 1, :, 7].isfinite().any()
    assert out[0, 1, :, :7].isfinite().all()
    assert out[0, 0].isfinite().all()


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_all_zero(device, which):
    q, k, v = random_qkv((1, 2, 70, 64), (1, 2, 70, 64))
    {"q": q, "k": k, "v": v}[which].zero_()
    out, lse = cute_attn.attention(q.to(device), k.to(device), v.to(device), return_lse=True)
    simulated, simulated_lse = simulate(q, k, v)
    assert_out_close(out, simulated, recipes()["int8"])
    assert_lse_close(lse, simulated_lse, recipes()["int8"])


shapes = st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 140), st.integers(1, 140))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=shapes,
    head_dim=st.sampled_from([32, 64, 128]),
    causal=st.booleans(),
    kind=st.sampled_from(["outlier channels", "constant rows", "zero V channel", "large", "tiny"]),
    seed=st.integers(0, 1 << 16),
)
@example(shape=(1, 1, 1, 1, 1), head_dim=128, causal=True, kind="large", seed=0)
def test_any_shape_and_unusual_inputs(device, shape, head_dim, causal, kind, seed):
    """Kernel equals simulator whatever is thrown at it; how near that is to float64 is the recipe's matter."""
    batch, kv_heads, group, seq_q, seq_k = shape
    q, k, v = random_qkv((batch, kv_heads * group, seq_q, head_dim), (batch, kv_heads, seq_k, head_dim), seed=seed)
    if kind == "outlier channels":
        k[..., ::7] *= 30
        k[..., 3] += 50
    elif kind == "constant rows":
        k[:], q[:, :, ::2] = k[:, :, :1].clone(), 1.0
    elif kind == "zero V channel":
        v[..., seed % head_dim] = 0.0
    elif kind == "large":
        q, k, v = q * 20, k * 20, v * 1e4
    elif kind == "tiny":
        q, k, v = q * 1e-4, k * 1e-4, v * 1e-4
    out, lse = cute_attn.attention(q.to(device), k.to(device), v.to(device), causal=causal, return_lse=True)
    simulated, simulated_lse = simulate(q, k, v, causal=causal)
    assert_out_close(out, simulated, recipes()["int8"])
    assert_lse_close(lse, simulated_lse, recipes()["int8"])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_rows_whose_scores_are_too_large_are_nan_as_a_whole(arch, monkeypatch):
    """Integer sums that were shifted down to nothing leave 0, or -1 where they were negative: no infinity of those."""
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    q, k, v = random_qkv((1, 1, 40, 64), (1, 1, 140, 64))
    out, lse = cute_attn.attention(q, k, v, recipe="int8", softmax_scale=2e6, return_lse=True, arch=arch)
    assert 0 < lse.isnan().sum() < lse.numel()
    assert torch.equal(out.isnan(), lse.isnan()[..., None].expand_as(out))
    assert not out.isinf().any()
