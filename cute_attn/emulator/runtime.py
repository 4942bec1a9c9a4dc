"""The native half of the emulator: finding or building the stand-in for the CUDA runtime, and its C interface.

`runtime_library` is what a program's host code is linked against when it is loaded; `bind` connects that library to
Python. What the calls mean is decided in `capture`.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import importlib.machinery
import os
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cute_attn.disk_cache import cache_root, write_atomically

__all__ = ["Callbacks", "LaunchConfig", "TensorMapArguments", "bind", "runtime_library"]

_SOURCE = Path(__file__).with_name("runtime.c")
_INTERFACE_VERSION = 3  # INTERFACE_VERSION of runtime.c


class Dim3(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint32), ("y", ctypes.c_uint32), ("z", ctypes.c_uint32)]


class LaunchAttribute(ctypes.Structure):
    """cudaLaunchAttribute: an identifier and 64 bytes whose meaning depends on it."""

    _fields_ = [("id", ctypes.c_uint32), ("padding", ctypes.c_uint32), ("value", ctypes.c_uint32 * 16)]


class LaunchConfig(ctypes.Structure):
    """cudaLaunchConfig_t."""

    _fields_ = [
        ("grid", Dim3),
        ("block", Dim3),
        ("dynamic_shared_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint32),
    ]


class TensorMapArguments(ctypes.Structure):
    """tensor_map_t of runtime.c: the arguments of cuTensorMapEncodeTiled."""

    _fields_ = [
        ("data_type", ctypes.c_int),
        ("rank", ctypes.c_uint32),
        ("address", ctypes.c_void_p),
        ("sizes", ctypes.POINTER(ctypes.c_uint64)),
        ("strides", ctypes.POINTER(ctypes.c_uint64)),
        ("box", ctypes.POINTER(ctypes.c_uint32)),
        ("steps", ctypes.POINTER(ctypes.c_uint32)),
        ("interleave", ctypes.c_int),
        ("swizzle", ctypes.c_int),
        ("promotion", ctypes.c_int),
        ("fill", ctypes.c_int),
    ]


_HANDLE_OUT = ctypes.POINTER(ctypes.c_void_p)
_INT_OUT = ctypes.POINTER(ctypes.c_int)


class Callbacks(ctypes.Structure):
    """callbacks_t of runtime.c. Each returns 0 or a CUDA error code."""

    _fields_ = [
        ("library_load", ctypes.CFUNCTYPE(ctypes.c_int, _HANDLE_OUT, ctypes.c_void_p)),
        ("library_get_kernel", ctypes.CFUNCTYPE(ctypes.c_int, _HANDLE_OUT, ctypes.c_void_p, ctypes.c_char_p)),
        ("device_attribute", ctypes.CFUNCTYPE(ctypes.c_int, _INT_OUT, ctypes.c_int)),
        ("kernel_get_attribute", ctypes.CFUNCTYPE(ctypes.c_int, _INT_OUT, ctypes.c_int, ctypes.c_void_p)),
        ("kernel_set_attribute", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)),
        (
            "occupancy",
            ctypes.CFUNCTYPE(ctypes.c_int, _INT_OUT, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t),
        ),
        ("launch", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(LaunchConfig), _HANDLE_OUT)),
        ("allocate", ctypes.CFUNCTYPE(ctypes.c_int, _HANDLE_OUT, ctypes.c_size_t)),
        ("release", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)),
        ("copy", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)),
        ("fill", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)),
        (
            "encode_tensor_map",
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(TensorMapArguments)),
        ),
        ("unsupported", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)),
    ]


@functools.cache
def runtime_library() -> Path:
    """The shared library that stands in for the CUDA runtime.

    Built by the install where that found a C compiler; otherwise compiled on first use into the cache directory, or
    for this process alone, with a warning, where that cannot be written.
    Raises RuntimeError, saying what to install, where neither is possible.
    """
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        installed = _SOURCE.with_name(f"_runtime{suffix}")
        if installed.exists() and _version(installed) == _INTERFACE_VERSION:
            return installed
    return _compiled_on_first_use()


def _version(library: Path) -> int | None:
    """INTERFACE_VERSION of a built library, None if it is not one of ours or does not load on this machine."""
    try:
        return int(ctypes.CDLL(str(library)).cute_attn_runtime_version())
    except (OSError, AttributeError):
        return None


def _compiled_on_first_use() -> Path:
    source = _SOURCE.read_bytes()
    key = hashlib.sha256(source + sysconfig.get_platform().encode()).hexdigest()[:16]
    target = cache_root() / "runtime" / f"runtime-{key}.so"
    if target.exists() and _version(target) == _INTERFACE_VERSION:
        return target
    scratch = Path(tempfile.mkdtemp(prefix="cute-attn-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    built = scratch / "runtime.so"
    _compile(built)
    try:
        write_atomically(target, built.read_bytes())
    except OSError as error:
        warnings.warn(
            f"the emulator's runtime library is not kept, because {target.parent} cannot be written ({error}); "
            "set CUTE_ATTN_CACHE_DIR to a directory that can",
            stacklevel=3,
        )
        return built
    return target


def _compile(output: Path) -> None:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
    needed = (
        "the emulator's stand-in for the CUDA runtime has to be compiled once, and that {problem}. Install a C "
        "compiler (for example `apt install gcc`, or `conda install c-compiler`), or name one in CC, and try again"
    )
    if compiler is None:
        raise RuntimeError(needed.format(problem="needs a C compiler: none of $CC, cc, gcc, clang was found"))
    command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(output), str(_SOURCE)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(needed.format(problem=f"failed:\n{' '.join(command)}\n{result.stderr.strip()}\n"))


def bind(handlers: dict[str, Callable[..., Any]]) -> Callbacks:
    """Connect the library to Python. ``handlers`` has one function per field of `Callbacks`.

    The library keeps pointers into the returned object, which therefore has to stay alive.
    """
    callbacks = Callbacks(**{name: kind(handlers[name]) for name, kind in Callbacks._fields_})  # type: ignore[misc]
    ctypes.CDLL(str(runtime_library())).cute_attn_runtime_bind(ctypes.byref(callbacks))
    return callbacks
