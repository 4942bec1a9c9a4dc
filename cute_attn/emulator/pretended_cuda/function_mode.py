"""PyTorch's functions with "cuda" among their arguments: tensors and moves between host and device."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from ..memory import Span

CUDA = torch.device("cuda", 0)


def is_cuda(device: Any) -> bool:
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
        if any(map(is_cuda, args)):
            args = tuple("cpu" if is_cuda(a) else a for a in args)
        if is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):  # which needs a driver
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


mode = _CudaIsTheCpu()


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.to`: a copy if a device is named, since it may be the other one."""
    devices = [a for a in (*args, kwargs.get("device")) if isinstance(a, (str, torch.device))]
    args = tuple("cpu" if is_cuda(a) else a for a in args)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": "cpu" if is_cuda(kwargs["device"]) else kwargs["device"]}
    moved = tensor.to(*args, **kwargs)
    return moved.clone() if moved is tensor and devices else moved


def _moved(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """`Tensor.cuda`, `Tensor.cpu`."""
    return tensor.clone()


def _product(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.mm` and its kin with ``out_dtype``, a wider type than the operands', which PyTorch has for CUDA only."""

    def multiply(*args: Any, out_dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        if isinstance(args[-1], torch.dtype):
            args, out_dtype = args[:-1], args[-1]
        if out_dtype is not None:
            args = tuple(a.to(out_dtype) if isinstance(a, torch.Tensor) else a for a in args)
        return function(*args, **kwargs)

    return multiply


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
    **{function: _product(function) for function in (torch.mm, torch.bmm, torch.addmm, torch.baddbmm)},
    torch.Tensor.get_device: lambda *_: 0,
    torch.Tensor.device.__get__: lambda *_: CUDA,
    torch.Tensor.is_cuda.__get__: lambda *_: True,  # type: ignore[attr-defined]
}


def stay_in_mode_where_pytorch_leaves_it() -> None:
    """PyTorch takes a mode off while it handles a call; a program's own functions may run inside of that call.

    They are the backward functions that it defines, and the operators, which are also registered for the CPU where the
    program says ``device_types="cuda"``.
    """
    run_backward, custom_op = torch.autograd._engine_run_backward, torch.library.custom_op

    def backward(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run_backward(*args, **kwargs)

    def anywhere(name: str, fn: Any = None, /, *, device_types: Any = None, **options: Any) -> Any:
        def register(body: Callable[..., Any]) -> Any:
            def in_mode(*args: Any, **kwargs: Any) -> Any:
                with mode:
                    return body(*args, **kwargs)

            in_mode.__signature__ = inspect.signature(body, eval_str=True)  # type: ignore[attr-defined]
            in_mode.__annotations__ = body.__annotations__
            in_mode.__module__, in_mode.__name__, in_mode.__doc__ = body.__module__, body.__name__, body.__doc__
            return custom_op(name, in_mode, **options)

        return register if fn is None else register(fn)

    torch.autograd._engine_run_backward = backward
    torch.library.custom_op = anywhere
