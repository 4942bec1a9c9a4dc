"""The emulator against kernels that nobody here wrote: FlashAttention, through its own host code.

Our kernels and the emulator could share one misunderstanding of the hardware; flash-attn-4's kernels were written for
GPUs and are right there: warp MMA and cp.async on sm_80 and sm_120, and on Hopper TMA, mbarriers and wgmma. What they
compute there is also what our own Hopper kernels are compared with.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import cute_attn
from cute_attn import reference

SHAPE = ("dtype", "causal", "seq_q", "seq_k", "heads", "kv_heads", "head_dim")
FORWARD = [
    ("bfloat16", True, 200, 200, 4, 2, 64),
    ("bfloat16", False, 77, 150, 2, 2, 128),
    ("float16", True, 100, 228, 4, 1, 128),
    ("float16", False, 128, 128, 2, 1, 64),
]
BACKWARD = [("bfloat16", True, 100, 170, 2, 2, 64), ("float16", False, 128, 192, 2, 1, 128)]
# flash-attn-4 has no backward for sm_80, and its forward on sm_120 is the one of sm_80: there are fewer cases of it.
# Its backward there adds up dq with atomics, in whatever order CTAs come: not the same bits each time.
CASES = {
    "sm_80": [dict(zip(SHAPE, case, strict=True)) for case in FORWARD],
    "sm_90a": [dict(zip(SHAPE, case, strict=True)) for case in FORWARD]
    + [dict(zip(SHAPE, case, strict=True), backward=True) for case in BACKWARD],
    "sm_120a": [dict(zip(SHAPE, case, strict=True)) for case in FORWARD[:2]]
    + [dict(zip(SHAPE, case, strict=True), backward=True, repeatable=False) for case in BACKWARD[:1]],
}
PARAMETERS = [
    pytest.param(arch, index, id="-".join([arch, *map(str, case.values())]))
    for arch, cases in CASES.items()
    for index, case in enumerate(cases)
]


@functools.cache
def results(arch: str) -> list[dict]:
    """All cases of an architecture, from one process, which compiles each kernel once."""
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn-4 is not installed; `pip install cute-attn[test]` brings it")
    script = Path(__file__).with_name("foreign_flash_attention.py")
    with tempfile.TemporaryDirectory() as directory:
        tensors = Path(directory) / "tensors.pt"
        command = [sys.executable, str(script), arch, json.dumps(CASES[arch]), str(tensors)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        return [{**report, "tensors": x} for report, x in zip(reports, torch.load(tensors), strict=True)]


@pytest.mark.parametrize(("arch", "index"), PARAMETERS)
def test_agrees_with_float64(arch: str, index: int) -> None:
    """Errors at most twice those of PyTorch in the same element type, the field's yardstick."""
    result, case = results(arch)[index], CASES[arch][index]
    kernel = f"FlashAttentionForwardSm{arch[3:].rstrip('a')}"
    assert any(kernel in name for name in result["launched"])
    assert any("FlashAttentionBackward" in name for name in result["launched"]) == case.get("backward", False)
    assert set(result["kernel"]) == {"out", "lse", *(("dq", "dk", "dv") if "backward" in case else ())}
    allowed = {name: 2 * error + 1e-5 for name, error in result["pytorch"].items()} | {"lse": 2e-5}
    assert all(error <= allowed[name] for name, error in result["kernel"].items()), result


@pytest.mark.parametrize("arch", CASES)
def test_the_order_of_warps_and_copies_changes_no_bit(arch: str) -> None:
    assert all(result["identical"] for result in results(arch))


@pytest.mark.parametrize("index", range(len(FORWARD)))
def test_our_hopper_kernels_do_the_same(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """Recipes fp16 and bf16 on the same inputs: outputs within one step of the row's largest, errors at most 1.1 times.

    They are 7 or 8 % larger here, by less with more keys. In flash-attn-4 the largest P of a row is 1, which no
    rounding changes; ours is what a whole number in base 2 leaves of it, rounded as all others are. Its row sums, too,
    are of the unrounded P, and ours of the rounded ones, by which the LSE is off by half a step at most.
    """
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    case = CASES["sm_90a"][index]
    recipe, step = {"bfloat16": ("bf16", 2**-7), "float16": ("fp16", 2**-10)}[case["dtype"]]
    tensors = results("sm_90a")[index]["tensors"]
    q, k, v, theirs = (tensors[name].transpose(1, 2) for name in ("q", "k", "v", "out"))
    options = {"recipe": recipe, "causal": case["causal"], "arch": "sm_90a"}
    ours, lse = cute_attn.attention(q, k, v, return_lse=True, **options)
    exact, _ = reference.attention(q, k, v, causal=case["causal"])
    assert reference.errors(ours, exact).rel_l2 <= 1.1 * reference.errors(theirs, exact).rel_l2
    assert ((ours.double() - theirs.double()).abs() <= step * exact.abs().amax(-1, keepdim=True)).all()
    assert ((lse - tensors["lse"]).abs() <= step / 2).all()
