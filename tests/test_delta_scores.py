"""ΔS = q̄·(k − k̄) of the kernel and of its simulator against float64, within the bound that the kernel states."""

from __future__ import annotations

import math
import re

import pytest
import torch

from cute_attn import emulator, jit, quantizer_simulator
from cute_attn.arguments import resolve_arch
from cute_attn.cubin import kernel_resources
from cute_attn.emulator.errors import DataRace
from cute_attn.kernels.delta_scores import DeltaConfig, DeltaScores
from cute_attn.kernels.rows import QuantizerConfig
from cute_attn.kernels.tile_image import TILE_TOKENS
from cute_attn.tensors import DTYPE_NAMES, alignment

from .mutants import findings


def draw(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    """N(0, 1) with outlier channels that have a mean, as keys do."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[..., 3::16] = 10 * x[..., 3::16] + 50
    return x.to(dtype)


def run(q_mean, k, k_mean, device: torch.device, lengths: list[int] | None = None) -> torch.Tensor:
    """The kernel's ΔS, on the CPU; its memory starts as something that no result is."""
    config = DeltaConfig(QuantizerConfig(k.shape[3], DTYPE_NAMES[k.dtype], alignment(k)), lengths is not None)
    kernel = jit.load(DeltaScores, config, resolve_arch(None, k).name, jit.backend())
    width = -(-k.shape[2] // TILE_TOKENS) * TILE_TOKENS
    delta = torch.full((*q_mean.shape[:3], width), math.nan, device=device)
    key_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=device)
    kernel(q_mean.to(device), k, k_mean.to(device), key_lengths, delta)
    return delta.cpu()


def check(q_mean, k, device: torch.device, lengths: list[int] | None = None) -> torch.Tensor:
    """Kernel and simulator are within (D + 2)·2^-23·Σ|q̄|(|k| + |k̄|) of float64, and 0 past the end; the kernel's.

    NaN in k is what must not be read.
    """
    k_mean = k.nan_to_num().float().mean(2).cpu()
    delta = run(q_mean, k, k_mean, device, lengths)
    k, group = k.cpu().nan_to_num(), q_mean.shape[1] // k.shape[1]

    def rows(keys: torch.Tensor, mean: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return q.double() @ (keys.double() + mean.double()[:, :, None]).repeat_interleave(group, 1).mT

    expected = rows(k, -k_mean, q_mean)
    bound = (k.shape[3] + 2) * 2.0**-23 * rows(k.abs(), k_mean.abs(), q_mean.abs())
    for batch, length in enumerate(lengths or [k.shape[2]] * k.shape[0]):
        expected[batch, ..., max(length, 0) :] = 0
        bound[batch, ..., max(length, 0) :] = 0
    simulated = quantizer_simulator.delta_scores(q_mean, k, k_mean, None if lengths is None else torch.tensor(lengths))
    for result in (delta, simulated):
        assert result.shape == delta.shape
        assert ((result[..., : k.shape[2]].double() - expected).abs() <= bound).all()
        assert not result[..., k.shape[2] :].any()
    return delta


HEAD_DIMS = [16, 40, 64, 72, 96, 128, 160, 256]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    "head_dim",
    [*HEAD_DIMS, *(pytest.param(d, marks=pytest.mark.slow) for d in range(16, 257, 8) if d not in HEAD_DIMS)],
)
def test_head_dims(device, head_dim, dtype):
    q_mean, k = (draw(1, 1, tokens, head_dim, dtype=dtype, seed=tokens) for tokens in (2, 150))
    check(q_mean, k.to(device), device)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128, 129, 200])
def test_lengths(device, tokens):
    check(draw(2, 2, 3, 64), draw(2, 2, tokens, 64, seed=1).to(device), device)


@pytest.mark.parametrize(("heads", "blocks"), [(2, 1), (6, 1), (6, 5), (4, 8), (2, 17)])
def test_rows_of_a_head_group(device, heads, blocks):
    """One row, a part of 16, exactly 16, and more; every row meets the keys of its own KV head."""
    check(draw(2, heads, blocks, 72), draw(2, 2, 70, 72, seed=1).to(device), device)


def test_lengths_of_a_batch(device):
    """Keys past the end of their own sequence are neither read nor counted; a length out of range is cut."""
    k, lengths = draw(4, 2, 140, 40, seed=1), [1000, -5, 70, 64]
    for batch, length in enumerate(lengths):
        k[batch, :, max(length, 0) :] = math.nan
    check(draw(4, 4, 2, 40), k.to(device), device, lengths)


@pytest.mark.parametrize("padding", [8, 4, 2, 1], ids=lambda p: f"row+{p}")
def test_strides(device, padding):
    """[B, S, H, D] storage, every other token, rows apart by D + padding: loads of 16 to 2 bytes give the same bits."""
    storage = draw(2, 140, 2, 72 + padding, seed=1).to(device)
    k = storage[:, ::2, :, :72].transpose(1, 2)
    assert alignment(k) == math.gcd(16, 2 * (72 + padding))
    q_mean = draw(2, 2, 3, 72)
    assert torch.equal(check(q_mean, k, device), check(q_mean, k.contiguous(), device))


def test_what_lies_beyond_the_head_dim_is_not_read(device):
    storage = draw(1, 1, 70, 64, seed=1).to(device)
    storage[..., 40:] = math.nan
    check(draw(1, 1, 2, 40), storage[..., :40], device)


def test_keys_of_a_large_mean(device):
    """What is left of k after its mean is 1/1000 of it: the subtraction in float32 keeps 4 digits of ΔS."""
    k = (draw(1, 1, 100, 64, seed=1).double() * 0.02 + 20).half()
    q_mean = draw(1, 1, 2, 64)
    delta = check(q_mean, k.to(device), device)
    exact = q_mean.double() @ (k.double() - k.double().mean(2, keepdim=True)).mT
    assert (delta[..., :100] - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("accumulation", ["float32", "hardware"])
def test_sums_of_tensor_cores(device, accumulation):
    with emulator.settings(accumulation=accumulation):
        check(draw(1, 1, 3, 128), draw(1, 1, 70, 128, seed=1).to(device), device)


@pytest.mark.parametrize("seed", range(3))
def test_order_of_warps_and_ctas_does_not_matter(device, seed):
    q_mean, k = draw(1, 2, 20, 64), draw(1, 1, 200, 64, seed=1).to(device)
    usual = check(q_mean, k, device)
    with emulator.settings(seed=seed):
        assert torch.equal(check(q_mean, k, device), usual)


def test_every_barrier_is_needed(monkeypatch):
    """Two rounds of 16 rows, so that the second could overwrite what the first reads."""
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    q_mean, k = draw(1, 1, 17, 64), draw(1, 1, 70, 64, seed=1)
    found = findings("DeltaScores", r"bar\.sync", lambda: run(q_mean, k, torch.zeros(1, 1, 64), torch.device("cpu")))
    assert len(found) == 3
    assert all(isinstance(error, DataRace) for error in found.values())


def test_refused_configuration():
    assert "head dim" in DeltaScores.can_implement(DeltaConfig(QuantizerConfig(84, "float16")))
    with pytest.raises(ValueError, match="head dim"):
        DeltaScores(DeltaConfig(QuantizerConfig(84, "float16")))


@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_89", marks=pytest.mark.slow)])
@pytest.mark.parametrize("head_dim", [64, 128, 160, 256])
def test_compiled_code(head_dim, arch):
    """No spills, 16-byte accesses, and as many MMAs as the padded product has."""
    built = jit.build(DeltaScores, DeltaConfig(QuantizerConfig(head_dim, "bfloat16")), arch)
    for resources in kernel_resources(built.cubin).values():
        assert resources.stack_bytes == 0
        assert resources.registers <= 168
    assert set(re.findall(r"(?:ld|st)\.global\S*", built.ptx)) == {"ld.global.v4.b32", "st.global.v4.b32"}
    tiles = 4 if head_dim <= 128 else 2
    assert built.ptx.count("mma.sync") == head_dim // 16 * tiles
