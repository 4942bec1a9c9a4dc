"""`cuda.bindings`: the CUDA driver and runtime as Python programs call them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from ..capture import heap
from ..device import Device
from .torch_cuda import NAME, TOTAL_MEMORY, Event

_CUDA_VERSION = 13000
_handles = itertools.count(0x10000)  # above the numbers that CUDA reserves for its own streams


def replace_driver(device: Callable[[], Device]) -> None:
    """Functions of the CUDA driver, which return (CUresult, values...)."""
    from cuda.bindings import driver

    ok = driver.CUresult.CUDA_SUCCESS
    context = driver.CUcontext(1)
    memory = heap()

    def done(*_: Any) -> tuple[Any]:
        return (ok,)

    def allocate(nbytes: int, *_: Any) -> tuple[Any, Any]:
        return ok, driver.CUdeviceptr(memory.allocate(nbytes))

    def free(address: Any, *_: Any) -> tuple[Any]:
        memory.free(int(address))
        return (ok,)

    def copy(target: Any, source: Any, nbytes: int, *_: Any) -> tuple[Any]:
        memory.copy(int(target), int(source), nbytes)
        return (ok,)

    def fill(address: Any, value: int, nbytes: int, *_: Any) -> tuple[Any]:
        memory.fill(int(address), value, nbytes)
        return (ok,)

    def fill_words(address: Any, value: int, count: int, *_: Any) -> tuple[Any]:
        memory.fill_words(int(address), value, count)
        return (ok,)

    functions: dict[str, Callable[..., Any]] = {
        "cuDriverGetVersion": lambda: (ok, _CUDA_VERSION),
        "cuDeviceGetCount": lambda: (ok, 1),
        "cuDeviceGet": lambda ordinal: (ok, driver.CUdevice(ordinal)),
        "cuDeviceGetName": lambda *_: (ok, NAME.encode()),
        "cuDeviceTotalMem": lambda *_: (ok, TOTAL_MEMORY),
        "cuDeviceGetAttribute": lambda number, *_: (ok, device().attribute(int(number))),
        "cuCtxGetDevice": lambda *_: (ok, driver.CUdevice(0)),
        "cuGetErrorName": lambda error: (ok, error.name.encode()),
        "cuGetErrorString": lambda error: (ok, error.name.encode()),
        "cuMemsetD8": fill,
        "cuMemsetD8Async": fill,
        "cuMemsetD32": fill_words,
        "cuMemsetD32Async": fill_words,
    }
    for names, function in (
        ("cuInit cuCtxSynchronize cuCtxSetCurrent cuCtxDestroy cuDevicePrimaryCtxRelease", done),
        ("cuCtxGetCurrent cuCtxCreate cuDevicePrimaryCtxRetain", lambda *_: (ok, context)),
        ("cuMemAlloc cuMemAllocAsync", allocate),
        ("cuMemFree cuMemFreeAsync", free),
        ("cuMemcpyHtoD cuMemcpyDtoH cuMemcpyDtoD cuMemcpyHtoDAsync cuMemcpyDtoHAsync cuMemcpyDtoDAsync", copy),
    ):
        functions.update(dict.fromkeys(names.split(), function))
    functions.update(_streams_and_events("cu", ok, driver.CUstream, driver.CUevent))
    _replace(driver, functions)


def replace_runtime(device: Callable[[], Device]) -> None:
    """Functions of the CUDA runtime, which return (cudaError_t, values...)."""
    from cuda.bindings import runtime

    ok = runtime.cudaError_t.cudaSuccess
    functions: dict[str, Callable[..., Any]] = {
        "cudaRuntimeGetVersion": lambda: (ok, _CUDA_VERSION),
        "cudaDriverGetVersion": lambda: (ok, _CUDA_VERSION),
        "cudaGetDeviceCount": lambda: (ok, 1),
        "cudaGetDevice": lambda: (ok, 0),
        "cudaSetDevice": lambda *_: (ok,),
        "cudaDeviceSynchronize": lambda: (ok,),
        "cudaGetLastError": lambda: (ok,),
        "cudaDeviceGetAttribute": lambda number, *_: (ok, device().attribute(int(number))),
        "cudaGetErrorName": lambda error: (ok, error.name.encode()),
        "cudaLibraryUnload": lambda *_: (ok,),
    }
    functions.update(_streams_and_events("cuda", ok, runtime.cudaStream_t, runtime.cudaEvent_t))
    _replace(runtime, functions)


def _streams_and_events(prefix: str, ok: Any, stream_type: Any, event_type: Any) -> dict[str, Callable[..., Any]]:
    """As `Stream` and `Event`, in the style of the bindings; handles are numbers that stand for nothing else."""
    events: dict[int, Event] = {}

    def done(*_: Any) -> tuple[Any]:
        return (ok,)

    def create_stream(*_: Any) -> tuple[Any, Any]:
        return ok, stream_type(next(_handles))

    def create_event(*_: Any) -> tuple[Any, Any]:
        handle = next(_handles)
        events[handle] = Event()
        return ok, event_type(handle)

    def record(event: Any, *_: Any) -> tuple[Any]:
        events[int(event)].record()
        return (ok,)

    def elapsed(start: Any, end: Any) -> tuple[Any, float]:
        return ok, events[int(start)].elapsed_time(events[int(end)])

    functions: dict[str, Callable[..., Any]] = {"EventRecord": record, "EventElapsedTime": elapsed}
    for names, function in (
        ("StreamCreate StreamCreateWithFlags StreamCreateWithPriority", create_stream),
        ("StreamSynchronize StreamDestroy StreamQuery StreamWaitEvent EventSynchronize EventQuery EventDestroy", done),
        ("EventCreate EventCreateWithFlags", create_event),
    ):
        functions.update(dict.fromkeys(names.split(), function))
    return {prefix + name: function for name, function in functions.items()}


def _replace(module: Any, functions: dict[str, Callable[..., Any]]) -> None:
    """Those that this version of the bindings has."""
    for name, function in functions.items():
        if hasattr(module, name):
            setattr(module, name, function)
