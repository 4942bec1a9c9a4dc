"""`attention` and `quantize` end to end for sm_90a on the emulator: which kernel serves a call, and its tiles."""

from __future__ import annotations

import pytest
import torch

import cute_attn
from cute_attn import Problem, TileConfig, WarpgroupTileConfig, dispatch, recipes
from cute_attn.arch import ARCHS

from .test_attention import assert_close, random_qkv

HOPPER = ARCHS["sm_90a"]
SERVED = ("int8_fp8", "fp8", "int8", "int8_fp16", "fp16", "bf16")


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")


def problem_of(recipe, head_dim=64, seq_q=4096, causal=False):
    return Problem(1, 4, 2, seq_q, 4096, head_dim, recipe.dtypes[0], causal)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize(("head_dim", "causal"), [(64, True), (128, False), (96, True)])
def test_recipes(name, head_dim, causal):
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    q, k, v = random_qkv((1, 4, 70, head_dim), (1, 2, 200, head_dim), dtype)
    options = {"recipe": name, "causal": causal, "arch": "sm_90a"}
    out, lse = cute_attn.attention(q, k, v, return_lse=True, **options)
    assert_close(out, lse, q, k, v, **options)


@pytest.mark.parametrize("name", SERVED)
def test_warpgroup_kernels_are_the_first_choice(name):
    recipe = recipes()[name]
    assert isinstance(dispatch.default_config(recipe, problem_of(recipe), HOPPER), WarpgroupTileConfig)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("int8", {"smooth_q": True}), ("int8_fp16", {"accumulate": "float16"})],
)
def test_what_they_lack_is_served_by_warp_mma(name, changes):
    recipe = recipes()[name].replace(**changes)
    assert isinstance(dispatch.default_config(recipe, problem_of(recipe), HOPPER), TileConfig)
    q, k, v = random_qkv((1, 2, 40, 64), (1, 1, 100, 64))
    out, lse = cute_attn.attention(q, k, v, recipe=recipe, return_lse=True, arch="sm_90a")
    assert_close(out, lse, q, k, v, recipe=recipe, arch="sm_90a")


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("int8_fp8", {"smooth_q": True}, "smooth_q=True"),
        ("fp8", {"accumulate": "float16+float32"}, "accumulate='float16+float32'"),
    ],
)
def test_what_nothing_there_serves(name, changes, text):
    recipe = recipes()[name].replace(**changes)
    reason = dispatch.supports(recipe, "sm_90a", problem_of(recipe)).reason
    assert reason == f"recipe {name!r} with {text} has no kernel for sm_90a (H100, H200); it runs on sm_89, sm_120a"


def test_a_tile_config_names_the_kernel():
    q, k, v = random_qkv((1, 2, 70, 64), (1, 1, 150, 64))
    for config in (
        TileConfig(warps=2),
        WarpgroupTileConfig(warpgroups=1),
        WarpgroupTileConfig(warpgroups=2, stages=1),
        WarpgroupTileConfig(warpgroups=2, overlap=True),
    ):
        options = {"recipe": "int8", "causal": True, "config": config, "arch": "sm_90a"}
        out, lse = cute_attn.attention(q, k, v, return_lse=True, **options)
        assert_close(out, lse, q, k, v, **options)


@pytest.mark.parametrize("name", ["int8_fp8", "fp8", "int8"])
def test_quantised_once(name):
    q, k, v = random_qkv((1, 2, 70, 64), (1, 1, 150, 64))
    quantised = cute_attn.quantize(q, k, v, recipe=name, arch="sm_90a")
    assert (quantised.kv.tile.tokens, quantised.kv.tile.sum_rows) == (128, 8)
    assert quantised.kv.image.shape[2] == 2
    once = cute_attn.attention(*quantised, arch="sm_90a")
    assert torch.equal(once, cute_attn.attention(q, k, v, recipe=name, arch="sm_90a"))
    for plain, given in zip((quantised.q.to_plain(), *quantised.kv.to_plain()), (q, k, v), strict=True):
        assert (plain - given.float()).abs().max() < 0.2


def test_tiles_of_another_chip():
    q, k, v = random_qkv((1, 2, 10, 64), (1, 1, 20, 64))
    quantised = cute_attn.quantize(q, k, v, arch="sm_80")
    message = r"k holds tiles of 64 tokens, the kernels of sm_90a and WarpgroupTileConfig.* read 128; quantise it with"
    with pytest.raises(ValueError, match=message):
        cute_attn.attention(*quantised, arch="sm_90a")
    out = cute_attn.attention(*quantised, arch="sm_90a", config=TileConfig())
    assert torch.equal(out, cute_attn.attention(q, k, v, arch="sm_90a", config=TileConfig()))


def test_tiles_of_another_accumulator():
    """There, float16 accumulators are those of the warp-MMA kernels, which read other tiles of the same formats."""
    q, k, v = random_qkv((1, 2, 10, 64), (1, 1, 20, 64))
    recipe = recipes()["int8_fp16"].replace(accumulate="float16")
    quantised = cute_attn.quantize(q, k, v, recipe="int8_fp16", arch="sm_90a")
    with pytest.raises(ValueError, match="quantise it with the recipe of this call"):
        cute_attn.attention(*quantised, recipe=recipe, arch="sm_90a")
    quantised = cute_attn.quantize(q, k, v, recipe=recipe, arch="sm_90a")
    out = cute_attn.attention(*quantised, arch="sm_90a")
    assert torch.equal(out, cute_attn.attention(q, k, v, recipe=recipe, arch="sm_90a"))


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("head_dim", range(16, 257, 8))
def test_every_head_dim_has_a_tile_config(name, head_dim):
    recipe = recipes()[name]
    for seq_q in (1, 100, 150, 4096):
        problem = problem_of(recipe, head_dim, seq_q)
        assert dispatch.supports(recipe, "sm_90a", problem)
        tile = dispatch.default_config(recipe, problem, HOPPER)
        assert tile.rows >= min(seq_q, 64)
