"""Host time of cached calls, in µs: what a caller waits before the GPU can go on alone.

On a CUDA device the calls are real and asynchronous. Without one, each kernel's callable is replaced by a function that
does nothing, so that what remains is this package's own Python.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import cute_attn
from cute_attn import jit, kernel_calls
from cute_attn.arguments import resolve_arch
from cute_attn.dispatch import default_config


def microseconds(function: Callable[[], object], calls: int = 2000) -> float:
    """Median over 20 batches of the mean time of a call."""
    for _ in range(100):
        function()
    batches = []
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(calls // 20):
            function()
        batches.append((time.perf_counter() - started) / (calls // 20) * 1e6)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return sorted(batches)[10]


def main() -> None:
    on_gpu = jit.backend() == "cuda"
    device = "cuda" if on_gpu else "cpu"
    if not on_gpu:
        kernel_calls.jit.load = lambda *arguments: lambda *tensors: None
    q, k, v = (torch.randn(1, 8, 256, 64, device=device).half() for _ in range(3))
    quantised = cute_attn.quantize(q, k, v)
    out = torch.empty_like(q)
    print("with launches" if on_gpu else "without launches: Python only")
    plain = microseconds(lambda: cute_attn.attention(q, k, v))
    prepared = microseconds(lambda: cute_attn.attention(*quantised))
    print(f"attention(q, k, v)         {plain:6.1f} µs   5 kernels")
    print(f"attention(quantised)       {prepared:6.1f} µs   1 kernel")
    problem = cute_attn.Problem(1, 8, 8, 256, 256, 64, "float16")
    arch, recipe = resolve_arch(None, q), quantised.kv.recipe
    tile = default_config(recipe, problem, arch)
    options = {"causal": False, "has_lse": False, "varlen_k": False, "align": 16}
    kernel = kernel_calls._attention_kernel(
        recipe, 64, q.dtype, **options, tile=tile, arch=arch.name, backend=jit.backend()
    )
    arguments = (quantised.q.data, quantised.q.scale, quantised.q.bias, quantised.kv.image, quantised.kv.v_scale)
    alone = microseconds(lambda: kernel(*arguments, None, None, None, out, None, 256, 0.18))
    print(f"its loaded kernel          {alone:6.1f} µs")


if __name__ == "__main__":
    main()
