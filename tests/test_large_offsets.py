"""Tensors that reach beyond 2^32 elements: offsets are computed in 64 bits. Of their memory only the rows are real."""

from __future__ import annotations

import math

import pytest
import torch

from cute_attn import jit, quantizer_simulator
from cute_attn.kernels.delta_scores import DeltaConfig, DeltaScores
from cute_attn.kernels.quantize_query import QueryConfig, QueryRows
from cute_attn.kernels.rows import QuantizerConfig

ARCH = "sm_80"
STEPS = {
    "batch": (2**32 + 512, 4096, 64),
    "head": (2**14, 2**31 + 512, 64),
    "token": (2**22, 2**14, 2**27 + 512),
}
"""Strides of [B, H, S, 64], of which the named one leads beyond 2^31 elements and, of the batch, beyond 2^32."""


@pytest.fixture
def spread(tmp_path):
    """Copies a tensor into one of the given strides, in a file without contents."""

    def copy(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
        size = 1 + sum((n - 1) * step for n, step in zip(x.shape, strides, strict=True))
        storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=x.dtype)
        (tmp_path / "sparse").unlink()
        view = storage.as_strided(x.shape, strides)
        view.copy_(x)
        return view

    return copy


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


@pytest.mark.parametrize("axis", STEPS)
def test_q_and_its_results(spread, axis):
    q, k_mean = draw(2, 2, 20, 64), draw(2, 2, 64, seed=1).float()
    steps = STEPS[axis]
    mean = quantizer_simulator.query_mean(q)
    integers, *scales = quantizer_simulator.quantize_query(q, k_mean, mean, scale="thread")
    results = [torch.full_like(x, 7) for x in (integers, *scales, mean)]
    results = [spread(x, (*steps[: x.dim() - 1], 1)) for x in results]
    config = QueryConfig(QuantizerConfig(64, "float16"), scale="thread", smooth_q=True)
    jit.load(QueryRows, config, ARCH, "emulator")(spread(q, (*steps, 1)), k_mean, *results)
    for result, expected in zip(results, (integers, *scales, mean), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("axis", STEPS)
def test_keys_of_delta_scores(spread, axis):
    k, q_mean = draw(2, 2, 20, 64), draw(2, 4, 3, 64, seed=1)
    k_mean = k.float().mean(2)
    kernel = jit.load(DeltaScores, DeltaConfig(QuantizerConfig(64, "float16")), ARCH, "emulator")
    near, far = torch.full((2, 2, 4, 3, 64), math.nan)
    kernel(q_mean, k, k_mean, None, near)
    kernel(q_mean, spread(k, (*STEPS[axis], 1)), k_mean, None, far)
    assert torch.equal(near, far)
    assert near.abs().max() > 1
