"""The simulator of P and V in E4M3, on random quantised operands, against float64 attention of the same operands."""

from __future__ import annotations

import pytest
import torch

from cute_attn import reference, simulator_rows
from cute_attn.recipe import Recipe, recipes
from cute_attn.tile_images import unpack_tile_images

from .attention_operands import Operands, simulate_rows

RECIPES = [
    recipes()[name].replace(accumulate=how)
    for name in ("int8_fp8", "fp8")
    for how in ("float32+float32", "float16+float32")
]


def exact(operands: Operands, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 attention of the operands that the kernel multiplies; LSE without Q's bias."""
    o = operands
    formats = (o.recipe.pv_format, o.recipe.qk_format)
    k, k_scale, v = unpack_tile_images(o.image, o.head_dim, o.seq_k, *formats, o.tile_tokens, o.sum_rows)
    q, k = o.q.double() * o.q_scale[..., None], k.double() * k_scale[..., None]
    out, lse = reference.attention(q, k, v.double() * o.v_scale[:, :, None], causal=causal)
    return out, lse + o.softmax_scale * o.q_bias


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.name} {r.accumulate}")
@pytest.mark.parametrize(("tile_tokens", "sum_rows"), [(64, 0), (128, 8)])
@pytest.mark.parametrize(("seq_k", "causal"), [(1, False), (300, True), (1000, False)])
def test_only_p_is_rounded(recipe: Recipe, tile_tokens, sum_rows, seq_k, causal):
    """P has four significant bits; errors of independent keys cancel, in the output and in the row sum."""
    tiles = {"tile_tokens": tile_tokens, "sum_rows": sum_rows}
    o = Operands(heads=2, seq_q=100, seq_k=seq_k, recipe=recipe, k_scale=1e-4, **tiles)
    out, lse = simulate_rows(o, causal, torch.float32, warp_rows=32, cta_rows=128)
    expected, expected_lse = exact(o, causal)
    assert reference.errors(out, expected).rel_l2 <= 0.03
    seen = expected_lse.isfinite()
    assert torch.equal(seen, lse.isfinite())
    assert (lse - expected_lse)[seen].abs().max() <= 0.0607  # log(1 + 2^-4): every P too large by half a step


@pytest.mark.parametrize("recipe", RECIPES[::2], ids=lambda r: r.name)
def test_the_size_of_a_tile_decides_rescales_and_nothing_else(recipe: Recipe):
    results = []
    for tile_tokens in (64, 128):
        o = Operands(seq_q=70, seq_k=500, recipe=recipe, k_scale=1e-6, tile_tokens=tile_tokens)
        results.append(simulate_rows(o, False, torch.float32, warp_rows=16, cta_rows=64))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_p_never_passes_448_and_reaches_it():
    rows = simulator_rows.rows_of(recipes()["fp8"])(torch.ones(1, 1, 2), 32, 2)
    y = torch.tensor([[-1.0, 0.0], [-0.3, -1.0]])[None, None]
    rows.make_room(y - rows.headroom)
    assert 2.0**rows.top <= 448.0
    p = rows.probabilities(y)
    assert p.dtype == torch.float8_e4m3fn
    assert p.float().tolist() == [[[[224.0, 448.0], [352.0, 224.0]]]]
