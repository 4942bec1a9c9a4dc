"""The clock of a CUDA device: events around a CUDA graph's replay, with a cold L2."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["CudaTimer"]

_FLUSHED_BYTES = 1 << 30
"""Written before each sample: many times any L2, and, at the 1 to 5 TB/s of DRAM, 0.2 to 1 ms, in which the host gets
ahead of the device. Without that, launches that are not in a graph would be timed with the host's own pauses."""

_WARM_CALLS = 3


class CudaTimer:
    """See `cute_attn.bench.timing.Timer`. Events resolve about half a microsecond.

    Graphs are replayed one at a time, and nobody reads what a replay leaves: they all have their outputs and scratch in
    one pool, which is as large as the largest call needs and not as all of them together.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # one for all captures: freed memory is reused on its own stream only
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._scratch = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def ready(self, call: Callable[[], Any], capturable: bool) -> tuple[Callable[[], Any], str]:
        torch.cuda.synchronize(self._device)  # the operands come from another stream
        with torch.cuda.stream(self._stream if capturable else torch.cuda.current_stream(self._device)):
            for _ in range(_WARM_CALLS):
                call()
        torch.cuda.synchronize(self._device)
        if not capturable:
            return call, "stream"
        graph, out = self._captured(call)
        out.fill_(math.nan)
        graph.replay()
        if out.float().isnan().any():
            raise RuntimeError("a replay of its CUDA graph leaves parts of the output unwritten")
        return graph.replay, "graph"

    def _captured(self, call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of ``call`` in the pool of the graphs that are there, and what the call returned."""
        graph, pool = torch.cuda.CUDAGraph(), next((other.pool() for other in self._graphs), None)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                out = call()
        except Exception:
            # A capture that failed can leave its stream and pool marked as being captured.
            self._stream = torch.cuda.Stream(self._device)
            self._graphs.clear()
            raise
        self._graphs.add(graph)
        return graph, out

    def cold(self) -> None:
        self._scratch.zero_()

    def seconds(self, call: Callable[[], Any]) -> float:
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3
