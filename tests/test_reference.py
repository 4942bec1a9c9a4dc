"""The float64 reference against PyTorch, and the simulator of recipe int8 against float64 and the literature."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cute_attn import quantizer_simulator, reference, simulator, simulator_rows
from cute_attn.float32 import fma
from cute_attn.recipe import recipes
from cute_attn.reference import errors
from cute_attn.tile_images import pack_tile_images, unpack_tile_images


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(seq_q: int, seq_k: int, *, heads: int = 2, kv_heads: int = 2, head_dim: int = 64, seed: int = 0):
    q = normal(1, heads, seq_q, head_dim, seed=seed)
    return q, *(normal(1, kv_heads, seq_k, head_dim, seed=seed + i) for i in (1, 2))


def bottom_right(seq_q: int, seq_k: int) -> torch.Tensor:
    """bool [Sq, Sk]: keys up to i + Sk − Sq."""
    return torch.ones(seq_q, seq_k, dtype=torch.bool).tril(seq_k - seq_q)


class TestReference:
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 1), (50, 50), (33, 90), (1, 70)])
    def test_equals_pytorch(self, seq_q, seq_k, causal):
        q, k, v = (x.double() for x in qkv(seq_q, seq_k, heads=6))
        mask = bottom_right(seq_q, seq_k) if causal else None
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        out, lse = reference.attention(q, k, v, causal=causal, scores_at_once=1000)
        assert torch.allclose(out, expected, atol=1e-12)
        scores = q @ k.repeat_interleave(3, 1).mT / 8
        scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
        assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-12)

    def test_queries_without_keys(self):
        q, k, v = qkv(10, 4)
        out, lse = reference.attention(q, k, v, causal=True)
        assert not out[:, :, :6].any()
        assert (lse[:, :, :6] == -math.inf).all()
        assert lse[:, :, 6:].isfinite().all()
        out, lse = reference.attention(q, k[:, :, :0], v[:, :, :0])
        assert not out.any()
        assert (lse == -math.inf).all()

    def test_softmax_scale(self):
        q, k, v = qkv(20, 30)
        out, _ = reference.attention(q, k, v, softmax_scale=0.5)
        expected, _ = reference.attention(4 * q, k, v)
        assert torch.allclose(out, expected)

    def test_errors(self):
        e = errors(torch.tensor([3.0, -1.0]), torch.tensor([3.0, 1.0]))
        assert e.rel_l2 == pytest.approx(2 / math.sqrt(10))
        assert e.rel_l1 == pytest.approx(0.5)
        assert e.cos == pytest.approx(0.8)
        assert e.max_abs == 2
        zero = errors(torch.zeros(3), torch.zeros(3))
        assert (zero.rel_l2, zero.rel_l1, zero.cos, zero.max_abs) == (0, 0, 1, 0)


class TestFloat32:
    def test_fma_rounds_once(self):
        """(1+2^-12)^2 − 1: the product needs 25 bits, so that rounding it first loses the last one."""
        a = torch.tensor(1 + 2.0**-12)
        assert fma(a, a, torch.tensor(-1.0)) == 2.0**-11 + 2.0**-24

    def test_fma_does_not_round_twice(self):
        """1 + 2^-23 + 2^-24 − 2^-60 is below the midpoint of two floats; float64 has to round it to the midpoint."""
        a, c = (torch.tensor([x, -x]) for x in (2.0**-12 + 2.0**-30, 1 + 2.0**-23))
        b = torch.tensor(2.0**-12 - 2.0**-30)
        assert torch.equal(fma(a, b, c), c)

    @given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3))
    def test_fma_is_correctly_rounded(self, abc):
        from fractions import Fraction

        a, b, c = (torch.tensor(x, dtype=torch.float32) for x in abc)
        exact = Fraction(a.item()) * Fraction(b.item()) + Fraction(c.item())
        got = fma(a, b, c)
        if abs(exact) >= Fraction(2) ** 127 or (exact != 0 and abs(exact) < Fraction(2) ** -126):
            return
        ulp = [torch.nextafter(got, torch.tensor(side)).item() for side in (math.inf, -math.inf)]
        distance = abs(exact - Fraction(got.item()))
        assert all(distance <= abs(exact - Fraction(x)) for x in ulp)


class TestTileImages:
    @pytest.mark.parametrize("tokens", [1, 64, 130])
    @pytest.mark.parametrize("values", ["int8", "float16"])
    def test_unpack_inverts_pack(self, tokens, values):
        k, v = (torch.randint(-127, 128, (2, 3, tokens, 64), dtype=torch.int8) for _ in range(2))
        scale, v = torch.rand(2, 3, tokens), v.to(getattr(torch, values))
        image = pack_tile_images(k, scale, v)
        for plain, expected in zip(unpack_tile_images(image, 64, tokens, values), (k, scale, v), strict=True):
            assert torch.equal(plain, expected)

    def test_refusals(self):
        image = torch.zeros(1, 1, 2, 128 * 64 + 512, dtype=torch.uint8)
        for head_dim, tokens in ((32, 100), (64, 64), (64, 129)):
            with pytest.raises(ValueError, match="does not hold"):
                unpack_tile_images(image, head_dim, tokens)
        with pytest.raises(ValueError, match="V in float16"):
            unpack_tile_images(image, 64, 100, "float16")


class TestQuantizers:
    def test_errors_are_at_most_half_a_step(self):
        k = normal(1, 2, 100, 64)
        mean = quantizer_simulator.key_mean(k)
        keys, scale = quantizer_simulator.quantize_keys(k, mean)
        rest = (keys.float() * scale[..., None] + mean[:, :, None] - k.float()).abs()
        assert (rest <= 0.501 * scale[..., None]).all()
        assert (keys.abs().amax(-1) >= 126).all()

    def test_magic_times_key_scale_is_exact(self):
        _, scale = quantizer_simulator.quantize_keys(normal(1, 1, 500, 32), None)
        assert torch.equal((12582912.0 * scale).double(), 12582912.0 * scale.double())

    def test_mean_is_accurate_for_long_sequences(self):
        k = normal(1, 1, 20_000, 32) + 100
        assert torch.allclose(quantizer_simulator.key_mean(k).double(), k.double().mean(2), rtol=1e-6)


class TestSimulator:
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 1), (1, 300), (200, 200), (130, 333), (300, 100)])
    def test_close_to_float64(self, seq_q, seq_k, causal):
        q, k, v = qkv(seq_q, seq_k, heads=4)
        out, lse = simulator.attention(q, k, v, causal=causal)
        exact, exact_lse = reference.attention(q, k, v, causal=causal)
        assert errors(out, exact).rel_l2 < 0.03
        seen = exact_lse.isfinite()
        assert torch.equal(lse == -math.inf, ~seen)
        assert (lse[seen] - exact_lse[seen]).abs().max() < 0.06
        assert not out[~seen].any()

    def test_forced_shifts_keep_int32_in_range(self, monkeypatch):
        """With equal scores every P is 128 (½ a bit of headroom): 140 000 keys of V = 127 sum up to 1.06·2^31."""
        q, k = torch.zeros(1, 1, 1, 32), torch.zeros(1, 1, 140_000, 32)
        v = torch.ones_like(k)
        out, lse = simulator.attention(q, k, v, warp_rows=16, cta_rows=16)
        assert torch.allclose(out, torch.ones_like(out), rtol=1e-4)
        assert lse.item() == pytest.approx(math.log(140_000), abs=1e-2)
        monkeypatch.setattr(simulator_rows.rows_of(recipes()["int8"]), "largest_sum", 2**31 - 1)
        assert (simulator.attention(q, k, v, warp_rows=16, cta_rows=16)[0] < 0).all()

    def test_smoothing_is_undone_in_the_lse(self):
        q, k, v = qkv(40, 100)
        k = k + 20 * normal(1, 2, 1, 64, seed=7)
        smooth, plain = (simulator.attention(q, k, v, smooth_k=s) for s in (True, False))
        exact, exact_lse = reference.attention(q, k, v)
        assert (smooth[1] - exact_lse).abs().max() < 0.06
        assert errors(smooth[0], exact).rel_l2 < 0.5 * errors(plain[0], exact).rel_l2

    def test_rows_of_a_warp_only_share_the_moment_of_rescaling(self):
        q, k, v = qkv(64, 500)
        results = [simulator.attention(q, k, v, warp_rows=w)[0] for w in (16, 32, 128)]
        assert all(errors(r, results[0]).rel_l2 < 0.02 for r in results)

    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    def test_poison_in_q_stays_in_its_row(self, poison):
        q, k, v = qkv(70, 90)
        clean, clean_lse = simulator.attention(q, k, v)
        q[0, 1, 33, 5] = poison
        out, lse = simulator.attention(q, k, v)
        row = torch.zeros(1, 2, 70, dtype=torch.bool)
        row[0, 1, 33] = True
        assert out[row].isnan().all()
        assert lse[row].isnan().all()
        assert errors(out[~row], clean[~row]).rel_l2 < 0.02
        assert (lse[~row] - clean_lse[~row]).abs().max() < 0.06
        assert out[~row].isfinite().all()

    def test_poison_in_k_stays_in_its_head_and_in_v_in_its_channel(self):
        q, k, v = qkv(20, 90, heads=4)
        k[0, 0, 5, 5] = math.inf
        v[0, 1, 5, 9] = math.nan
        out, _ = simulator.attention(q, k, v)
        assert out[:, :2].isnan().all()
        channel = torch.arange(64) == 9
        assert out[:, 2:][..., channel].isnan().all()
        assert out[:, 2:][..., ~channel].isfinite().all()


@dataclass(frozen=True)
class Case:
    """A shape, and what is unusual about its inputs."""

    seq_q: int
    seq_k: int
    heads: int
    seed: int
    causal: bool
    v_scale: str
    k_outlier: float
    q_row: float | None
    k_row: float | None
    v_size: float

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Channel 11 of V is zero everywhere."""
        q, k, v = qkv(self.seq_q, self.seq_k, heads=self.heads, seed=self.seed)
        k[..., self.seed % 64] += self.k_outlier
        if self.q_row is not None:
            q[:, :, self.seed % self.seq_q] = self.q_row
        if self.k_row is not None:
            k[:, :, self.seed % self.seq_k] = self.k_row
        v[..., 11] = 0
        return q, k, v * self.v_size


cases = st.builds(
    Case,
    seq_q=st.integers(1, 140),
    seq_k=st.integers(1, 200),
    heads=st.sampled_from([2, 4]),
    seed=st.integers(0, 1000),
    causal=st.booleans(),
    v_scale=st.sampled_from(["channel", "tensor"]),
    k_outlier=st.sampled_from([0.0, 8.0, -30.0, 100.0]),
    q_row=st.sampled_from([None, 0.0, 1.0, -3.0]),
    k_row=st.sampled_from([None, 0.0, 0.5]),
    v_size=st.sampled_from([1e-3, 1.0, 1000.0]),
)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_int8_is_close_to_float64_on_the_quantised_tensors(case):
    """Outliers spoil what INT8 keeps of Q, K and V, never what the kernel computes from that.

    What remains is P's rounding. A row's largest P lies between 255·2^-1.5 = 90 and 255, each P is off by half a step
    (.51 with float16 on the way) or vanishes, and the *rounded* P are summed. Shifts round down: the integers O and row
    sum lose less than 1 + 1/2 + 1/4 … = 2. With w = exp(score − largest score),
    |out − exact| <= (Σ min(.51, 255·w)·|v − exact| + 2·(v_scale + |exact|)) / (90·Σ rounded w).
    """
    q, k, v = case.inputs()
    recipe = recipes()["int8"].replace(v_scale=case.v_scale)
    out, lse = simulator.attention(q.float(), k, v, causal=case.causal, recipe=recipe)
    mean = quantizer_simulator.key_mean(k)
    data, scale, bias = quantizer_simulator.quantize_query(q, mean)
    keys, k_scale = quantizer_simulator.quantize_keys(k, mean)
    per_channel = quantizer_simulator.value_scale(v, recipe)
    values = quantizer_simulator.quantize_values(v, per_channel, recipe) * per_channel.double()[:, :, None]
    q_kept, k_kept = data * scale.double()[..., None], keys * k_scale.double()[..., None]
    exact, exact_lse = reference.attention(q_kept, k_kept, values, causal=case.causal)
    seen = exact_lse.isfinite()
    assert torch.equal(seen, lse.isfinite())
    assert not out[~seen].any()
    assert not out[..., 11].any()
    assert ((lse - bias / 8 - exact_lse)[seen].abs() < 0.3).all()

    group = q.shape[1] // k.shape[1]
    scores = q_kept @ k_kept.repeat_interleave(group, 1).mT / 8
    if case.causal:
        scores = scores.masked_fill(~bottom_right(*scores.shape[2:]), -math.inf)
    largest = scores.amax(-1, keepdim=True)
    rounding = (255 * (scores - largest).exp()).clamp(max=0.51).nan_to_num(0.0)
    distances = (values.repeat_interleave(group, 1)[:, :, None] - exact[:, :, :, None]).abs()
    shifted = 2 * (per_channel.repeat_interleave(group, 1)[:, :, None] + exact.abs())
    row_sum = 90 * (lse - bias / 8 - largest[..., 0]).exp()
    bound = ((rounding[..., None] * distances).sum(3) + shifted) / row_sum[..., None]
    excess = (out - exact).abs() - bound - 1e-6 * values.abs().amax()
    assert (excess[seen] <= 0).all()


class TestLiterature:
    """INT-FlashAttention (arXiv 2409.16997), mean relative error Σ|o−r|/Σ|r| in per cent, head dim 128.

    Published: N(0,1) 4.05 (1k tokens), 4.21 (4k), half-INT8 .890, .843; U(−.5,.5) 1.69, 1.65, half-INT8 .317, .280.
    """

    @staticmethod
    @functools.lru_cache
    def inputs(kind: str, tokens: int, scale: float) -> tuple[torch.Tensor, ...]:
        """q, k, v, and attention in float64."""
        g = torch.Generator().manual_seed(1)
        shape = (1, 1, tokens, 128)
        drawn = [
            torch.randn(shape, generator=g) if kind == "normal" else torch.rand(shape, generator=g) - 0.5
            for _ in range(3)
        ]
        q, k, v = (x.half().float() for x in drawn)
        return q, k, v, reference.attention(q, k, v, softmax_scale=scale)[0]

    @staticmethod
    def variant(q, k, v, scale: float, *, p_bits: str) -> torch.Tensor:
        """Their kernel: per-token Q and K, V per tensor, exact running max, tiles of 64 keys, no smoothing.

        p_bits: "fp16" (half-INT8, V in FP16); "rounded": P = round(127·2^x), summed as rounded (the paper's text);
        "truncated": P cut off to int8 (a Triton cast), summed before that (the published code)
        """

        def int8(x, dims):
            step = x.abs().amax(dims, keepdim=True) / 127
            return (x / step).round(), step

        (q8, q_step), (k8, k_step), (v8, v_step) = int8(q, -1), int8(k, -1), int8(v, (-1, -2))
        scores = q8 @ k8.mT * q_step * k_step.mT * scale
        top = torch.full_like(q[..., :1], -math.inf)
        out, total = torch.zeros_like(q), torch.zeros_like(top)
        for start in range(0, k.shape[2], 64):
            tile = scores[..., start : start + 64]
            new_top = torch.maximum(top, tile.amax(-1, keepdim=True))
            shrink, p = torch.exp(top - new_top), torch.exp(tile - new_top)
            top = new_top
            if p_bits == "fp16":
                p = summed = p.half().float()
                values = v[..., start : start + 64, :]
            else:
                p, summed, values = 127 * p, 127 * p, v8[..., start : start + 64, :] * v_step
                p = p.trunc() if p_bits == "truncated" else p.round()
                summed = p if p_bits == "rounded" else summed
            out, total = out * shrink + p @ values, total * shrink + summed.sum(-1, keepdim=True)
        return out / total

    def mean_relative_error(self, kind: str, tokens: int, p_bits: str | None, scale: float) -> float:
        """In per cent; p_bits None is this package's recipe int8 with one scale of V."""
        q, k, v, exact = self.inputs(kind, tokens, scale)
        if p_bits is None:
            out, _ = simulator.attention(
                q, k, v, softmax_scale=scale, recipe=recipes()["int8"].replace(v_scale="tensor")
            )
        else:
            out = self.variant(q, k, v, scale, p_bits=p_bits)
        return 100 * errors(out, exact).rel_l1

    NORMAL, UNIFORM = 128**-0.5, 0.5

    @pytest.mark.parametrize(
        ("kind", "tokens", "published", "scale"),
        [
            ("normal", 1024, 0.890, NORMAL),
            ("normal", 4096, 0.843, NORMAL),
            ("uniform", 1024, 0.317, UNIFORM),
            ("uniform", 4096, 0.280, UNIFORM),
        ],
    )
    def test_half_int8_is_reproduced(self, kind, tokens, published, scale):
        """What Q and K per token lose. The uniform figures fit a softmax scale of 1/2, not of 1/√128 (.05)."""
        assert self.mean_relative_error(kind, tokens, "fp16", scale) == pytest.approx(published, rel=0.25)

    @pytest.mark.parametrize(
        ("kind", "tokens", "published", "scale", "p_bits"),
        [
            ("normal", 1024, 4.05, NORMAL, "truncated"),
            ("normal", 4096, 4.21, NORMAL, "rounded"),
            ("uniform", 1024, 1.69, UNIFORM, "truncated"),
            ("uniform", 4096, 1.65, UNIFORM, "truncated"),
        ],
    )
    def test_full_int8_is_reproduced_and_improved_on(self, kind, tokens, published, scale, p_bits):
        """Theirs lies between rounding and truncating P: the listed one is within 25 per cent.

        Ours is the better one of the two everywhere: P is rounded, to 255 levels, and the sum is of what was rounded.
        """
        assert self.mean_relative_error(kind, tokens, p_bits, scale) == pytest.approx(published, rel=0.25)
        ours = self.mean_relative_error(kind, tokens, None, scale)
        assert ours < published
        assert ours < self.mean_relative_error(kind, tokens, "rounded", scale)
