"""Tile configs whose products overlap with the softmax of their own warpgroup, against the simulators."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cute_attn import emulator, reference
from cute_attn.kernels.attention_sm90 import AttentionSm90

from . import test_attention_sm90 as images
from . import test_attention_sm90_16bit as tensors
from .test_unquantised import random_qkv

WAYS = {"overlap": True, "warpgroups": 2}
SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", images.NAMES)
@pytest.mark.parametrize(
    ("seq_q", "seq_k"), [(1, 1), (100, 333), *(pytest.param(*p, marks=SLOW) for p in ((65, 256), (150, 129)))]
)
@pytest.mark.parametrize(
    ("head_dim", "causal"),
    [(64, True), *(pytest.param(*which, marks=SLOW) for which in ((64, False), (128, False), (128, True)))],
)
def test_recipes(device, name, head_dim, causal, seq_q, seq_k):
    """One tile and several, ragged and whole, with a mask and without; warpgroups without rows or keys."""
    config = images.configured(name, head_dim=head_dim, causal=causal, **WAYS)
    images.check(images.operands(config, heads=2, kv_heads=1, seq_q=seq_q, seq_k=seq_k, seed=seq_k), config, device)


@pytest.mark.parametrize("recipe", ["fp16", "bf16"])
@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=SLOW)])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 1), (100, 333), (150, 129)])
def test_unquantised_recipes(device, recipe, seq_q, seq_k, causal):
    """K comes one tile ahead of V; of tiles that a warpgroup leaves unread, the last V comes after K of the next."""
    q, k, v = random_qkv(recipe, (1, 2, seq_q, 64), (1, 1, seq_k, 64))
    tensors.check(tensors.configured(recipe, causal=causal, **WAYS), q, k, v, device)


@pytest.mark.parametrize(("warpgroups", "stages", "causal"), [(1, 2, True), (2, 3, False)])
def test_tile_configs(device, warpgroups, stages, causal):
    """More tiles than stages, and rows for which some of the tiles that their CTA brings are of no use."""
    changes = {"overlap": True, "warpgroups": warpgroups, "stages": stages, "causal": causal}
    config = images.configured(head_dim=32, **changes)
    images.check(images.operands(config, seq_q=140, seq_k=700), config, device)
    q, k, v = random_qkv("fp16", (1, 1, 140, 32), (1, 1, 700, 32))
    tensors.check(tensors.configured(head_dim=32, **changes), q, k, v, device)


@pytest.mark.parametrize("name", ["int8_fp8", *(pytest.param(name, marks=SLOW) for name in images.NAMES[1:])])
def test_same_bits_as_without(device, name):
    """The same operations on the same numbers, in another order."""
    config = images.configured(name, causal=True, warpgroups=2, k_scale_per_token=True)
    o = images.operands(config, seq_q=150, seq_k=500, k_scale=1e-2)
    plain, ahead = (images.launch(o, replace(config, overlap=overlap), device) for overlap in (False, True))
    assert torch.equal(plain[0], ahead[0]) and torch.equal(plain[1], ahead[1])


def test_exponentials_on_the_fma_pipe(device):
    """Their exponents are rounded once more, by less than they are off."""
    config = images.configured("fp8", causal=True, **WAYS)
    o = images.operands(config, seq_q=70, seq_k=300, k_scale=1e-4)
    (none, _), (some, _) = (images.launch(o, replace(config, fma_eighths=n), device) for n in (0, 2))
    assert 0 < reference.errors(some.double(), none.double()).rel_l2 <= 0.01


@pytest.mark.parametrize(("name", "causal"), [("int8_fp8", True), ("int8", False)])
def test_key_lengths(device, name, causal):
    lengths = [0, 1, 128, 129, 300, 10_000, -5]
    config = images.configured(name, causal=causal, varlen_k=True, **WAYS)
    images.check(images.operands(config, batch=7, seq_q=100, seq_k=300, key_lengths=lengths), config, device)


def test_key_lengths_of_tensors(device):
    lengths = [300, 130, 256, 1, 0]
    q, k, v = random_qkv("fp16", (len(lengths), 1, 90, 64), (len(lengths), 1, 300, 64))
    for b, length in enumerate(lengths):
        k[b, :, length:], v[b, :, length:] = math.nan, math.nan
    tensors.check(tensors.configured(causal=True, varlen_k=True, **WAYS), q, k, v, device, lengths)


@pytest.mark.parametrize("name", ["int8_fp8", "int8"])
def test_causal_rows_without_keys(device, name):
    config = images.configured(name, causal=True, **WAYS)
    out, lse = images.check(images.operands(config, seq_q=200, seq_k=70), config, device)
    assert (out[:, :, :130] == 0).all() and (lse[:, :, :130] == -math.inf).all()


def test_zero_keys(device):
    config = images.configured(causal=True, **WAYS)
    o = images.operands(config, seq_q=40, seq_k=1)
    o.seq_k, o.image = 0, o.image[:, :, :0]
    out, lse = images.launch(o, config, device)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("k_scale", [1e-6, 1.0])
@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_scores_of_any_size(device, name, k_scale):
    """With scores of a million, rows are rescaled between most tiles."""
    config = images.configured(name, causal=True, **WAYS)
    images.check(images.operands(config, seq_q=40, seq_k=500, k_scale=k_scale), config, device)


@pytest.mark.parametrize("name", ["int8_fp8", "int8"])
def test_order_of_warps_does_not_matter(monkeypatch, name):
    """Nor how late copies and MMAs finish; and nothing reads what nobody wrote."""
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    config = images.configured(name, causal=True, **WAYS)
    o = images.operands(config, seq_q=130, seq_k=500)
    with emulator.settings(uninitialized_shared="poison", races=True):
        plain = images.launch(o, config, torch.device("cpu"))
        for seed in range(3):
            with emulator.settings(seed=seed):
                again = images.launch(o, config, torch.device("cpu"))
            assert torch.equal(plain[0], again[0]) and torch.equal(plain[1], again[1])


@pytest.mark.parametrize("varlen", [False, True])
def test_order_of_warps_does_not_matter_to_tensors(monkeypatch, varlen):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    q, k, v = random_qkv("fp16", (1, 1, 130, 72), (1, 1, 500, 72))
    config = tensors.configured(head_dim=72, causal=True, varlen_k=varlen, **WAYS | {"stages": 2})
    arguments = (config, q, k, v, torch.device("cpu"), [410] if varlen else None)
    with emulator.settings(uninitialized_shared="poison", races=True):
        plain = tensors.run(*arguments)
        for seed in range(3):
            with emulator.settings(seed=seed):
                again = tensors.run(*arguments)
            assert torch.equal(plain[0], again[0]) and torch.equal(plain[1], again[1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"warpgroups": 3}, "overlap=True needs registers .* warpgroups=3 leave 160 a thread: use warpgroups=2 or 1"),
        ({"stages": 1}, "overlap=True needs .* stages=1 .*: use stages=2 or more"),
        ({"exponent": "fast"}, "overlap=True has no 2\\^x .*: use exponent='exact', or overlap=False"),
        ({"head_dim": 192}, "overlap=True leaves 176 registers .* head_dim=192 .*: use a smaller head_dim"),
        ({"head_dim": 128, "k_scale_per_token": True}, "leaves 152 registers .* k_scale_per_token=True: use a smaller"),
    ],
)
def test_refused_configs(change, reason):
    with pytest.raises(ValueError, match=reason):
        AttentionSm90(images.configured(**WAYS | change))
