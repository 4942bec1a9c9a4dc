"""Makes "cuda" mean the CPU, for programs that allocate on a CUDA device, ask it for its properties and wait for it.

The emulator's device memory is the process's own memory, so a tensor on the pretended device is a CPU tensor. What
stands between a program and that are PyTorch's device arguments, `torch.cuda`, and NVIDIA's Python bindings of the CUDA
driver and runtime (`cuda.bindings`). `install` replaces those, once per process, before cutlass is imported; nothing
but `foreign.install` calls it. What is not replaced fails by name, in PyTorch or in the bindings, for want of a GPU.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from cute_attn.emulator.capture import heap
from cute_attn.emulator.device import Device, device_for
from cute_attn.emulator.memory import Span
from cute_attn.emulator.settings import current_settings

__all__ = ["exposed_memory", "install"]

_CUDA = torch.device("cuda", 0)


def install(arch: str) -> None:
    """Pretend that there is one CUDA device, of architecture ``arch``, in PyTorch and in ``cuda.bindings``."""

    def device() -> Device:
        return device_for(arch, current_settings().multiprocessors)

    _mode.__enter__()  # for the rest of the process, as torch.set_default_device does
    _replace_torch_cuda(device)
    _stay_in_mode_where_pytorch_leaves_it()
    _replace_driver(device)
    _replace_runtime(device)


# ---- PyTorch: tensors and device arguments ----


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.split(":")[0] == "cuda") or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaIsTheCpu(TorchFunctionMode):
    """Every call of PyTorch's Python functions, with "cuda" among the arguments replaced by the CPU.

    A tensor's own `device` is then the pretended one, whatever it was made on, and moves between host and device are
    copies, as they are on a machine with a GPU: a program may well write to one and compare with the other.
    """

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (special := _SPECIAL.get(func)) is not None:
            return special(*args, **kwargs)
        if any(map(_is_cuda, args)):
            args = tuple("cpu" if _is_cuda(a) else a for a in args)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):  # which needs a driver
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


_mode = _CudaIsTheCpu()


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.to`: a copy if a device is named, since it may be the other one."""
    devices = [a for a in (*args, kwargs.get("device")) if isinstance(a, (str, torch.device))]
    args = tuple("cpu" if _is_cuda(a) else a for a in args)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": "cpu" if _is_cuda(kwargs["device"]) else kwargs["device"]}
    moved = tensor.to(*args, **kwargs)
    return moved.clone() if moved is tensor and devices else moved


def _moved(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """`Tensor.cuda`, `Tensor.cpu`."""
    return tensor.clone()


_exposed: dict[int, tuple[StorageWeakRef, int]] = {}


def _data_ptr(tensor: torch.Tensor) -> int:
    """`Tensor.data_ptr`: a program that asks for an address may hand it to a kernel, as a number or inside a tensor."""
    storage = tensor.untyped_storage()
    if storage.nbytes():
        _exposed[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
    return tensor.data_ptr()


def exposed_memory() -> list[Span]:
    """The living storages whose address the program has asked for."""
    for address in [address for address, (storage, _) in _exposed.items() if storage.expired()]:
        del _exposed[address]
    return [Span(address, nbytes, f"memory at {address:#x}") for address, (_, nbytes) in _exposed.items()]


_SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.device: torch.device,  # the name of a device, and nothing on it yet
    torch.Tensor.to: _to,
    torch.Tensor.cuda: _moved,
    torch.Tensor.cpu: _moved,
    torch.Tensor.pin_memory: lambda tensor, *_: tensor,
    torch.Tensor.record_stream: lambda *_: None,
    torch.Tensor.data_ptr: _data_ptr,
    torch.Tensor.get_device: lambda *_: 0,
    torch.Tensor.device.__get__: lambda *_: _CUDA,
    torch.Tensor.is_cuda.__get__: lambda *_: True,  # type: ignore[attr-defined]
}


# ---- PyTorch: torch.cuda ----


class _Stream:
    """The one stream that there is: CUDA's default stream, number 0. Work is finished when it is launched."""

    cuda_stream = 0
    device = _CUDA
    device_index = 0
    priority = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record(self)
        return event

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class _Event:
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

    def elapsed_time(self, end: _Event) -> float:
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
        name=_NAME,
        major=device.capability[0],
        minor=device.capability[1],
        multi_processor_count=device.multiprocessors,
        total_memory=_TOTAL_MEMORY,
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


_NAME = "cute_attn emulator"
_TOTAL_MEMORY = 16 * 2**30


def _replace_torch_cuda(device: Callable[[], Device]) -> None:
    """What asks for a property, a stream or an event: PyTorch's CPU build has no CUDA, and others find no device."""
    stream = _Stream()

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
        "get_device_name": answer(_NAME),
        "get_device_capability": lambda *_, **__: device().capability,
        "get_device_properties": lambda *_, **__: _properties(device()),
        "mem_get_info": answer((_TOTAL_MEMORY, _TOTAL_MEMORY)),
        "memory_allocated": answer(0),
        "max_memory_allocated": answer(0),
        "current_stream": answer(stream),
        "default_stream": answer(stream),
        "Stream": _Stream,
        "ExternalStream": type("ExternalStream", (_Stream,), {}),
        "Event": _Event,
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
            return super().__new__(cls, "cpu" if _is_cuda(device) else device)  # type: ignore[call-arg]

    torch.Generator = Generator  # type: ignore[misc]
    set_default_device = torch.set_default_device
    # The default device is applied after every other mode, so "cuda" has to be gone from it.
    torch.set_default_device = lambda device: set_default_device("cpu" if _is_cuda(device) else device)


def _stay_in_mode_where_pytorch_leaves_it() -> None:
    """PyTorch takes a mode off while it handles a call; a program's own functions may run inside of that call.

    They are the backward functions that it defines, and the operators, which are also registered for the CPU where the
    program says ``device_types="cuda"``.
    """
    run_backward, custom_op = torch.autograd._engine_run_backward, torch.library.custom_op

    def backward(*args: Any, **kwargs: Any) -> Any:
        with _mode:
            return run_backward(*args, **kwargs)

    def anywhere(name: str, fn: Any = None, /, *, device_types: Any = None, **options: Any) -> Any:
        def register(body: Callable[..., Any]) -> Any:
            def in_mode(*args: Any, **kwargs: Any) -> Any:
                with _mode:
                    return body(*args, **kwargs)

            in_mode.__signature__ = inspect.signature(body, eval_str=True)  # type: ignore[attr-defined]
            in_mode.__annotations__ = body.__annotations__
            in_mode.__module__, in_mode.__name__, in_mode.__doc__ = body.__module__, body.__name__, body.__doc__
            return custom_op(name, in_mode, **options)

        return register if fn is None else register(fn)

    torch.autograd._engine_run_backward = backward
    torch.library.custom_op = anywhere


# ---- cuda.bindings: the driver and the runtime ----


def _replace_driver(device: Callable[[], Device]) -> None:
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
        "cuDeviceGetName": lambda *_: (ok, _NAME.encode()),
        "cuDeviceTotalMem": lambda *_: (ok, _TOTAL_MEMORY),
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


def _replace_runtime(device: Callable[[], Device]) -> None:
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


_CUDA_VERSION = 13000
_handles = itertools.count(0x10000)  # above the numbers that CUDA reserves for its own streams


def _streams_and_events(prefix: str, ok: Any, stream_type: Any, event_type: Any) -> dict[str, Callable[..., Any]]:
    """As `_Stream` and `_Event`, in the style of the bindings; handles are numbers that stand for nothing else."""
    events: dict[int, _Event] = {}

    def done(*_: Any) -> tuple[Any]:
        return (ok,)

    def create_stream(*_: Any) -> tuple[Any, Any]:
        return ok, stream_type(next(_handles))

    def create_event(*_: Any) -> tuple[Any, Any]:
        handle = next(_handles)
        events[handle] = _Event()
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
