"""exponent="fast": P's E4M3 byte as a line over the scores. Kernel against simulator, and both against exact P."""

from __future__ import annotations

import math

import pytest
import torch

import cute_attn
from cute_attn import Problem, dispatch, recipes, reference, simulator, simulator_rows
from cute_attn.arch import ARCHS
from cute_attn.kernels.attention_sm90 import AttentionSm90, AttentionSm90Config
from cute_attn.recipe import Recipe

from .attention_operands import Operands
from .test_attention import assert_close, random_qkv
from .test_attention_sm90 import check, configured, launch, operands
from .test_static_cost_sm90 import attention_report, waits

NAMES = ("int8_fp8", "fp8")


def fast(name: str) -> Recipe:
    return recipes()[name].replace(exponent="fast")


def fast_operands(config: AttentionSm90Config, **problem) -> Operands:
    o = operands(config, **problem)
    o.recipe = o.recipe.replace(exponent="fast")
    return o


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("head_dim", "k_scale_per_token", "seq_q", "seq_k", "causal"),
    [(64, False, 200, 333, True), (128, False, 1, 1, False), (64, True, 193, 256, False), (72, False, 65, 390, False)],
)
def test_kernel_and_simulator(device, name, head_dim, k_scale_per_token, seq_q, seq_k, causal):
    """With and without masks, and both lines: of integer scores with one scale a lane the kernel's is in integers.

    A byte is then rounded otherwise than the simulator's once in some hundred, which a row of few keys would show.
    """
    scales = {"k_scale_per_token": k_scale_per_token}
    config = configured(name, exponent="fast", head_dim=head_dim, causal=causal, **scales)
    problem = {"heads": 3, "kv_heads": 1, "seq_q": seq_q, "seq_k": seq_k, "k_scale": 2e-4}
    check(fast_operands(config, **problem), config, device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k_scale", [1e-9, 1e-6, 1e-2, 1.0])
def test_scores_of_any_size(device, name, k_scale):
    config = configured(name, exponent="fast")
    check(fast_operands(config, seq_q=40, seq_k=256, k_scale=k_scale), config, device)


@pytest.mark.parametrize("k_scale", [30.0, 1e3, 1e4])
def test_a_step_of_integer_scores_may_be_larger_than_all_of_p(device, k_scale):
    """Up to 2^25 in base 2: the slope of the integer line is capped, the largest score still counts, and alone."""
    config = configured(exponent="fast", causal=True)
    o = fast_operands(config, seq_q=40, seq_k=500, k_scale=k_scale)
    out, lse = launch(o, config, device)
    exact, exact_lse = launch(o, configured(causal=True), device)
    assert reference.errors(out.double(), exact.double()).rel_l2 <= 2.5e-3
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_stays_alone(device, value):
    config = configured(exponent="fast")
    o = fast_operands(config, seq_q=70, seq_k=200)
    o.q_scale[0, 0, 33] = value
    out, _ = check(o, config, device)
    assert torch.equal(out.isnan().any(-1)[0, 0], torch.arange(70) == 33)


def test_rows_without_keys(device):
    config = configured(exponent="fast", causal=True)
    out, lse = check(fast_operands(config, seq_q=100, seq_k=70), config, device)
    assert (out[:, :, :30] == 0).all()
    assert (lse[:, :, :30] == -math.inf).all()


@pytest.mark.parametrize("name", NAMES)
def test_equal_scores_give_the_mean_of_v(device, name):
    """P is 224 for all of them, as it is for the exact exponent, so that the LSE is right, too."""
    config = configured(name, exponent="fast")
    o = fast_operands(config, seq_q=10, seq_k=256)
    o.q.zero_()
    out, lse = check(o, config, device)
    assert (out == out[:, :, :1]).all()
    assert (lse - o.softmax_scale * o.q_bias - math.log(256)).abs().max() <= 1e-5


def bytes_of(x: torch.Tensor, bias: float) -> torch.Tensor:
    """P's bytes of scores x in base 2, float32 [1, 1, rows, tokens], in the simulator."""
    rows = simulator_rows.rows_of(fast("fp8"))(torch.ones(x.shape[:3]), 32, 1)
    rows.bias.fill_(bias)
    return rows.probabilities(x).view(torch.uint8)


def test_no_p_passes_448():
    """127 would be NaN. At the largest score that a bias covers, and one float below, however large they are."""
    kind = simulator_rows.rows_of(fast("fp8"))
    for m in (0, 1, -1, 1000, -77777, 2**18 + 1, 2**20 + 1, 2**23 + 3, -(2**24) + 1):
        bias = float(torch.tensor(kind.top - m, dtype=torch.float64).float())
        bias = bias if bias <= kind.top - m else float(torch.tensor(bias).nextafter(torch.tensor(-math.inf)))
        largest = torch.tensor(float(m)).nextafter(torch.tensor(-math.inf))
        assert bytes_of(torch.stack([largest, torch.tensor(float(m))])[None, None, None], bias).max() <= 126
    assert bytes_of(torch.tensor([[[[0.0, -15.8, -1e9, -math.inf]]]]), kind.top).tolist() == [[[[126, 0, 0, 0]]]]


def test_error_of_p():
    """3.14 % in root mean square where rounding to nearest has 2.65 %, 8 % at most, .03 % too small on average."""
    x, bias = torch.linspace(-12.0, 0.0, 1 << 16)[None, None, None], 8.0
    exact = torch.exp2(x.double() + bias)
    line = bytes_of(x, bias).view(torch.float8_e4m3fn).double() / exact
    nearest = exact.float().to(torch.float8_e4m3fn).double() / exact
    assert round(float(nearest.std()), 4) == 0.0265
    assert round(float(line.std()), 4) == 0.0314
    assert abs(line.mean() - 1) <= 0.0005
    assert abs(line - 1).max() <= 0.08


@pytest.mark.parametrize("name", NAMES)
def test_error_of_the_output(name):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 512, 64, generator=g) for _ in range(3))
    expected, expected_lse = reference.attention(q, k, v)
    errors = []
    for exponent in ("exact", "fast"):
        out, lse = simulator.attention(q, k, v, recipe=recipes()[name].replace(exponent=exponent))
        errors.append(reference.errors(out, expected).rel_l2)
    assert errors[0] < errors[1] <= 1.12 * errors[0]
    assert abs((lse - expected_lse).mean()) <= 0.001


@pytest.mark.parametrize("name", NAMES)
def test_what_it_costs(name):
    """No MUFU for scores: of INT8 ones four conversions and reciprocals a row and tile.

    Without a mask 6.05 and 6.14 slots; causal kernels keep no register for shared memory's address, for .09 more.
    """
    slots, xu = {"int8_fp8": (6.15, 1.0), "fp8": (6.25, 0.0)}[name]
    for causal in (False, True):
        kernel = attention_report(name, causal=causal, has_lse=causal, exponent="fast")
        assert kernel.steady.slots["fast"] <= slots
        assert kernel.steady.floors["xu"] <= xu
        assert [waits(loop) for loop in kernel.loops] == [2, 2]
        assert kernel.highest_register < 160
        assert kernel.local_instructions == 0


@pytest.mark.parametrize("name", NAMES)
def test_public_calls(monkeypatch, name):
    """What was quantised for one exponent is used with the other."""
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    q, k, v = random_qkv((1, 2, 70, 64), (1, 1, 150, 64))
    options = {"recipe": fast(name), "causal": True, "arch": "sm_90a"}
    out, lse = cute_attn.attention(q, k, v, return_lse=True, **options)
    assert_close(out, lse, q, k, v, **options)
    assert fast(name).quantises_like(recipes()[name])
    quantised = cute_attn.quantize(q, k, v, recipe=name, arch="sm_90a")
    assert torch.equal(out, cute_attn.attention(*quantised, **options))
    assert not torch.equal(out, cute_attn.attention(*quantised, **{**options, "recipe": recipes()[name]}))


@pytest.mark.parametrize("name", NAMES)
def test_where_it_is_served(name):
    problem = Problem(1, 1, 1, 64, 64, 64, "float16")
    assert dispatch.refusal(fast(name), ARCHS["sm_90a"], problem) is None
    reason = dispatch.refusal(fast(name), ARCHS["sm_89"], problem)
    assert reason.startswith(f"recipe {name!r} with exponent='fast' has no kernel for sm_89")
    assert reason.endswith("it runs on sm_90a")


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("int8", {}, "recipe.exponent='fast' is not offered with qk_format='int8' and pv_format='int8'; use 'exact'"),
        ("fp16", {}, "recipe.exponent='fast' is not offered with qk_format='float16' and"),
        ("fp8", {"accumulate": "float16+float32"}, "is not offered with exponent='fast'; use 'float32+float32'"),
        ("int8_fp8", {"smooth_q": True}, "recipe.smooth_q=True is not offered with exponent='fast'; use False"),
        ("fp8", {"exponent": "linear"}, "recipe.exponent='linear' is not offered with .*; use 'exact' or 'fast'"),
    ],
)
def test_what_is_not_offered(name, changes, text):
    with pytest.raises(ValueError, match=text.replace("+", "\\+")):
        recipes()[name].replace(**{"exponent": "fast"} | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"recipe": "int8", "accumulate": "int32"}, "exponent='fast' with recipe='int8' is not one of exact"),
        ({"fma_eighths": 2}, "fma_eighths=2 with recipe='int8_fp8' and exponent='fast' is not one of 0"),
    ],
)
def test_refused_configs(changes, reason):
    with pytest.raises(ValueError, match=reason):
        AttentionSm90(AttentionSm90Config(64, exponent="fast", **changes))
