"""P and V in E4M3, recipes int8_fp8 and fp8: the attention kernel on random operands against its simulator."""

from __future__ import annotations

import pytest

from cute_attn.kernels.attention_sm80 import AttentionConfig
from cute_attn.recipe import recipes

from .attention_operands import Operands, check

TWO_LEVELS = ("float32+float32", "float16+float32")
RECIPES = [(name, how) for name in ("int8_fp8", "fp8") for how in TWO_LEVELS]
INT8 = ("int8_fp8", "float32+float32")


def operands_of(recipe: tuple[str, str] = INT8, **shape) -> Operands:
    name, accumulate = recipe
    return Operands(recipe=recipes()[name].replace(accumulate=accumulate), **shape)


def config_of(recipe: tuple[str, str] = INT8, **fields) -> AttentionConfig:
    name, accumulate = recipe
    return AttentionConfig(**{"head_dim": 64, "has_lse": True} | fields, recipe=name, accumulate=accumulate)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(
    ("seq_q", "seq_k", "causal"), [(1, 1, False), (63, 200, True), (130, 127, True), (130, 65, False)]
)
def test_lengths(device, head_dim, recipe, seq_q, seq_k, causal):
    operands = operands_of(recipe, heads=3, kv_heads=1, seq_q=seq_q, seq_k=seq_k, head_dim=head_dim, seed=seq_k)
    check(operands, config_of(recipe, head_dim=head_dim, causal=causal), device)
