"""The quantiser kernels against their simulators in plain torch: equal bit for bit."""

from __future__ import annotations

import math
import re

import pytest
import torch

from cute_attn import emulator, jit, kernel_calls, quantizer_simulator
from cute_attn.arguments import resolve_arch
from cute_attn.cubin import kernel_resources
from cute_attn.kernels.quantize_key_value import KeyValueTiles, TilesConfig
from cute_attn.kernels.quantize_statistics import (
    FinishConfig,
    FinishStatistics,
    KeyValueStatistics,
    StatisticsConfig,
)
from cute_attn.kernels.rows import QuantizerConfig
from cute_attn.kernels.tile_image import TILE_TOKENS, TileImage
from cute_attn.recipe import Recipe, recipes
from cute_attn.tensors import alignment
from cute_attn.tile_images import pack_tile_images, unpack_tile_images

PER_CHANNEL = recipes()["int8"]
PER_TENSOR = PER_CHANNEL.replace(v_scale="tensor")
FLOAT16 = recipes()["int8_fp16"]


def mean_of(k: torch.Tensor) -> torch.Tensor:
    return quantizer_simulator.key_mean(k.cpu())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, a NaN being equal to a NaN."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def key_value_tiles(k: torch.Tensor, v: torch.Tensor, recipe: Recipe = PER_CHANNEL) -> tuple[torch.Tensor, ...]:
    """image, v_scale and k_mean from the three kernels, on the CPU."""
    arch = resolve_arch(None, k)
    results = kernel_calls.key_value_tiles(k, v, recipe, TileImage(k.shape[3], recipe.pv_format), arch.name)
    return tuple(x.cpu() for x in results if x is not None)


def query_rows(q: torch.Tensor, k_mean: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """data, scale and bias from the kernel, on the CPU."""
    layout, arch = TileImage(q.shape[3]), resolve_arch(None, q).name
    results = kernel_calls.query_rows(q, k_mean.to(q.device), PER_CHANNEL, layout, arch)
    return tuple(x.cpu() for x in results if x is not None)


def check_key_value(k: torch.Tensor, v: torch.Tensor, recipe: Recipe = PER_CHANNEL) -> tuple[torch.Tensor, ...]:
    """All results of the kernels for K and V, image bytes included, equal the simulators'; returns them."""
    image, v_scale, k_mean = key_value_tiles(k, v, recipe)
    k, v = k.cpu(), v.cpu()
    assert same(k_mean, quantizer_simulator.key_mean(k))
    assert same(v_scale, quantizer_simulator.value_scale(v, recipe))
    keys, k_scale = quantizer_simulator.quantize_keys(k, k_mean)
    values = quantizer_simulator.quantize_values(v, v_scale, recipe)
    expected = pack_tile_images(keys, k_scale, values)
    start = TileImage(k.shape[-1], recipe.pv_format).scale_offset
    assert torch.equal(image[..., :start], expected[..., :start])
    scales, expected_scales = (x[..., start:].contiguous().view(torch.float32) for x in (image, expected))
    assert same(scales, expected_scales)
    return image, v_scale, k_mean


def check_query(q: torch.Tensor, k_mean: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The kernel's data, scale and bias equal the simulator's; returns them."""
    results = query_rows(q, k_mean)
    for result, expected in zip(results, quantizer_simulator.quantize_query(q.cpu(), k_mean), strict=True):
        assert same(result, expected)
    return results


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [32, 64, 128, pytest.param(256, marks=pytest.mark.slow)])
def test_head_dims_and_dtypes(normal, head_dim, dtype):
    k, v = (normal(2, 2, 200, head_dim, dtype=dtype, seed=s) for s in range(2))
    check_key_value(k, v)
    check_query(normal(2, 4, 77, head_dim, dtype=dtype, seed=2), mean_of(k))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 64), (65, 32), (200, 128), (257, 64)])
def test_values_in_float16(normal, tokens, head_dim, dtype):
    k, v = (normal(2, 2, tokens, head_dim, dtype=dtype, seed=s) for s in range(2))
    image, v_scale, _ = check_key_value(k, v, FLOAT16)
    _, _, values = unpack_tile_images(image, head_dim, tokens, "float16")
    assert values.abs().max() < 2
    assert torch.equal(torch.frexp(v_scale).mantissa, torch.full_like(v_scale, 0.5))
    restored = values.float() * v_scale[:, :, None]
    assert ((restored - v.cpu().float()).abs() <= v_scale[:, :, None] * 2.0**-25).all()


@pytest.mark.parametrize("size", [3e38, 2.0**127, 65504.0, 1e-30, 2.0**-126, 1e-39])
def test_values_of_any_size_in_float16(normal, size):
    """bfloat16 reaches from 2^-133 to 2^128, float16 from 2^-24 to 2^16; channels below 2^-126 count as zero."""
    k = normal(1, 1, 70, 64, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    v = (torch.rand(1, 1, 70, 64, generator=generator).double() * 2 - 1) * size
    v[:, :, 3] = size
    v = v.to(torch.bfloat16).to(k.device)
    image, v_scale, _ = check_key_value(k, v, FLOAT16)
    restored = unpack_tile_images(image, 64, 70, "float16")[2].double() * v_scale[:, :, None].double()
    assert v_scale.isfinite().all()
    distance = (restored - v.cpu().double()).abs()
    assert (distance <= max(v_scale.max().item() * 2.0**-25, 2.0**-126 if size < 1e-38 else 0.0)).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_non_finite_values_show_in_their_scale_in_float16(normal, poison):
    k, v = (normal(1, 2, 70, 64, seed=s) for s in range(2))
    v[0, 0, 66, 9] = poison
    image, v_scale, _ = key_value_tiles(k, v, FLOAT16)
    assert (~v_scale.isfinite()).nonzero().tolist() == [[0, 0, 9]]
    values = unpack_tile_images(image, 64, 70, "float16")[2]
    assert (~values.isfinite()).nonzero().tolist() == [[0, 0, 66, 9]]


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 256, 257, 700])
def test_lengths(normal, tokens):
    k, v = (normal(1, 2, tokens, 64, seed=s) for s in range(2))
    check_key_value(k, v)
    check_query(normal(1, 2, tokens, 64, seed=2), mean_of(k))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_scale_of_v_per_head(normal, head_dim):
    k, v = (normal(1, 3, 100, head_dim, seed=s) for s in range(2))
    _, v_scale, _ = check_key_value(k, v, PER_TENSOR)
    assert (v_scale == v_scale[..., :1]).all()
    assert len(v_scale.unique()) == 3


@pytest.mark.parametrize("padding", [0, 8, 4, 2, 1], ids=lambda p: f"row+{p}")
def test_strides(normal, padding):
    """[B, S, H, D] storage, every other token, rows apart by D + padding: loads of 16 to 2 bytes give the same bits."""
    batch, heads, tokens, head_dim = 2, 2, 70, 64
    storage = [normal(batch, 2 * tokens, heads, head_dim + padding, seed=s) for s in range(3)]
    k, v, q = (x[:, ::2, :, :head_dim].transpose(1, 2) for x in storage)
    assert alignment(k) == math.gcd(16, 2 * (head_dim + padding))
    image, *_ = check_key_value(k, v)
    check_query(q, mean_of(k))
    contiguous, *_ = key_value_tiles(k.contiguous(), v.contiguous())
    assert torch.equal(image, contiguous)


def test_grouped_query_heads_use_their_own_mean(normal):
    k, q = normal(2, 2, 50, 64), normal(2, 6, 30, 64, seed=1)
    k[:, 1] += 3
    k_mean = mean_of(k)
    _, _, bias = check_query(q, k_mean)
    exact = torch.einsum("bhsd,bhd->bhs", q.cpu().double(), k_mean.double().repeat_interleave(3, 1))
    assert torch.allclose(bias.double(), exact, rtol=1e-5, atol=1e-4)


def test_zero_rows_and_channels_quantise_to_zeros(normal):
    k, v, q = (normal(1, 1, 80, 64, seed=s) for s in range(3))
    v[..., 5] = 0
    q[:, :, 7] = 0
    k[...] = k[:, :, :1]  # every token equals the mean: nothing is left after smoothing
    image, v_scale, _ = check_key_value(k, v)
    data, scale, _ = check_query(q, mean_of(k))
    assert not data[:, :, 7].any()
    assert scale[0, 0, 7] == 0
    keys, k_scale, values = unpack_tile_images(image, 64, 80)
    assert v_scale[0, 0, 5] == 0
    assert not values[..., 5].any()
    assert (keys.float() * k_scale[..., None]).abs().max() < 1e-5


def test_subnormal_scales_count_as_zero(device):
    q = torch.full((1, 1, 4, 64), 1e-37, dtype=torch.bfloat16, device=device)
    data, scale, _ = check_query(q, torch.zeros(1, 1, 64))
    assert not data.any()
    assert not scale.any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_non_finite_values_show_in_their_scale_alone(normal, poison):
    k, v, q = (normal(1, 2, 70, 64, seed=s) for s in range(3))
    v[0, 0, 66, 9] = poison
    q[0, 1, 3, 20] = poison
    _, v_scale, _ = check_key_value(k, v)
    _, q_scale, q_bias = check_query(q, mean_of(k))
    assert (~v_scale.isfinite()).nonzero().tolist() == [[0, 0, 9]]
    assert (~q_scale.isfinite()).nonzero().tolist() == [[0, 1, 3]]
    assert (~q_bias.isfinite()).nonzero().tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_key_poisons_the_mean_of_its_head(normal, poison):
    k, v, q = (normal(1, 2, 70, 64, seed=s) for s in range(3))
    k[0, 1, 5, 2] = poison
    check_key_value(k, v)
    _, _, q_bias = check_query(q, mean_of(k))
    assert q_bias[0, 0].isfinite().all()
    assert not q_bias[0, 1].isfinite().any()


def test_tokens_past_the_end_are_zeros_even_if_v_is_poisoned(normal):
    k, v = (normal(1, 1, 65, 32, seed=s) for s in range(2))
    v[0, 0, 64] = math.nan
    image, *_ = key_value_tiles(k, v)
    for plain in unpack_tile_images(image, 32, 2 * TILE_TOKENS):
        assert not plain[:, :, 65:].any()


@pytest.mark.parametrize("seed", range(3))
def test_order_of_warps_and_ctas_does_not_matter(normal, seed):
    """A race between the threads that stage an image and those that write it out would show."""
    k, v, q = (normal(1, 2, 130, 128, seed=s) for s in range(3))
    with emulator.settings(seed=seed):
        _, _, k_mean = check_key_value(k, v, PER_TENSOR)
        check_query(q, k_mean)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (QuantizerConfig(84, "float16"), "head dim"),
        (QuantizerConfig(64, "float32"), "dtype"),
        (QuantizerConfig(64, "float16", 3), "alignment"),
    ],
)
def test_refused_configurations(config, reason):
    for kernel, wrapped in (
        (KeyValueStatistics, StatisticsConfig(config)),
        (KeyValueTiles, TilesConfig(config)),
    ):
        assert reason in kernel.can_implement(wrapped)
        with pytest.raises(ValueError, match=reason):
            kernel(wrapped)


def test_refused_scale_and_format_of_v():
    assert "v_scale" in FinishStatistics.can_implement(FinishConfig(64, "token"))
    assert "values" in FinishStatistics.can_implement(FinishConfig(64, values="float32"))
    assert "largest_value 449.0 is not from 1 to 448" in FinishStatistics.can_implement(
        FinishConfig(64, values="e4m3", largest_value=449.0)
    )
    assert "largest_value 2.25 is not None" in FinishStatistics.can_implement(
        FinishConfig(64, values="float16", largest_value=2.25)
    )
    assert "values" in KeyValueTiles.can_implement(TilesConfig(QuantizerConfig(64, "float16"), "float32"))


def programs(head_dim: int, dtype: str, arch: str, values: str = "int8") -> dict[str, jit.Program]:
    rows = QuantizerConfig(head_dim, dtype)
    kernels = {
        KeyValueStatistics: StatisticsConfig(rows),
        FinishStatistics: FinishConfig(head_dim, "tensor", values),
        KeyValueTiles: TilesConfig(rows, values),
    }
    return {kernel.__name__: jit.build(kernel, config, arch) for kernel, config in kernels.items()}


@pytest.mark.parametrize(("values", "arch"), [("int8", "sm_80"), ("e4m3", "sm_89")])
def test_compiled_arithmetic_is_the_simulated(values, arch):
    """Divisions are correctly rounded, and nothing is fused."""
    for program in programs(128, "float16", arch, values).values():
        assert not re.findall(r"\b(?:div|rcp)\.(?!rn\.f32|s32|u32)\S+", program.ptx)
        assert not re.findall(r"\bfma\.", program.ptx)


@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_120a", marks=pytest.mark.slow)])
@pytest.mark.parametrize("head_dim", [128, *(pytest.param(d, marks=pytest.mark.slow) for d in (32, 64, 256))])
@pytest.mark.parametrize("values", ["int8", "float16"])
def test_nothing_spills(head_dim, arch, values):
    for program in programs(head_dim, "bfloat16", arch, values).values():
        for resources in kernel_resources(program.cubin).values():
            assert resources.stack_bytes == 0
            assert resources.registers <= 102  # five CTAs of 128 threads on a multiprocessor


@pytest.mark.parametrize(("values", "arch"), [("int8", "sm_80"), ("float16", "sm_80"), ("e4m3", "sm_89")])
def test_aligned_inputs_are_read_sixteen_bytes_at_a_time(values, arch):
    """K and V, and the image, in global memory; the partial results and single scales are narrower."""
    ptx = {name: program.ptx for name, program in programs(128, "float16", arch, values).items()}
    for name in ("KeyValueStatistics", "KeyValueTiles"):
        loads = re.findall(r"ld\.global\S*", ptx[name])
        assert set(loads) == {"ld.global.v4.b32"}
    assert set(re.findall(r"st\.global\S*", ptx["KeyValueTiles"])) == {"st.global.v4.b32"}
