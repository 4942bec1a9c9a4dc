"""What persistent kernels need to share out their blocks of rows: how many CTAs run at once, and a counter."""

from __future__ import annotations

import functools

import torch

__all__ = ["multiprocessors", "tickets"]

_EMULATED = 132
"""Multiprocessors of an H100 SXM5. The emulator steps CTAs together, so that many with a block each take half the time
of the few, with many blocks each, that it pretends for kernels of others."""


def multiprocessors(device: torch.device) -> int:
    """Of a device; for the CPU those of an H100, unless `emulator.settings` says how many."""
    if device.type == "cuda":
        return _of_gpu(device)
    from cute_attn.emulator.settings import current_settings

    asked = current_settings().multiprocessors
    return _EMULATED if asked is None else asked


@functools.lru_cache(maxsize=64)
def _of_gpu(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tickets(device: torch.device) -> torch.Tensor:
    """int32 [1], 0: the counter of a launch on the current stream, which leaves 0 again.

    Launches of a stream follow one another, and share one. A CUDA graph gets one of its own, which every replay sets to
    0: it may run on any stream. So does every emulated launch, which may end halfway, by Ctrl-C or with an error of the
    emulator's, and leave any number.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    return _counter(device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=1024)
def _counter(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)
