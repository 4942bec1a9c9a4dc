"""The clock of a CUDA device: events around a CUDA graph's replay, with a cold L2."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["CudaTimer"]

_FLUSHED_BYTES = 1 << 30
"""Written before each sample: many times any L2, and, at the 1 to 5 TB/s of DRAM, 0.2 to 1 ms, in which the host gets
ahead of the device. Without that, launches that are not in a graph would be timed with the host's own pauses."""

_WARM_CALLS = 3


class CudaTimer:
    """See `cute_attn.bench.timing.Timer`. Events resolve about half a microsecond."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._scratch = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def ready(self, call: Callable[[], Any], capturable: bool) -> tuple[Callable[[], Any], str]:
        stream = torch.cuda.Stream(self._device)
        torch.cuda.synchronize(self._device)  # the operands come from another stream
        with torch.cuda.stream(stream if capturable else torch.cuda.current_stream(self._device)):
            for _ in range(_WARM_CALLS):
                call()
        torch.cuda.synchronize(self._device)
        if not capturable:
            return call, "stream"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = call()
        out.fill_(math.nan)
        graph.replay()
        if out.float().isnan().any():
            raise RuntimeError("a replay of its CUDA graph leaves parts of the output unwritten")
        return graph.replay, "graph"

    def cold(self) -> None:
        self._scratch.zero_()

    def seconds(self, call: Callable[[], Any]) -> float:
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3
