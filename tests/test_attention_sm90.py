"""The attention kernels of sm_90a by themselves, on random quantised operands, against their simulator."""

from __future__ import annotations

import pytest
import torch

from cute_attn.commands.check import LSE_TOLERANCE
from cute_attn.kernels.attention_sm90 import AttentionSm90, AttentionSm90Config
from cute_attn.recipe import recipes

from .attention_operands import Operands, run, simulate_rows
from .conftest import assert_lse_close, assert_out_close

NAMES = ("int8_fp8", "fp8", "int8", "int8_fp16")


def configured(name: str = "int8_fp8", **changes) -> AttentionSm90Config:
    recipe = recipes()[name]
    usual = {"head_dim": 64, "has_lse": True, "stages": 2}
    return AttentionSm90Config(**(usual | {"recipe": name, "accumulate": recipe.accumulate} | changes))


def operands(config: AttentionSm90Config, smooth_v: bool = False, **problem) -> Operands:
    """Of the config's recipe. Scores of E4M3 are smaller: their sums, and the roundings of P, depend on the order."""
    recipe = recipes()[config.recipe].replace(smooth_v=config.smooth_v)
    tiles = {"tile_tokens": 128, "sum_rows": 8, "share_k_scale": not config.k_scale_per_token}
    return Operands(head_dim=config.head_dim, recipe=recipe, **tiles, **problem)


def launch(o: Operands, config: AttentionSm90Config, device: torch.device, out: torch.Tensor | None = None):
    return run(o, config, device, out, AttentionSm90, "sm_90a")


def check(
    o: Operands, config: AttentionSm90Config, device: torch.device, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel, into ``out`` if given, holds it to the simulator, returns what it gave.

    Where K's and Q's scales meet in one factor, a score may be rounded otherwise than the simulator's, and with it a P.
    """
    out, lse = launch(o, config, device, out)
    expected, expected_lse = simulate_rows(o, config.causal, out.dtype, warp_rows=16, cta_rows=64)
    assert_out_close(out, expected, o.recipe)
    if config.k_scale_per_token:
        assert_lse_close(lse.to(device), expected_lse, o.recipe)
    else:
        tolerance = {"rtol": 1e-5, "atol": LSE_TOLERANCE[o.recipe.pv_format]}
        torch.testing.assert_close(lse, expected_lse, equal_nan=True, **tolerance)
    return out, lse


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("k_scale_per_token", [False, True])
@pytest.mark.parametrize(
    ("seq_q", "seq_k", "causal"), [(1, 1, False), (200, 333, True), (193, 256, False), (65, 129, True)]
)
def test_recipes(device, name, head_dim, k_scale_per_token, seq_q, seq_k, causal):
    """Ragged ends, tiles that need a mask and those that do not, and warpgroups without rows."""
    config = configured(name, head_dim=head_dim, causal=causal, k_scale_per_token=k_scale_per_token)
    check(operands(config, heads=3, kv_heads=1, seq_q=seq_q, seq_k=seq_k, seed=seq_k), config, device)
