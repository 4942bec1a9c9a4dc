"""What all tests share: the backends that kernels are tried on."""

from __future__ import annotations

import pytest
import torch

from cute_attn.recipe import Recipe


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


REL_L2 = {
    "int8": {"float16": 2.5e-3, "bfloat16": 4.5e-3},
    "float16": {"float16": 5e-4, "bfloat16": 2.5e-3},
    "bfloat16": {"bfloat16": 2.5e-3},
}
"""Largest relative L2 distance of a kernel's output from its simulator's, by format of P and V, and output dtype."""


LARGEST_P_STEP = {"int8": 0.012, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""By how much, relative to its row's sum, the rounding of one probability may go the other way, by format of P: a unit
in the last place; of 8 bits, one of at least 90 (see `cute_attn.kernels.softmax_int8`)."""


def assert_lse_close(lse: torch.Tensor, expected: torch.Tensor, recipe: Recipe) -> None:
    """LSE of a kernel (on its device) against the simulator's.

    Sums of integers, and the emulator's 2^x, are the simulator's. Sums of floats in another order (unquantised scores,
    and what smoothing Q adds), and a GPU's approximate 2^x, may move a score by its last bit: a P is rounded otherwise.
    """
    same_bits = recipe.quantises and not recipe.smooth_q and not lse.is_cuda
    tolerance = {"rtol": 1e-5, "atol": 1e-4 if same_bits else LARGEST_P_STEP[recipe.pv_format]}
    torch.testing.assert_close(lse.cpu(), expected, equal_nan=True, **tolerance)
