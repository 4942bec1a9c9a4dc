"""What only a CUDA device can show; run with ``pytest -m gpu``. The tests with a ``device`` fixture run there too."""

from __future__ import annotations

import pytest
import torch

import cute_attn
from cute_attn import reference
from cute_attn.work_sharing import tickets

from .conftest import assert_lse_close

pytestmark = pytest.mark.gpu


def random_qkv(seq: int, device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 4, seq, 128, generator=generator).half().to(device) for _ in range(3))


@pytest.mark.parametrize("causal", [False, True])
def test_emulator_and_gpu_agree(monkeypatch, causal):
    """Quantisers bit for bit; attention up to the GPU's approximate 2^x, which may move a P by one of its 255 steps."""
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "cuda")
    arch = cute_attn.arguments.resolve_arch(None, torch.empty(0, device="cuda")).name
    on_gpu = cute_attn.quantize(*random_qkv(300, "cuda"))
    out, lse = cute_attn.attention(*on_gpu, causal=causal, return_lse=True)
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    on_cpu = cute_attn.quantize(*random_qkv(300, "cpu"), arch=arch)
    emulated, emulated_lse = cute_attn.attention(*on_cpu, causal=causal, return_lse=True, arch=arch)
    for ours, theirs in (
        (on_gpu.q.data, on_cpu.q.data),
        (on_gpu.q.scale, on_cpu.q.scale),
        (on_gpu.q.bias, on_cpu.q.bias),
        (on_gpu.kv.image, on_cpu.kv.image),
        (on_gpu.kv.v_scale, on_cpu.kv.v_scale),
        (on_gpu.kv.k_mean, on_cpu.kv.k_mean),
    ):
        assert torch.equal(ours.cpu(), theirs)
    assert reference.errors(out.cpu(), emulated).rel_l2 < 1e-3
    assert_lse_close(lse, emulated_lse, cute_attn.recipes()["int8"])


@pytest.mark.parametrize("causal", [False, True])
def test_runs_on_the_current_stream_and_in_a_graph(monkeypatch, causal):
    """Where blocks of rows are drawn from a counter, each has its own: a graph, and a stream beside it."""
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "cuda")
    q, k, v = random_qkv(4096, "cuda")
    expected = cute_attn.attention(q, k, v, causal=causal)
    out = torch.empty_like(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cute_attn.attention(q, k, v, causal=causal, out=out)
    stream = torch.cuda.Stream()
    for _ in range(2):
        out.zero_()
        stream.wait_stream(torch.cuda.current_stream())
        graph.replay()
        with torch.cuda.stream(stream):
            other = cute_attn.attention(q, k, v, causal=causal)
        torch.cuda.synchronize()
        assert torch.equal(out, expected) and torch.equal(other, expected)


def test_launches_of_a_stream_share_a_counter_of_zero(monkeypatch):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "cuda")
    q, k, v = random_qkv(4096, "cuda")
    counter = tickets(q.device)
    for _ in range(2):
        cute_attn.attention(q, k, v, causal=True)
        assert tickets(q.device) is counter and counter.item() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_tensors_device(monkeypatch):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "cuda")
    q, k, v = random_qkv(200, "cuda:1")
    out = cute_attn.attention(q, k, v)
    assert out.device == q.device
    assert torch.equal(out.cpu(), cute_attn.attention(*random_qkv(200, "cuda:0")).cpu())
