"""Clusters of the attention kernel of sm_90a: two CTAs that bring every KV tile together, half of it each."""

from __future__ import annotations

import pytest
import torch

import cute_attn
from cute_attn import emulator
from cute_attn.emulator.capture import launches
from cute_attn.emulator.trace import Recorder
from cute_attn.tile_config import WarpgroupTileConfig

from . import test_attention_sm90_16bit as floats
from .attention_operands import assert_rows_without_keys
from .test_attention_sm90 import NAMES, check, configured, launch, operands
from .test_unquantised import random_qkv

ONE = {"warpgroups": 1}
SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("seq_q", "seq_k", "causal"),
    [
        (150, 300, True),
        *(pytest.param(*p, marks=SLOW) for p in ((1, 1, False), (128, 256, False), (500, 333, True))),
    ],
)
def test_recipes(device, name, seq_q, seq_k, causal):
    """A second CTA without rows, one with some, and tiles that only the second CTA's rows see."""
    config = configured(name, cluster=2, causal=causal, **ONE)
    check(operands(config, heads=3, kv_heads=1, seq_q=seq_q, seq_k=seq_k, seed=seq_k), config, device)


@pytest.mark.parametrize(
    ("head_dim", "warpgroups", "stages"),
    [(40, 2, 3), *(pytest.param(*p, marks=SLOW) for p in ((72, 1, 1), (128, 3, 4)))],
)
def test_tile_configs(device, head_dim, warpgroups, stages):
    """Halves of images of any size; more tiles than stages."""
    config = configured(cluster=2, head_dim=head_dim, warpgroups=warpgroups, stages=stages, causal=True)
    check(operands(config, seq_q=warpgroups * 100, seq_k=600), config, device)


@pytest.mark.parametrize(("recipe", "head_dim"), [("fp16", 64), pytest.param("bf16", 72, marks=SLOW)])
def test_16_bit_recipes(device, recipe, head_dim):
    """Half the tokens of each block of channels, and a last tile of which a half has no tokens."""
    q, k, v = random_qkv(recipe, (1, 2, 100, head_dim), (1, 1, 310, head_dim))
    floats.check(floats.configured(recipe, cluster=2, head_dim=head_dim, causal=True, **ONE), q, k, v, device)


@pytest.mark.parametrize("name", ["int8_fp8", pytest.param("int8", marks=SLOW)])
def test_overlap(device, name):
    config = configured(name, cluster=2, overlap=True, causal=True, **ONE)
    check(operands(config, seq_q=120, seq_k=500), config, device)


@SLOW
def test_overlap_of_16_bit_recipes(device):
    q, k, v = random_qkv("fp16", (1, 1, 100, 64), (1, 1, 400, 64))
    floats.check(floats.configured(cluster=2, overlap=True, causal=True, **ONE), q, k, v, device)


@pytest.mark.parametrize(("name", "causal"), [("int8_fp8", True), pytest.param("int8", False, marks=SLOW)])
def test_key_lengths(device, name, causal):
    config = configured(name, cluster=2, causal=causal, varlen_k=True, **ONE)
    o = operands(config, batch=7, seq_q=100, seq_k=300, key_lengths=[0, 1, 128, 129, 300, 10_000, -5])
    check(o, config, device)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=SLOW) for seed in (1, 2))])
def test_key_lengths_of_tensors(device, seed):
    """Each CTA clears the end of V for itself, while the other one may be at the next head."""
    lengths = [1, 130, 0, 100, 33, 256, 60]
    q, k, v = random_qkv("fp16", (len(lengths), 1, 70, 64), (len(lengths), 1, 256, 64))
    for b, length in enumerate(lengths):
        k[b, :, length:] = v[b, :, length:] = torch.nan
    with emulator.settings(seed=seed):
        floats.check(floats.configured(cluster=2, varlen_k=True, stages=4, **ONE), q, k, v, device, lengths)


def test_causal_rows_without_keys(device):
    config = configured(cluster=2, causal=True, **ONE)
    assert_rows_without_keys(*check(operands(config, seq_q=200, seq_k=70), config, device), 130)


def test_packed_heads(device):
    config = configured(cluster=2, causal=True, pack_gqa=True, **ONE)
    check(operands(config, heads=6, kv_heads=2, seq_q=70, seq_k=333), config, device)


def results(device, ctas: int = 5, **changes):
    """out and lse of 3 · 4 blocks of 64 rows, in two L2 groups of heads."""
    config = configured(l2_bytes=2 * 2 * 17 * 1024, **ONE, **changes)
    return launch(operands(config, heads=3, kv_heads=3, seq_q=200, seq_k=200), config, device, ctas=ctas)


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=SLOW)])
def test_any_number_of_ctas(device, causal):
    """Too few for a cluster, of which there is one then; an odd number; more than there are blocks of rows."""
    alone = results(device, persistent=False, causal=causal)
    for persistent, ctas in ((True, 1), (True, 5), (True, 132), (False, 5)):
        together = results(device, ctas, cluster=2, persistent=persistent, causal=causal)
        assert torch.equal(alone[0], together[0]) and torch.equal(alone[1], together[1])


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=SLOW)])
def test_any_order_of_warps(device, causal):
    """The CTAs of a cluster run ahead of one another by whatever the barriers let them."""
    plain = results(device, cluster=2, causal=causal)
    for seed in (1, 2, 3):
        with emulator.settings(seed=seed):
            shuffled = results(device, cluster=2, causal=causal)
        assert torch.equal(plain[0], shuffled[0]) and torch.equal(plain[1], shuffled[1])


def copies(name: str, cluster: int) -> tuple[list[int], set[str]]:
    """Bytes of each arrival of K or V in shared memory, of 2 · 2 blocks of 64 rows; the instructions that asked."""
    recorder = Recorder(ctas=4)
    with emulator.settings(trace=recorder):
        if name == "fp16":
            q, k, v = random_qkv(name, (1, 2, 128, 64), (1, 2, 384, 64))
            floats.run(floats.configured(cluster=cluster, **ONE), q, k, v, torch.device("cpu"))
        else:
            config = configured(name, cluster=cluster, **ONE)
            launch(operands(config, heads=2, kv_heads=2, seq_q=128, seq_k=384), config, torch.device("cpu"), ctas=4)
    (trace,) = recorder.launches
    arrivals = [o.nbytes for cta in trace.operations.values() for o in cta if o.engine == "copies into this CTA"]
    opcodes = {opcode for opcode in launches()[-1].instructions if opcode.startswith("cp.async.bulk")}
    return [n for n in arrivals if n > 4], opcodes  # 4: in a cluster, the number of the next block


@pytest.mark.parametrize("name", ["int8_fp8", "fp16"])
def test_l2_is_read_half_as_often(monkeypatch, name):
    """Twice as many arrivals of half the size, of which two are one copy."""
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    whole, (opcode,) = copies(name, 1)
    halves, (multicast,) = copies(name, 2)
    assert sorted(halves) == sorted(n // 2 for n in whole for _ in range(2))
    assert "multicast::cluster" in multicast
    assert "multicast" not in opcode


def test_tile_config(device):
    q, k, v = (x.to(device) for x in random_qkv("fp16", (1, 2, 200, 64), (1, 2, 300, 64)))
    plain, clustered = (
        cute_attn.attention(q, k, v, recipe="int8_fp8", arch="sm_90a", config=WarpgroupTileConfig(cluster=cluster))
        for cluster in (1, 2)
    )
    assert torch.equal(plain, clustered)
    with pytest.raises(ValueError, match=r"config.cluster=3; use one of 1, 2"):
        WarpgroupTileConfig(cluster=3)
