"""The emulator against quack-kernels: reductions over clusters, Hopper's GEMMs, block-scaled ones of sm_120.

As with FlashAttention, nobody here wrote these kernels, and they are right on GPUs. Between them they use TMA with and
without multicast, mbarriers across CTAs, wgmma, st.async, clusters that take over work, and mma with block scales.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

# Per architecture and program: the cluster that the launch has to have, an instruction that the kernel has to use.
CASES = {
    "sm_90a": {
        "softmax": ((1, 2, 1), "st.async"),
        "rmsnorm": ((1, 2, 1), "st.async"),
        "gemm pingpong 2x1": ((2, 1, 1), "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"),
        "gemm cooperative 2x1": ((2, 1, 1), "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"),
        "gemm e4m3 1x2": ((1, 2, 1), "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"),
    },
    "sm_120a": {
        "softmax": ((1, 4, 1), "st.async"),
        "gemm": ((1, 1, 1), "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
        "gemm e4m3": ((1, 1, 1), "mma.sync.aligned"),
        "gemm pingpong, work taken over": ((1, 1, 1), "clusterlaunchcontrol.try_cancel"),
        "mxfp8_e4m3": ((1, 1, 1), "mma.sync.aligned.kind::mxf8f6f4.block_scale"),
        "mxfp4": ((1, 1, 1), "mma.sync.aligned.kind::mxf4"),
        "nvfp4": ((1, 1, 1), "mma.sync.aligned.kind::mxf4nvf4.block_scale"),
    },
}
PARAMETERS = [pytest.param(arch, name, id=f"{arch}-{name}") for arch, cases in CASES.items() for name in cases]


@functools.cache
def results(arch: str) -> dict[str, dict]:
    """All programs of an architecture, from one process."""
    if importlib.util.find_spec("quack") is None:
        pytest.skip("quack-kernels is not installed; `pip install cute-attn[test]` brings it")
    script = Path(__file__).with_name("foreign_quack.py")
    command = [sys.executable, str(script), arch, json.dumps(list(CASES[arch]))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(CASES[arch], lines, strict=True))


@pytest.mark.parametrize(("arch", "name"), PARAMETERS)
def test_agrees_with_float64_in_any_order(arch: str, name: str) -> None:
    result = results(arch)[name]
    cluster, instruction = CASES[arch][name]
    assert result["error"] <= 1, result
    assert result["identical"]
    assert tuple(result["cluster"]) == cluster
    assert any(opcode.startswith(instruction) for opcode in result["instructions"]), result["instructions"]
