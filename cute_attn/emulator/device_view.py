"""CPU tensors shown to compiled host code as CUDA tensors, without a copy.

Host code checks that its tensors live on a CUDA device. The emulator's device memory *is* the process's memory, so a
tensor is passed on as it is, with another device type in its DLPack description (https://dmlc.github.io/dlpack).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cute_attn.emulator.memory import Span

__all__ = ["DeviceView", "Views", "present"]

_CPU, _CUDA = 1, 2  # DLDeviceType


class _DLTensor(ctypes.Structure):
    """DLTensor of DLPack: the first member of the DLManagedTensor that a capsule points to."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


class DeviceView:
    """A CPU array that says, through DLPack, that it is on CUDA device 0. Holds the array while it is in use."""

    def __init__(self, array: Any) -> None:
        self.array = array

    @staticmethod
    def fits(array: Any) -> bool:
        """Whether this is an array in CPU memory."""
        return (
            hasattr(array, "__dlpack__")
            and hasattr(array, "__dlpack_device__")
            and array.__dlpack_device__()[0] == _CPU
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, 0

    def __dlpack__(self, **_: Any) -> Any:
        capsule, tensor = _export(self.array)
        tensor.device_type, tensor.device_id = _CUDA, 0
        return capsule

    def span(self, name: str) -> Span | None:
        """The bytes from the lowest to the highest address that the array's elements reach; None without elements."""
        _, tensor = _export(self.array)
        shape = tensor.shape[: tensor.ndim]
        if 0 in shape:
            return None
        strides = tensor.strides[: tensor.ndim] if tensor.strides else _compact_strides(shape)
        reach = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
        bits = tensor.bits * tensor.lanes
        start = tensor.data + tensor.byte_offset + sum(r for r in reach if r < 0) * bits // 8
        elements = 1 + sum(map(abs, reach))
        return Span(start, (elements * bits + 7) // 8, name)


def _export(array: Any) -> tuple[Any, _DLTensor]:
    """A fresh DLPack capsule of an array, and its description, which is the capsule's own to change."""
    if getattr(
        array, "requires_grad", False
    ):  # which PyTorch does not export; TVM-FFI passes such tensors all the same
        array = array.detach()
    capsule = array.__dlpack__()
    tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    if tensor.device_type != _CPU:
        raise ValueError(f"the emulator runs on CPU tensors, got one on DLPack device type {tensor.device_type}")
    return capsule, tensor


def _compact_strides(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return strides[::-1]


@dataclass
class Views:
    """Arguments as host code is to see them, and the memory they stand for."""

    arguments: list[Any] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)


def present(arguments: Sequence[Any], names: Sequence[str] = ()) -> Views:
    """Show every array among ``arguments``, also inside tuples and lists, as a CUDA tensor.

    arguments: anything; what has no ``__dlpack__`` is passed on as it is
    names:     what to call the arguments in error messages, in order; "argument 3" where there is none
    """
    views = Views()
    for i, argument in enumerate(arguments):
        views.arguments.append(_present(argument, names[i] if i < len(names) else f"argument {i}", views.spans))
    return views


def _present(argument: Any, name: str, spans: list[Span]) -> Any:
    if isinstance(argument, (list, tuple)):
        parts = [_present(part, f"{name}[{i}]", spans) for i, part in enumerate(argument)]
        return type(argument)(*parts) if hasattr(argument, "_fields") else type(argument)(parts)
    if not hasattr(argument, "__dlpack__"):
        return argument
    view = argument if isinstance(argument, DeviceView) else DeviceView(argument)
    span = view.span(name)
    if span is not None:
        spans.append(span)
    return view
