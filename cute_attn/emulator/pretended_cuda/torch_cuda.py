"""`torch.cuda`: the properties of a device, streams and events, generators."""

from __future__ import annotations

import contextlib
import time
import types
from collections.abc import Callable
from typing import Any

import torch

from ..device import Device
from .function_mode import CUDA, is_cuda

NAME = "cute_attn emulator"
TOTAL_MEMORY = 16 * 2**30


class Stream:
    """The one stream that there is: CUDA's default stream, number 0. Work is finished when it is launched."""

    cuda_stream = 0
    device = CUDA
    device_index = 0
    priority = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class Event:
    """A moment in this machine's time: what a program times is the emulator."""

    cuda_event = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self._recorded: float | None = None

    def record(self, stream: Any = None) -> None:
        self._recorded = time.perf_counter()

    def synchronize(self) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        if self._recorded is None or end._recorded is None:
            raise RuntimeError("elapsed_time of an event that was not recorded")
        return (end._recorded - self._recorded) * 1e3


def _refused(what: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{what}: the emulator does not offer it")

    return refuse


def _properties(device: Device) -> types.SimpleNamespace:
    """What torch.cuda.get_device_properties says."""
    return types.SimpleNamespace(
        name=NAME,
        major=device.capability[0],
        minor=device.capability[1],
        multi_processor_count=device.multiprocessors,
        total_memory=TOTAL_MEMORY,
        L2_cache_size=device.l2_bytes,
        warp_size=device.warp_size,
        max_threads_per_block=device.max_threads,
        max_threads_per_multi_processor=device.threads_per_multiprocessor,
        regs_per_multiprocessor=device.registers,
        shared_memory_per_block=device.default_shared_bytes,
        shared_memory_per_block_optin=device.shared_optin_bytes,
        shared_memory_per_multiprocessor=device.shared_per_multiprocessor,
        is_integrated=0,
        uuid="emulator",
    )


def replace_torch_cuda(device: Callable[[], Device]) -> None:
    """What asks for a property, a stream or an event: PyTorch's CPU build has no CUDA, and others find no device."""
    stream = Stream()

    def answer(value: Any) -> Callable[..., Any]:
        """A function of its own for each name: torch.compile looks torch's functions up by identity."""
        return lambda *_, **__: value

    replacements: dict[str, Any] = {
        "is_available": answer(True),
        "is_initialized": answer(True),
        "is_bf16_supported": answer(True),
        "device_count": answer(1),
        "current_device": answer(0),
        "can_device_access_peer": answer(False),
        "is_current_stream_capturing": answer(False),
        "get_device_name": answer(NAME),
        "get_device_capability": lambda *_, **__: device().capability,
        "get_device_properties": lambda *_, **__: _properties(device()),
        "mem_get_info": answer((TOTAL_MEMORY, TOTAL_MEMORY)),
        "memory_allocated": answer(0),
        "max_memory_allocated": answer(0),
        "current_stream": answer(stream),
        "default_stream": answer(stream),
        "Stream": Stream,
        "ExternalStream": type("ExternalStream", (Stream,), {}),
        "Event": Event,
        "stream": lambda *_: contextlib.nullcontext(),
        "device": lambda *_: contextlib.nullcontext(),
        "device_of": lambda *_: contextlib.nullcontext(),
        "CUDAGraph": _refused("torch.cuda.CUDAGraph"),
        "graph": _refused("torch.cuda.graph"),
    }
    without_effect = (
        "init _lazy_init set_device set_stream synchronize empty_cache ipc_collect reset_peak_memory_stats "
        "manual_seed manual_seed_all _sleep"
    )
    for name in without_effect.split():
        replacements[name] = answer(None)
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)

    class Generator(torch._C.Generator):  # a class, not a function: it takes part in no function mode
        def __new__(cls, device: Any = "cpu") -> Generator:
            return super().__new__(cls, "cpu" if is_cuda(device) else device)  # type: ignore[call-arg]

    torch.Generator = Generator  # type: ignore[misc]
    set_default_device = torch.set_default_device
    # The default device is applied after every other mode, so "cuda" has to be gone from it.
    torch.set_default_device = lambda device: set_default_device("cpu" if is_cuda(device) else device)
