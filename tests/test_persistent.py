"""Persistent CTAs of the Hopper kernel: every block of rows is worked on once, whoever works on it."""

from __future__ import annotations

import pytest
import torch

import cute_attn
from cute_attn import emulator, reference
from cute_attn.tile_config import WarpgroupTileConfig
from cute_attn.work_sharing import multiprocessors, tickets

from .test_attention_sm90 import configured, launch, operands

PROBLEM = {"batch": 2, "heads": 4, "kv_heads": 2, "seq_q": 200, "seq_k": 300}


def results(device, *, ctas: int = 3, persistent: bool = True, seed: int | None = None, **changes):
    """out and lse of the same problem: 16 blocks of 128 rows or fewer, in two L2 groups of heads."""
    config = configured(warpgroups=2, persistent=persistent, l2_bytes=3 * 3 * 17 * 1024, **changes)
    with emulator.settings(seed=seed) if seed is not None else emulator.settings():
        return launch(operands(config, **PROBLEM), config, device, ctas=ctas)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ctas", [1, 5, 132, *(pytest.param(ctas, marks=pytest.mark.slow) for ctas in (2, 16))])
def test_any_number_of_ctas(device, causal, ctas):
    """One that does everything, numbers that do not divide the blocks, one for each, more than there are."""
    alone = results(device, persistent=False, causal=causal)
    together = results(device, ctas=ctas, causal=causal)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_any_order_of_warps(device, causal, seed):
    """Producers run ahead of their consumers, and warpgroups of one another, by whatever the barriers let them."""
    for a, b in zip(results(device, causal=causal), results(device, causal=causal, seed=seed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recipe", ["int8_fp8", "bf16"])
def test_key_lengths_of_blocks_differ(device, recipe):
    """Blocks without keys too; of bf16 a ragged end of V is cleared in one block after another."""
    q, k, v = (torch.randn(5, 2, 70, 64, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    lengths = torch.tensor([70, 0, 33, 1, 64], dtype=torch.int32)
    inputs = [x.to(device) for x in (q, k, v)]
    with emulator.settings(multiprocessors=3):
        out = cute_attn.attention(*inputs, recipe=recipe, key_lengths=lengths.to(device), arch="sm_90a")
    for b, length in enumerate(lengths.tolist()):
        if length == 0:
            assert out[b].eq(0).all()
        else:
            exact, _ = reference.attention(q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length])
            assert reference.errors(out[b : b + 1].cpu(), exact).rel_l2 < 0.06


def test_an_emulated_launch_that_ends_halfway_leaves_the_next_one_alone():
    """Each has a counter of its own, whatever the last one left in its."""
    cpu = torch.device("cpu")
    assert tickets(cpu).fill_(5) is not tickets(cpu)
    assert tickets(cpu).item() == 0


def test_the_emulated_chip_has_as_many_multiprocessors_as_its_settings_say():
    cpu = torch.device("cpu")
    assert multiprocessors(cpu) == 132
    for asked in (4, 7):
        with emulator.settings(multiprocessors=asked):
            assert multiprocessors(cpu) == asked


def test_tile_config_says_so():
    assert WarpgroupTileConfig().persistent
    with pytest.raises(ValueError, match="config.persistent=1; use True or False"):
        WarpgroupTileConfig(persistent=1)
