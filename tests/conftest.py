"""What all tests share: the backends that kernels are tried on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cute_attn import reference
from cute_attn.commands.check import LSE_TOLERANCE
from cute_attn.commands.check import TOLERANCE as REL_L2
from cute_attn.recipe import Recipe

__all__ = ["REL_L2", "assert_lse_close", "assert_out_close", "assert_page_is_current", "assert_poison_stays"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a GPU run only when they are asked for: ``-m slow`` alone means the slow ones of the emulator."""
    if "gpu" not in config.option.markexpr:
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture(params=["emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the test's tensors live: on the CPU for the emulator; under ``-m gpu``, on the CUDA device."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("pytest -m gpu needs a CUDA device, and PyTorch sees none")
    monkeypatch.setenv("CUTE_ATTN_BACKEND", request.param)
    return torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.fixture
def normal(device: torch.device) -> Callable[..., torch.Tensor]:
    """Draws N(0, 1) with outlier channels, on the device under test."""

    def draw(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        x[..., 3::16] = 10 * x[..., 3::16] + 5
        return x.to(dtype).to(device)

    return draw


def assert_out_close(out: torch.Tensor, expected: torch.Tensor, recipe: Recipe) -> None:
    """Output of a kernel against the simulator's: relative L2 of all of it, and four times that of any one row.

    The length of a row counts as that of the mean row at least: of rows that nearly cancel, little is left to compare.
    """
    out, tolerance = out.cpu(), REL_L2[recipe.pv_format][str(out.dtype)[6:]]
    assert torch.equal(out.isnan(), expected.isnan())
    out, expected = out.double().nan_to_num(), expected.double().nan_to_num()
    assert reference.errors(out, expected).rel_l2 <= tolerance
    lengths = expected.norm(dim=-1)
    if lengths.numel():
        assert ((out - expected).norm(dim=-1) <= 4 * tolerance * lengths.clamp(min=lengths.mean())).all()


def assert_lse_close(lse: torch.Tensor, expected: torch.Tensor, recipe: Recipe) -> None:
    """LSE of a kernel (on its device) against the simulator's.

    Sums of integers, and the emulator's 2^x, are the simulator's. Sums of floats in another order (scores of floats,
    what smoothing Q adds), and a GPU's approximate 2^x, may move a score by its last bit: a P is rounded otherwise. So
    may the line in fixed point of exponent "fast".
    """
    exact = recipe.exponent == "exact" and not recipe.smooth_q
    same_bits = recipe.qk_format in ("int8", "int4") and exact and not lse.is_cuda
    tolerance = {"rtol": 1e-5, "atol": 1e-4 if same_bits else LSE_TOLERANCE[recipe.pv_format]}
    torch.testing.assert_close(lse.cpu(), expected, equal_nan=True, **tolerance)


def assert_poison_stays(out: torch.Tensor, row: int, channel: int) -> None:
    """That of [1, 2, S, D] only ``row`` of head 0 is NaN, and only ``channel`` of head 1 not finite; those wholly."""
    rows, channels = torch.arange(out.shape[2]) == row, torch.arange(out.shape[3]) == channel
    for whole_or_part in (torch.all, torch.any):
        assert torch.equal(whole_or_part(out[0, 0].isnan(), -1), rows)
        assert torch.equal(whole_or_part(~out[0, 1].isfinite(), 0), channels)


def assert_page_is_current(script: str) -> None:
    """That docs/``script``, asked with --check, would write what is there."""
    path = Path(__file__).parents[1] / "docs" / script
    done = subprocess.run([sys.executable, str(path), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
