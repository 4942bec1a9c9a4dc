"""What P and V in E4M3 cost and what their accumulation buys: simulators, and the tensor cores' own sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cute_attn import reference, simulator
from cute_attn.emulator.tensor_core import dot, model_for
from cute_attn.recipe import recipes

from .test_ablation import error, exact, model_like

E4M3 = torch.float8_e4m3fn


def quantised(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """x in E4M3 with one scale over ``dims``, and back."""
    scale = x.abs().amax(dims, keepdim=True) / 448
    return (x / scale).to(E4M3).float() * scale


def attention_with_p_in_e4m3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention with P = e4m3(448·2^(s - max)) and sums in float32: what is left of every recipe with exact sums."""
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
    p = 448 * torch.exp(scores - scores.amax(-1, keepdim=True))
    return (p.float().to(E4M3).double() @ v.double()) / p.sum(-1, keepdim=True)


@pytest.mark.parametrize("accumulate", ["float32+float32", "float16+float32"])
def test_int8_fp8_is_as_accurate_as_the_rounding_of_p_and_v_to_e4m3(accumulate):
    """On N(0,1): nothing is lost to INT8 scores, the lazy max or float16 sums. The cosine is .9992 for any kernel with
    E4M3 P and V of such inputs, where signal and rounding errors cancel alike: the two roundings of 2.6 % each."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 1024, 128, generator=g) for _ in range(3))
    expected = reference.attention(q, k, v)[0]
    floor = reference.errors(attention_with_p_in_e4m3(q, k, quantised(v, (2,))), expected)
    recipe = recipes()["int8_fp8"].replace(accumulate=accumulate)
    ours = reference.errors(simulator.attention(q, k, v, recipe=recipe)[0], expected)
    assert ours.rel_l2 <= 1.1 * floor.rel_l2
    assert ours.cos >= 0.999


def test_fp8_is_better_than_one_scale_per_tensor_without_smoothing():
    """FlashAttention-3's FP8: Q, K and V with one scale each per head, nothing subtracted."""
    q, k, v = model_like()
    theirs = attention_with_p_in_e4m3(*(quantised(x, (2, 3)) for x in (q, k, v)))
    assert error(recipes()["fp8"]) <= 0.75 * reference.errors(theirs, exact()).rel_l2


def sums_of(p: np.ndarray, v: np.ndarray, tile: int) -> np.ndarray:
    """Σ p·v by Ada's MMAs of 32 tokens, in one accumulator for ``tile`` tokens, and these added in float32."""
    model = model_for("sm_89", "mma", "e4m3", "e4m3", "f32", k=32)
    total = np.zeros((p.shape[0], v.shape[0]), np.float32)
    for start in range(0, p.shape[1], tile):
        inside = np.zeros_like(total)
        for k in range(start, start + tile, 32):
            inside = dot(p[:, k : k + 32], v[:, k : k + 32], inside, model)
        total = total + inside
    return total


def test_two_levels_keep_long_sums_right():
    """128K keys of like weight, V with a mean: one accumulator of 13 bits stops growing, two levels do not."""
    tokens = 131072
    g = torch.Generator().manual_seed(0)
    p = (224 * torch.exp2(-torch.rand(2, tokens, generator=g))).to(E4M3).float().numpy()
    v = (64 + 32 * torch.randn(2, tokens, generator=g)).to(E4M3).float()
    v = torch.cat([v, torch.ones(1, tokens)]).numpy()  # the last are the row sums
    expected = p.astype(np.float64) @ v.T.astype(np.float64)
    two, one = (np.abs(sums_of(p, v, tile) / expected - 1).max() for tile in (64, tokens))
    assert two <= 2.0**-10
    assert one >= 0.1
