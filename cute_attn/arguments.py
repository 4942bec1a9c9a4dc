"""Checks of the callers' arguments that the public functions share. Every refusal names the argument and what to do."""

from __future__ import annotations

import functools
from typing import Any

import torch

from cute_attn import jit, tensors
from cute_attn.arch import Arch, arch_for_capability, arch_from_name
from cute_attn.problem import LAYOUTS

__all__ = [
    "check_flag",
    "check_input",
    "check_key_lengths",
    "check_key_value",
    "check_layout",
    "check_out",
    "refused",
    "resolve_arch",
    "same_device",
]

EMULATOR_ARCH = "sm_80"
"""What the emulator runs when the caller names no arch: the oldest target, whose code every later chip's resembles."""


def check_input(array: Any, name: str, layout: str) -> torch.Tensor:
    """``array`` as a torch tensor view [B, H, S, D]; raises TypeError or ValueError as `attention` documents."""
    tensor = tensors.as_torch(array, name)
    check_layout(layout)
    if tensor.dim() != 4:
        axes = ", ".join(layout.upper())
        raise ValueError(f"{name} has {tensor.dim()} dimensions, shape {tuple(tensor.shape)}; use 4: [{axes}]")
    tensors.dtype_name(tensor, name)
    if tensor.stride(3) != 1 and tensor.shape[3] > 1:
        raise ValueError(
            f"{name} has stride {tensor.stride(3)} along the head dim; it must be contiguous there: {name}.contiguous()"
        )
    if tensor.data_ptr() % tensor.element_size():
        raise ValueError(f"{name} starts at an odd address, inside an element; pass a copy: {name}.clone()")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} requires grad, and there is no backward yet: call under torch.no_grad(), or pass {name}.detach()"
        )
    # A kernel's arguments go through DLPack, which takes no tensor that requires grad, even where grad is off.
    return tensors.to_bhsd(tensor.detach() if tensor.requires_grad else tensor, layout)


def check_key_value(k: Any, v: Any, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as views [B, H, S, D] of one shape."""
    keys, values = check_input(k, "k", layout), check_input(v, "v", layout)
    if keys.shape != values.shape:
        raise ValueError(
            f"k has shape {tuple(keys.shape)} and v {tuple(values.shape)} as [B, H, S, D]; they must be equal"
        )
    return keys, values


def check_key_lengths(lengths: Any, batch: int) -> torch.Tensor | None:
    """``key_lengths`` as a compact int32 tensor [B], or None if there is none; raises TypeError or ValueError."""
    if lengths is None:
        return None
    tensor = tensors.as_torch(lengths, "key_lengths")
    if tensor.dtype != torch.int32:
        raise TypeError(f"key_lengths has dtype {tensor.dtype}; use torch.int32 (key_lengths.int())")
    if tuple(tensor.shape) != (batch,):
        raise ValueError(f"key_lengths has shape {tuple(tensor.shape)}; use one length per batch element: ({batch},)")
    return tensor.contiguous()


def check_layout(layout: Any) -> None:
    """Raises ValueError for a name that is no layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not known; use {' or '.join(map(repr, LAYOUTS))}")


def check_flag(value: Any, name: str) -> bool:
    """True or False as it is. Raises TypeError for anything else, whose truth might not be what was meant."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_out(out: Any, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
    """The caller's output tensor as a view [B, H, S, D] of ``shape``."""
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out must be a torch tensor, got {type(out).__name__}")
    view = check_input(out, "out", layout)
    if tuple(view.shape) != shape:
        raise ValueError(f"out has shape {tuple(view.shape)} as [B, H, S, D]; the output has {shape}")
    if view.dtype != dtype:
        raise TypeError(f"out is {view.dtype}; the output has q's dtype {dtype}")
    if tensors.overlaps_itself(view):
        raise ValueError(f"out has strides {view.stride()}: several elements share memory; pass a tensor of its own")
    return view


def same_device(**named: torch.Tensor | None) -> None:
    """Raises ValueError unless all tensors are on one device, and that device belongs to the backend in use.

    The first argument must be a tensor; others may be None.
    """
    (first, tensor), *rest = ((name, x) for name, x in named.items() if x is not None)
    device = tensor.device
    for name, other in rest:
        if other.device != device:
            raise ValueError(f"{first} is on {device} and {name} on {other.device}; move them to one device")
    backend = jit.backend()
    needed = "cuda" if backend == "cuda" else "cpu"
    if device.type != needed:
        instead = (
            f"move it to the GPU ({first}.cuda()), or set CUTE_ATTN_BACKEND=emulator"
            if needed == "cuda"
            else f"move it to the CPU ({first}.cpu()), or set CUTE_ATTN_BACKEND=cuda"
        )
        raise ValueError(f"{first} is on {device}, but the {backend} backend takes {needed} tensors; {instead}")


@functools.lru_cache(maxsize=64)
def _device_arch(device: torch.device) -> Arch:
    return arch_for_capability(torch.cuda.get_device_capability(device))


@functools.lru_cache(maxsize=64)
def _checked_arch(arch: Arch, device: torch.device) -> Arch:
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if not arch.runs_on(capability):
            raise ValueError(
                f"arch={arch.name!r} does not run on {device} (compute capability {capability[0]}.{capability[1]}); "
                f"use arch=None or {arch_for_capability(capability).name!r}"
            )
    return arch


def refused(reason: str, arch: str | None, tensor: torch.Tensor) -> NotImplementedError:
    """The error for a call without a kernel; on CPU tensors it says that another target may be asked for."""
    if arch is None and not tensor.is_cuda:
        reason += f" (on CPU tensors arch=None is {EMULATOR_ARCH!r}; pass another to run its kernels on the emulator)"
    return NotImplementedError(reason)


def resolve_arch(arch: str | None, tensor: torch.Tensor) -> Arch:
    """The target to compile for: the caller's choice if it runs on the tensor's device, or that device's own.

    CPU tensors (the emulator) can take any target; without a choice it is `EMULATOR_ARCH`. Raises TypeError for what is
    no name, ValueError for an unknown one and for one whose code the device does not run.
    """
    if arch is not None:
        return _checked_arch(arch_from_name(arch), tensor.device)
    return _device_arch(tensor.device) if tensor.device.type == "cuda" else arch_from_name(EMULATOR_ARCH)
