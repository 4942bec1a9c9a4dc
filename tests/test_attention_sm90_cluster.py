"""Clusters of the attention kernel of sm_90a: two CTAs that bring every KV tile together, half of it each."""

from __future__ import annotations

import pytest
import torch

from cute_attn import emulator
from cute_attn.tile_config import WarpgroupTileConfig

from .attention_operands import assert_rows_without_keys
from .test_attention_sm90 import NAMES, check, configured, launch, operands


def clustered(name: str = "int8_fp8", **changes):
    return configured(name, cluster=2, **changes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("seq_q", "seq_k", "causal"), [(1, 1, False), (500, 333, True), (200, 256, False), (129, 700, True)]
)
def test_recipes(device, name, seq_q, seq_k, causal):
    """A second CTA without rows, one with some, and tiles that only the second CTA's rows see."""
    config = clustered(name, head_dim=128 if seq_q == 200 else 64, causal=causal)
    check(operands(config, heads=3, kv_heads=1, seq_q=seq_q, seq_k=seq_k, seed=seq_k), config, device)


@pytest.mark.parametrize("head_dim", [40, 72])
@pytest.mark.parametrize(("warpgroups", "stages"), [(1, 1), (2, 3)])
def test_head_dims_and_tile_configs(device, head_dim, warpgroups, stages):
    config = clustered(head_dim=head_dim, warpgroups=warpgroups, stages=stages, causal=True)
    check(operands(config, heads=2, kv_heads=1, seq_q=300, seq_k=600), config, device)


@pytest.mark.parametrize(("name", "warpgroups"), [("int8_fp8", 2), ("int8", 1)])
def test_overlap(device, name, warpgroups):
    config = clustered(name, warpgroups=warpgroups, overlap=True, causal=True)
    check(operands(config, heads=2, kv_heads=1, seq_q=300, seq_k=500), config, device)


@pytest.mark.parametrize(("name", "causal"), [("int8_fp8", True), ("int8", False)])
def test_key_lengths(device, name, causal):
    config = clustered(name, causal=causal, warpgroups=1, varlen_k=True)
    o = operands(config, batch=7, seq_q=100, seq_k=300, key_lengths=[0, 1, 128, 129, 300, 10_000, -5])
    check(o, config, device)


def test_causal_rows_without_keys(device):
    config = clustered(causal=True, warpgroups=1)
    assert_rows_without_keys(*check(operands(config, seq_q=200, seq_k=70), config, device), 130)


@pytest.mark.parametrize("group", [3, 8])
def test_packed_heads(device, group):
    config = clustered(causal=True, warpgroups=2, pack_gqa=True)
    check(operands(config, batch=2, heads=2 * group, kv_heads=2, seq_q=70, seq_k=333), config, device)


def results(device, config, ctas: int = 5, seed: int | None = None):
    """out and lse of 2 · 4 · 4 blocks of 64 rows, in two L2 groups of heads."""
    with emulator.settings(seed=seed) if seed is not None else emulator.settings():
        o = operands(config, batch=2, heads=4, kv_heads=2, seq_q=200, seq_k=300)
        return launch(o, config, device, ctas=ctas)


SHARED_OUT = {"warpgroups": 1, "l2_bytes": 3 * 3 * 17 * 1024}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ctas", [1, 2, 5, 132])
def test_any_number_of_ctas(device, causal, ctas):
    """Too few for a cluster, of which there is one then; an odd number; more than there are blocks of rows."""
    alone = results(device, configured(persistent=False, causal=causal, **SHARED_OUT))
    for persistent in (True, False):
        config = clustered(persistent=persistent, causal=causal, **SHARED_OUT)
        for a, b in zip(alone, results(device, config, ctas), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_order_of_warps(device, causal, seed):
    """The CTAs of a cluster run ahead of one another by whatever the barriers let them."""
    config = clustered(causal=causal, **SHARED_OUT)
    for a, b in zip(results(device, config), results(device, config, seed=seed), strict=True):
        assert torch.equal(a, b)


def test_tile_config_says_so():
    assert WarpgroupTileConfig().cluster == 1
    with pytest.raises(ValueError, match=r"config.cluster=3; use one of 1, 2"):
        WarpgroupTileConfig(cluster=3)
