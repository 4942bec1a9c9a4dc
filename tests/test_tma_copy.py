"""TMA on the emulator, with tensor maps and shared layouts as the CuTe DSL makes them."""

from __future__ import annotations

import pytest
import torch

from cute_attn import emulator, jit
from cute_attn.emulator.errors import DataRace

from .tma_copy import TmaCopy, TmaCopyConfig

ARCHS = ["sm_90a", "sm_120a"]


@pytest.fixture(autouse=True)
def on_the_emulator(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("CUTE_ATTN_CACHE_DIR", str(tmp_path))


def run(config: TmaCopyConfig, arch: str, x: torch.Tensor, out: torch.Tensor | None = None) -> tuple:
    """(what the threads read in shared memory, what was stored by TMA)"""
    read = torch.zeros_like(x)
    out = torch.zeros_like(x) if out is None else out
    jit.load(TmaCopy, config, arch, "emulator")(x, read, out)
    return read, out


def matrix(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-100, 100, (rows, columns), generator=torch.Generator().manual_seed(0)).to(dtype)


CONFIGS = [
    (TmaCopyConfig(), torch.float16),
    (TmaCopyConfig("BFloat16", 32, 32, 64), torch.bfloat16),
    (TmaCopyConfig("Float32", 16, 8, 32), torch.float32),
    (TmaCopyConfig("Int8", 64, 128), torch.int8),
    (TmaCopyConfig("Int32", 32, 64, 0), torch.int32),
    (TmaCopyConfig("Int8", 8, 512, 0), torch.int8),  # more than a box has: two copies that report to one barrier
]


@pytest.mark.parametrize("config,dtype", CONFIGS)
@pytest.mark.parametrize("arch", ARCHS)
def test_whole_and_partial_tiles(config, dtype, arch):
    x = matrix(2 * config.rows + 5, 3 * config.columns - 16 // dtype.itemsize, dtype)
    read, out = run(config, arch, x)
    assert torch.equal(read, x) and torch.equal(out, x)


def test_rows_with_gaps():
    whole = matrix(100, 192, torch.float16)
    read, out = run(TmaCopyConfig(), "sm_90a", whole[:, 8:136], torch.zeros(100, 256, dtype=torch.float16)[:, :128])
    assert torch.equal(read, whole[:, 8:136]) and torch.equal(out, whole[:, 8:136])


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_multicast(seed):
    """Two CTAs have the first one's tile."""
    x = matrix(128, 256, torch.float16)
    with emulator.settings(seed=seed):
        read, out = run(TmaCopyConfig(multicast=True), "sm_90a", x)
    expected = x.reshape(128, 2, 2, 64)[:, :, :1].expand(128, 2, 2, 64).reshape(128, 256)
    assert torch.equal(read, expected) and torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_reduction(dtype):
    x, out = matrix(100, 128, dtype), matrix(100, 128, dtype) * 2
    expected = out + x
    config = TmaCopyConfig("Float16" if dtype is torch.float16 else "Float32", 64, 32, 0, adds=True)
    assert torch.equal(run(config, "sm_90a", x, out)[1], expected)


def test_load_that_nobody_waits_for():
    x = matrix(128, 128, torch.float16)
    with pytest.raises(DataRace, match="no wait for that phase of the mbarrier"):
        run(TmaCopyConfig(waits=False), "sm_90a", x)
