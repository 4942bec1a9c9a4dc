"""Runs CuTe DSL programs that know nothing of the emulator: they compile and call by themselves, on CPU tensors.

Our own programs need none of this: `cute_attn.jit` compiles against fake tensors and links host code against the
emulator's runtime. A foreign program compiles for the GPU it believes to be there and hands over its tensors, so the
CuTe DSL has to be told, in the few places below, that there is none. `install` does it, once per process, before
cutlass is imported; nothing else installs it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

from cute_attn.emulator import pretended_cuda
from cute_attn.emulator.capture import register, session
from cute_attn.emulator.device import device_for
from cute_attn.emulator.device_view import DeviceView, present
from cute_attn.emulator.memory import Span
from cute_attn.emulator.runtime import runtime_library
from cute_attn.emulator.settings import current_settings

__all__ = ["install"]


def install(arch: str) -> None:
    """Make every CuTe DSL program of this process compile for ``arch`` and run on the emulator.

    Raises RuntimeError if cutlass is imported already (it reads its environment when it is), ValueError for an arch
    that the emulator does not know.
    """
    device_for(arch)
    if "cutlass" in sys.modules:
        raise RuntimeError("cutlass was imported before the emulator was installed, and has made up its mind already")
    scratch = tempfile.mkdtemp(prefix="cute-attn-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    os.environ.update(
        CUTE_DSL_ARCH=arch,
        CUTE_DSL_LIBS=str(runtime_library()),
        # The compiler hands out PTX and machine code only if it is told to write them somewhere.
        CUTE_DSL_KEEP="ptx,cubin",
        CUTE_DSL_DUMP_DIR=scratch,
    )
    # quack-kernels keeps compiled objects on disk, and the hooks below would not see where they come from;
    # torch.compile would write code for the GPU that is not there.
    os.environ.update(QUACK_CACHE_ENABLED="0", TORCH_COMPILE_DISABLE="1")
    # What CUTE_DSL_KEEP brings with it, at every import.
    warnings.filterwarnings("ignore", message="Cache is disabled as user wants to generate PTX/ASM")
    pretended_cuda.install(arch)
    _note_compiled_programs()
    _run_tvm_ffi_calls(arch)
    _run_classic_calls(arch)
    _answer_hardware_questions()


def _around(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace the method ``owner.name`` by ``wrapper(original, self, ...)``."""
    original = getattr(owner, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(owner, name, method)


def _note_compiled_programs() -> None:
    """The emulator has to know the PTX of the machine code that host code will load."""
    from cutlass.cutlass_dsl.cuda_jit_executor import CudaDialectJitCompiledFunction

    def noted(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if isinstance(self.__cubin__, bytes) and self.__ptx__:  # a program without kernels has a path to no file
            register(self.__cubin__, self.__ptx__)

    _around(CudaDialectJitCompiledFunction, "__init__", noted)


def _run_tvm_ffi_calls(arch: str) -> None:
    """Calls of functions compiled with ``--enable-tvm-ffi``, whose host code insists on CUDA tensors."""
    from cutlass.cutlass_dsl.tvm_ffi_provider import TVMFFIJitCompiledFunction, TVMFFIJitCompiledFunctionWithKwargs

    def emulated(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        positional, named = present(args), present(list(kwargs.values()), list(kwargs))
        with session([*positional.spans, *named.spans, *pretended_cuda.exposed_memory()], arch):
            return original(self, *positional.arguments, **dict(zip(kwargs, named.arguments, strict=True)))

    for kind in (TVMFFIJitCompiledFunction, TVMFFIJitCompiledFunctionWithKwargs):
        _around(kind, "__call__", emulated)


def _run_classic_calls(arch: str) -> None:
    """Calls of functions compiled without TVM-FFI, whose arguments are made by ``from_dlpack``."""
    from cutlass.base_dsl.jit_executor import JitExecutor
    from cutlass.cute.runtime import _Tensor
    from cutlass.cutlass_dsl.cuda_jit_executor import CudaDialectJitCompiledFunction

    marshalled: list[Span] = []

    def made(original: Callable[..., None], self: Any, tensor: Any, *args: Any, **kwargs: Any) -> None:
        """A tensor's memory space, which is compiled into the program, follows from its device."""
        view = DeviceView(tensor) if DeviceView.fits(tensor) else tensor
        original(self, view, *args, **kwargs)
        shape = tuple(getattr(tensor, "shape", ()))  # no name arrives here
        self._emulator_span = view.span(f"tensor {shape}") if isinstance(view, DeviceView) else None

    def passed(original: Callable[..., list[int]], self: Any) -> list[int]:
        """Every tensor that is handed to compiled host code is asked for its description."""
        if self._emulator_span is not None:
            marshalled.append(self._emulator_span)
        return original(self)

    def run(original: Callable[..., Any], self: Any, exe_args: list[Any]) -> Any:
        spans = [*marshalled, *pretended_cuda.exposed_memory()]
        marshalled.clear()
        with session(spans, arch):
            return original(self, exe_args)

    def loaded(original: Callable[..., Any], self: Any, *args: Any) -> Any:
        """The first call loads the library, on as many devices as the real CUDA runtime would count."""
        self.__dict__["num_devices"] = 1
        with session([], arch):
            return original(self, *args)

    _around(_Tensor, "__init__", made)
    _around(_Tensor, "__c_pointers__", passed)
    _around(JitExecutor, "run_compiled_program", run)
    _around(CudaDialectJitCompiledFunction, "to", loaded)


def _answer_hardware_questions() -> None:
    """`HardwareInfo` launches a kernel of its own to learn how many clusters fit, which sizes persistent grids."""
    from cutlass.utils import HardwareInfo

    def clusters(self: Any, cluster_size: int, *args: Any, **kwargs: Any) -> int:
        return max(current_settings().device_multiprocessors // cluster_size, 1)

    HardwareInfo.get_max_active_clusters = clusters
