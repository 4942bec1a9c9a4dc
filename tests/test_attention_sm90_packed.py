"""Packed query heads of the attention kernels of sm_90a: rows of a CTA are the heads that share K and V, by token."""

from __future__ import annotations

import math

import pytest
import torch

import cute_attn
from cute_attn import Problem, WarpgroupTileConfig, dispatch, emulator, recipes
from cute_attn.arch import ARCHS

from . import test_attention_sm90_16bit as floats
from .test_attention import assert_close, random_qkv
from .test_attention_sm90 import check, configured, launch, operands
from .test_unquantised import random_qkv as random_floats

NAMES = ("int8_fp8", "fp8", "int8", "int8_fp16")


@pytest.mark.parametrize("group", [1, 2, 3, 7, 8])
@pytest.mark.parametrize(("seq_q", "seq_k", "causal"), [(1, 1, False), (5, 130, True), (70, 333, True)])
def test_groups(device, group, seq_q, seq_k, causal):
    """Groups that divide the 8 rows between a lane's two and groups that do not; warpgroups that begin within a token,
    ragged ends, and warpgroups without rows."""
    config = configured(causal=causal, pack_gqa=True, k_scale_per_token=group == 3)
    check(operands(config, batch=2, heads=2 * group, kv_heads=2, seq_q=seq_q, seq_k=seq_k, seed=group), config, device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("head_dim", "causal"), [(128, True), (40, False)])
def test_recipes(device, name, head_dim, causal):
    config = configured(name, head_dim=head_dim, causal=causal, smooth_v=True, pack_gqa=True)
    check(operands(config, heads=6, kv_heads=2, seq_q=45, seq_k=300), config, device)


@pytest.mark.parametrize("recipe", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("group", "seq_q", "seq_k", "causal"), [(8, 1, 200, True), (3, 50, 170, True), (2, 5, 9, False)]
)
def test_16_bit_recipes(device, recipe, group, seq_q, seq_k, causal):
    q, k, v = random_floats(recipe, (2, 2 * group, seq_q, 64), (2, 2, seq_k, 64), seed=group)
    floats.check(floats.configured(recipe, causal=causal, pack_gqa=True), q, k, v, device)
