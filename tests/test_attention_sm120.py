"""P and V in E4M3 on sm_120a, whose kernels keep accumulators in another way than sm_89's and have tiles of their own.

On the emulator: the warp-MMA kernel by itself on random operands against its simulator, then through `attention`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import pytest
import torch

import cute_attn
from cute_attn import emulator
from cute_attn.arch import ARCHS
from cute_attn.default_tiles import warp_tile
from cute_attn.kernels.attention_sm80 import AttentionConfig
from cute_attn.problem import Problem
from cute_attn.recipe import recipes

from .attention_operands import Operands, run, simulate
from .conftest import assert_lse_close, assert_out_close
from .test_attention import assert_close, random_qkv

RECIPES = [(name, how) for name in ("int8_fp8", "fp8") for how in ("float32+float32", "float16+float32")]


def operands_of(recipe: tuple[str, str], *, smooth_v: bool = False, **shape) -> Operands:
    name, accumulate = recipe
    return Operands(recipe=recipes()[name].replace(accumulate=accumulate, smooth_v=smooth_v), **shape)


def config_of(recipe: tuple[str, str], **fields) -> AttentionConfig:
    name, accumulate = recipe
    return AttentionConfig(**{"head_dim": 64, "has_lse": True} | fields, recipe=name, accumulate=accumulate)


CPU = torch.device("cpu")
HEAD_DIMS = (64, 96, 128, 192)
LENGTHS = [(1, 1, False), (63, 200, True), (130, 127, True), (200, 333, True), (200, 256, False), (70, 65, False)]
PUBLIC = [(63, 200, True), (200, 333, True), (130, 190, False)]


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")


def usual_config(recipe: tuple[str, str], head_dim: int, **fields) -> AttentionConfig:
    """With the tile config of long sequences."""
    name, accumulate = recipe
    long = Problem(1, 1, 1, 4096, 4096, head_dim, "float16", False)
    tile = warp_tile(recipes()[name].replace(accumulate=accumulate), long, ARCHS["sm_120a"])
    sizes = {"warps": tile.warps, "m_tiles": tile.m_tiles, "stages": tile.stages}
    return config_of(recipe, head_dim=head_dim, **sizes, **fields)


def check(operands: Operands, config: AttentionConfig) -> None:
    out, lse = run(operands, config, CPU, arch="sm_120a")
    expected, expected_lse = simulate(operands, config)
    assert_out_close(out, expected, operands.recipe)
    assert_lse_close(lse, expected_lse, operands.recipe)


def some_slow(parameters: Iterable[tuple], quick: list[tuple]) -> list:
    """All parameters, of which these are quick."""
    parameters = list(parameters)
    assert {*quick} <= {*parameters}
    return [p if p in quick else pytest.param(*p, marks=pytest.mark.slow) for p in parameters]


@pytest.mark.parametrize(
    ("head_dim", "recipe", "lengths"),
    some_slow(
        product(HEAD_DIMS, RECIPES, LENGTHS),
        [*zip(HEAD_DIMS, RECIPES, (LENGTHS[3], *LENGTHS[1:3], LENGTHS[5]), strict=True)],
    ),
    ids=str,
)
def test_lengths_and_head_dims(head_dim, recipe, lengths):
    """Three query heads share keys; ragged ends, tiles that need a mask and those that do not."""
    seq_q, seq_k, causal = lengths
    operands = operands_of(recipe, heads=3, kv_heads=1, seq_q=seq_q, seq_k=seq_k, head_dim=head_dim, seed=seq_k)
    check(operands, usual_config(recipe, head_dim, causal=causal))


@pytest.mark.parametrize(
    ("recipe", "heads", "kv_heads"),
    some_slow(
        ((recipe, *heads) for recipe in RECIPES for heads in ((6, 3), (5, 1), (2, 2))),
        [(RECIPES[0], 6, 3), (RECIPES[3], 5, 1)],
    ),
    ids=str,
)
def test_batches_heads_and_key_lengths(recipe, heads, kv_heads):
    shape = {"batch": 3, "heads": heads, "kv_heads": kv_heads, "seq_q": 40, "seq_k": 150}
    operands = operands_of(recipe, smooth_v=True, key_lengths=[0, 65, 150], **shape)
    check(operands, config_of(recipe, causal=True, varlen_k=True, smooth_v=True))


@pytest.mark.parametrize(
    ("head_dim", "stages", "recipe", "seed"),
    some_slow(
        product(HEAD_DIMS, (1, 2), RECIPES, range(4)),
        [(64, stages, recipe, seed) for stages, recipe in ((2, RECIPES[1]), (1, RECIPES[2])) for seed in range(2)],
    ),
    ids=str,
)
def test_order_of_warps_does_not_matter(head_dim, stages, recipe, seed):
    """Nor how late copies finish; and nothing reads what nobody wrote."""
    operands = operands_of(recipe, heads=2, kv_heads=1, seq_q=130, seq_k=300, head_dim=head_dim)
    config = config_of(recipe, head_dim=head_dim, causal=True, stages=stages, m_tiles=1)
    with emulator.settings(uninitialized_shared="poison", races=True):
        plain = run(operands, config, CPU, arch="sm_120a")
        with emulator.settings(seed=seed):
            shuffled = run(operands, config, CPU, arch="sm_120a")
    assert all(torch.equal(x, y) for x, y in zip(plain, shuffled, strict=True))


@pytest.mark.parametrize(
    ("head_dim", "recipe", "lengths"),
    some_slow(product(HEAD_DIMS, RECIPES, PUBLIC), [(96, RECIPES[1], PUBLIC[0]), (128, RECIPES[2], PUBLIC[1])]),
    ids=str,
)
def test_public_calls(head_dim, recipe, lengths):
    """With that arch's quantisers before the kernel. No row has few keys: the LSE of one is off by 0.06 and more."""
    (name, accumulate), (seq_q, seq_k, causal) = recipe, lengths
    q, k, v = random_qkv((1, 4, seq_q, head_dim), (1, 2, seq_k, head_dim), seed=head_dim)
    options = {"recipe": recipes()[name].replace(accumulate=accumulate), "causal": causal, "arch": "sm_120a"}
    out, lse = cute_attn.attention(q, k, v, return_lse=True, **options)
    assert_close(out, lse, q, k, v, **options)
