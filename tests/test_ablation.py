"""What each choice of a recipe is worth, in the simulators: the ablations of arXiv 2410.02367 and 2411.10958.

SageAttention's inputs were the layers of video and language models. Here stand inputs with the properties that its
papers name: channels of K, and of Q, with a mean far from zero that all tokens share; a few tokens that are much larger
than their neighbours; channels of V with a mean.
"""

from __future__ import annotations

import functools

import torch

from cute_attn import quantizer_simulator, reference, simulator
from cute_attn.recipe import Recipe, recipes

TOKENS, HEAD_DIM = 1024, 128
INT4, INT8 = recipes()["int4_fp16"], recipes()["int8_fp16"]


@functools.lru_cache
def model_like(v_mean: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v float32 [1, 2, 1024, 128]."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, TOKENS, HEAD_DIM, generator=g) for _ in range(3))
    for x, mean in ((q, 4.0), (k, 10.0)):
        x[..., torch.randperm(TOKENS, generator=g)[: TOKENS // 128], :] *= 2.5
        x[..., ::16] += mean * torch.randn(1, 2, 1, HEAD_DIM // 16, generator=g)
    v = v + v_mean * torch.randn(1, 2, 1, HEAD_DIM, generator=g)
    return q, k, v


@functools.lru_cache
def exact(v_mean: float = 0.0) -> torch.Tensor:
    return reference.attention(*model_like(v_mean))[0]


def error(recipe: Recipe, v_mean: float = 0.0, **options: bool) -> float:
    """Relative L2 distance of the recipe's simulator from float64."""
    out, _ = simulator.attention(*model_like(v_mean), recipe=recipe, **options)
    return reference.errors(out, exact(v_mean)).rel_l2


def one_scale_per_tensor(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, H, S, D] with one scale per head, which no kernel offers: integers, and the scale of every token."""
    scale = (x.abs().amax((2, 3)) / levels)[:, :, None].expand(x.shape[:3])
    return (x / scale[..., None]).round().to(torch.int8), scale


def error_of_one_scale_per_tensor() -> float:
    q, k, v = model_like()
    k_mean, q_mean = quantizer_simulator.key_mean(k), quantizer_simulator.query_mean(q)
    v_scale = quantizer_simulator.value_scale(v, INT4)
    smoothed = q - q_mean.repeat_interleave(128, 2)
    out, _ = simulator.attention_quantised(
        (*one_scale_per_tensor(smoothed, 7), torch.zeros(q.shape[:3])),
        one_scale_per_tensor(k - k_mean[:, :, None], 7),
        (quantizer_simulator.quantize_values(v, v_scale, INT4), v_scale),
        recipe=INT4,
        delta=quantizer_simulator.delta_scores(q_mean, k, k_mean),
        causal=False,
        softmax_scale=HEAD_DIM**-0.5,
        out_dtype=torch.float32,
    )
    return reference.errors(out, exact()).rel_l2


def test_scales_per_thread_are_nearly_as_good_as_per_token_and_better_than_per_block():
    """SageAttention2, table of granularities with INT4 Q and K: cosine .9945, .9945, .9803, .9715."""
    token, thread, block = (error(INT4.replace(qk_scale=scale)) for scale in ("token", "thread", "block"))
    assert token <= thread <= 1.2 * token
    assert block >= 1.3 * thread
    assert error_of_one_scale_per_tensor() >= 1.2 * block


def test_smoothing_q_and_k_is_what_makes_int4_usable():
    """SageAttention2, table of smoothing with INT4: without it the output has little to do with the right one."""
    both = error(INT4)
    only_k = error(INT4.replace(smooth_q=False))
    only_q = error(INT4, smooth_k=False)
    neither = error(INT4.replace(smooth_q=False), smooth_k=False)
    assert both < 0.3
    assert min(only_k, only_q) > 1.5 * both
    assert neither > max(only_k, only_q)


def test_smoothing_k_helps_int8():
    """SageAttention, section 4.2."""
    assert error(INT8, smooth_k=False) > 1.3 * error(INT8)


def test_int4_scores_cost_more_than_int8_ones():
    assert error(INT4) > 3 * error(INT8)


def test_float16_accumulators():
    """As accurate as float32 where V has no mean; where it has one, sums grow and lose bits: unless V is smoothed, or
    sums are float16 within 64 keys only (SageAttention2, section 3.3)."""
    single = INT8.replace(accumulate="float16")
    assert error(single) <= 1.05 * error(INT8)
    full, half = error(INT8, 8.0), error(single, 8.0)
    assert half >= 2 * full
    assert error(single.replace(smooth_v=True), 8.0) <= 0.6 * half
    assert error(INT8.replace(accumulate="float16+float32"), 8.0) <= 0.6 * half


def test_smoothing_v_helps_int8_values():
    """An 8-bit V spends its levels on its mean. Of flat rows, whose P are all the same, that is the error."""
    q, k, v = model_like(8.0)
    flat = reference.attention(0 * q, k, v)[0]

    def error_of(recipe: Recipe) -> float:
        return reference.errors(simulator.attention(0 * q, k, v, recipe=recipe)[0], flat).rel_l2

    recipe = recipes()["int8"]
    assert error_of(recipe.replace(smooth_v=True)) <= 0.5 * error_of(recipe)
