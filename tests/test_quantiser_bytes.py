"""Bytes of global memory that the quantisers move, against the fewest: what perf/quantiser_bytes.py prints."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "perf" / "quantiser_bytes.py"


@pytest.fixture(scope="module")
def measured(request):
    specification = importlib.util.spec_from_file_location("quantiser_bytes", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules["quantiser_bytes"] = module
    request.addfinalizer(lambda: sys.modules.pop("quantiser_bytes"))
    specification.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def on_the_emulator(monkeypatch):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")


@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 512), (128, 256), (256, 256)])
def test_q_is_read_once_and_its_results_are_written_once(measured, head_dim, tokens):
    """Beyond that, k_mean once per 128 tokens."""
    for name, quantiser in measured.QUANTISERS.items():
        if name.startswith("Q,"):
            row = quantiser(head_dim, tokens)
            assert row.written == row.outputs
            assert row.read == measured.HEADS * tokens * (2 * head_dim + 4 * head_dim // 128)


def test_delta_scores_read_k_once(measured):
    """Beyond that, k_mean and q̄, two rows here, once per 128 keys."""
    row = measured.delta_scores(64, 256)
    assert row.written == row.outputs
    assert row.read == measured.HEADS * (256 * 2 * 64 + 2 * (4 * 64 + 2 * 2 * 64))


@pytest.mark.parametrize(
    ("recipe", "arch"),
    [("int8", "sm_80"), ("int8_fp16", "sm_80"), ("int8_fp8", "sm_89"), ("fp8", "sm_89"), ("fp8", "sm_90a")],
)
def test_k_and_v_are_read_twice_and_the_image_written_once(measured, recipe, arch):
    """For their mean and V's scale, and to be quantised; all else, here for 512 tokens, is a sixth of that at most."""
    row = measured.key_value(recipe, arch, 128, 512)
    assert 2 <= row.read / row.inputs <= 2 * 7 / 6
    assert 1 <= row.written / row.outputs <= 1.05
