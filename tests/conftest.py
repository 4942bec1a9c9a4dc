"""What all tests share: the backends that kernels are tried on."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the test's tensors live: on the CPU for the emulator; under ``-m gpu``, on the CUDA device."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("pytest -m gpu needs a CUDA device, and PyTorch sees none")
    monkeypatch.setenv("CUTE_ATTN_BACKEND", request.param)
    return torch.device("cuda" if request.param == "cuda" else "cpu")
