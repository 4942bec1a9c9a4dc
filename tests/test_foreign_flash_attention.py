"""The emulator against a kernel that nobody here wrote: FlashAttention's Ampere forward, through its own host code.

Our kernels and the emulator could share one misunderstanding of the hardware; flash-attn-4's kernels were written for
GPUs and are right there.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

# dtype, causal, seq_q, seq_k, heads, kv_heads, head_dim
CASES = [
    ("bfloat16", True, 200, 200, 4, 2, 64),
    ("bfloat16", False, 77, 150, 2, 2, 128),
    ("float16", True, 100, 228, 4, 1, 128),
    ("float16", False, 128, 128, 2, 1, 64),
]


@pytest.fixture(scope="module")
def results() -> list[dict]:
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn-4 is not installed; `pip install cute-attn[test]` brings it")
    script = Path(__file__).with_name("foreign_flash_attention.py")
    done = subprocess.run([sys.executable, str(script), json.dumps(CASES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_agrees_with_float64(results: list[dict], index: int) -> None:
    """Error at most twice that of PyTorch in the same element type, the field's yardstick."""
    result = results[index]
    assert any("FlashAttentionForwardSm80" in name for name in result["launched"])
    assert result["kernel"] <= 2 * result["pytorch"] + 1e-5, result
    assert result["lse"] <= 2e-5, result
