"""Makes "cuda" mean the CPU, for programs that allocate on a CUDA device, ask it for its properties and wait for it.

The emulator's device memory is the process's own memory, so a tensor on the pretended device is a CPU tensor. What
stands between a program and that are PyTorch's device arguments, `torch.cuda`, and NVIDIA's Python bindings of the CUDA
driver and runtime (`cuda.bindings`). `install` replaces those, once per process, before cutlass is imported; nothing
but `foreign.install` calls it. What is not replaced fails by name, in PyTorch or in the bindings, for want of a GPU.
"""

from __future__ import annotations

from ..device import Device, device_for
from ..settings import current_settings
from .bindings import replace_driver, replace_runtime
from .function_mode import exposed_memory, mode, stay_in_mode_where_pytorch_leaves_it
from .torch_cuda import replace_torch_cuda

__all__ = ["exposed_memory", "install"]


def install(arch: str) -> None:
    """Pretend that there is one CUDA device, of architecture ``arch``, in PyTorch and in ``cuda.bindings``."""

    def device() -> Device:
        return device_for(arch, current_settings().device_multiprocessors)

    mode.__enter__()  # for the rest of the process, as torch.set_default_device does
    replace_torch_cuda(device)
    stay_in_mode_where_pytorch_leaves_it()
    replace_driver(device)
    replace_runtime(device)
