"""Compile a kernel class for an architecture, keep the result, and call it on CUDA or on the emulator.

`build` makes a `Program` from a kernel class, its static configuration and an architecture: nothing else goes in, so
these are the whole key of the caches. No GPU and no tensor is needed. `load` makes the program callable.

A kernel class has

* a constructor that takes one frozen dataclass of plain values,
* ``can_implement(config) -> str | None``, the reason why a configuration is refused,
* ``fake_arguments() -> tuple``, what the compiler is to assume about the arguments, the stream last,
* ``__call__``, a ``@cute.jit`` function that launches kernels,
* if it likes, ``ptxas_levels``, optimisation levels of the assembler to try until one spills nothing (default: 3).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
import platform
import re
import shlex
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cute_attn.arch import arch_from_name
from cute_attn.cubin import kernel_resources
from cute_attn.disk_cache import DiskCache, cache_root, disk_cache_enabled

__all__ = ["BACKENDS", "Program", "backend", "build", "load"]

BACKENDS = ("emulator", "cuda")

_FUNCTION = "func"  # name of the compiled function inside its object file
_PLAIN = (bool, int, str, float, type(None))

# Variables of the CuTe DSL that say where things are found or written. All others may change the code it makes.
_HARMLESS_VARIABLES = re.compile(
    r"CUTE_DSL_(ARCH|LIBS|CACHE_DIR|DUMP_DIR|KEEP\w*|LOG_\w+|PRINT_\w+|.*CACH\w*|.*STACKTRACE)"
)

_compile_lock = threading.RLock()  # the CuTe DSL compiles one function at a time
_loaded: dict[tuple[type, Any, str, str], Callable[..., Any]] = {}


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled kernel class.

    name:         the kernel class
    arch:         target, "sm_80" ... "sm_120a"
    object_code:  relocatable host code, with the machine code inside; the CUDA runtime's symbols are unresolved
    ptx:          what the machine code was made from
    cubin:        machine code, as an ELF file
    kernels:      names of the kernels in it
    arguments:    names of the host function's arguments, without the stream
    shared_bytes: dynamic shared memory that the launch asks for, where it is one launch with a fixed size
    """

    name: str
    arch: str
    object_code: bytes
    ptx: str
    cubin: bytes
    kernels: tuple[str, ...]
    arguments: tuple[str, ...]
    shared_bytes: int | None

    def to_entry(self) -> dict[str, bytes]:
        """As a disk cache entry."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _BLOBS}
        return {
            "object_code": self.object_code,
            "ptx": self.ptx.encode(),
            "cubin": self.cubin,
            "facts": json.dumps(facts).encode(),
        }

    @staticmethod
    def from_entry(entry: dict[str, bytes]) -> Program:
        """The inverse of `to_entry`."""
        facts = json.loads(entry["facts"])
        facts["kernels"], facts["arguments"] = tuple(facts["kernels"]), tuple(facts["arguments"])
        return Program(object_code=entry["object_code"], ptx=entry["ptx"].decode(), cubin=entry["cubin"], **facts)


_BLOBS = ("object_code", "ptx", "cubin")


def backend() -> str:
    """Where kernels run: "cuda" or "emulator".

    ``CUTE_ATTN_BACKEND`` decides; without it, CUDA where PyTorch sees a device, and otherwise the emulator, which is
    logged once. Raises ValueError for any other value.
    """
    chosen = os.environ.get("CUTE_ATTN_BACKEND")
    if chosen:
        if chosen not in BACKENDS:
            raise ValueError(f"CUTE_ATTN_BACKEND={chosen!r} is not known; use {' or '.join(BACKENDS)}")
        return chosen
    return _default_backend()


@functools.cache
def _default_backend() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    logging.getLogger("cute_attn").warning(
        "no CUDA device: kernels run on the emulator, on the CPU (CUTE_ATTN_BACKEND=emulator|cuda chooses)"
    )
    return "emulator"


def build(kernel_class: type, config: Any, arch: str) -> Program:
    """The compiled program, from the disk cache if it is there.

    Raises ValueError for an unknown arch and for a configuration that the kernel class refuses, TypeError for a
    configuration that is no frozen dataclass of plain values, and what the compiler raises.
    """
    arch_from_name(arch)
    _check_config(config)
    reason = kernel_class.can_implement(config)  # type: ignore[attr-defined]
    if reason is not None:
        raise ValueError(f"{kernel_class.__name__} cannot be built for {config}: {reason}")
    if not disk_cache_enabled():
        return _compile(kernel_class, config, arch)
    key = "\n".join((_qualified_name(kernel_class), _own_source(kernel_class), repr(config), arch))
    with (
        _compile_lock
    ):  # before the entry's own lock, as in `load`: in the other order two threads can block each other
        entry = _cache().get(key, lambda: _compile(kernel_class, config, arch).to_entry())
    return Program.from_entry(entry)


def load(kernel_class: type, config: Any, arch: str, backend: str) -> Callable[..., Any]:
    """The program as a function of tensors and scalars, in the order of ``kernel_class.__call__``, without the stream.

    arch:    target the program is compiled for; on CUDA, one whose code runs on the tensors' device
    backend: "cuda" launches on the device of the tensors, on PyTorch's current stream there, and returns at once (the
             first call loads the machine code, so it has to come before a CUDA graph capture, later ones may be
             captured); "emulator" runs on CPU tensors and has finished on return

    Kept in memory: the second call with equal arguments returns the same object. Raises what `build` raises.
    """
    key = (kernel_class, config, arch, backend)
    try:
        return _loaded[key]
    except KeyError:
        pass
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; use {' or '.join(BACKENDS)}")
    with _compile_lock:
        if key not in _loaded:
            program = build(kernel_class, config, arch)
            _loaded[key] = _on_emulator(program) if backend == "emulator" else _on_cuda(program)
        return _loaded[key]


def _check_config(config: Any) -> None:
    """The configuration's repr is a key, so it has to say everything, and has to stay what it is."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type) or not config.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError(f"a kernel's configuration must be a frozen dataclass, got {type(config).__name__}")
    for field in dataclasses.fields(config):
        if not field.repr:
            raise TypeError(f"{type(config).__name__}.{field.name} must be part of the repr, which is the key")
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _check_config(value)
        elif not isinstance(value, _PLAIN):
            raise TypeError(f"{type(config).__name__}.{field.name} must be a plain value, got {type(value).__name__}")


def _qualified_name(kernel_class: type) -> str:
    return f"{kernel_class.__module__}.{kernel_class.__qualname__}"


@functools.cache
def _own_source(kernel_class: type) -> str:
    """A hash of the file that defines the class; the files of cute_attn.kernels are in the cache's version already."""
    file = inspect.getsourcefile(kernel_class)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


@functools.cache
def _version() -> str:
    """A hash of everything but the key that code depends on: compiler, Python, the kernels' sources, this format."""
    import cute_attn.kernels as kernels

    digest = hashlib.sha256()
    settings = {
        k: v for k, v in os.environ.items() if k.startswith("CUTE_DSL_") and not _HARMLESS_VARIABLES.fullmatch(k)
    }
    for fact in (
        "program 1",
        *_compiler_packages(),
        sys.version,
        platform.machine(),
        _cpu_features(),
        repr(sorted(settings.items())),
    ):
        digest.update(fact.encode() + b"\0")
    for directory in kernels.__path__:
        if os.environ.get("CUTE_DSL_LINEINFO"):  # the machine code then names its sources
            digest.update(str(Path(directory).resolve()).encode() + b"\0")
        for file in sorted(Path(directory).rglob("*.py")):
            digest.update(str(file.relative_to(directory)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _compiler_packages() -> list[str]:
    """Name and version of the CuTe DSL, of TVM-FFI, and of the DSL's libraries: for CUDA 12 or 13, which differ."""
    names = ["nvidia-cutlass-dsl", "apache-tvm-ffi"]
    optional = ["nvidia-cutlass-dsl-libs-base", "nvidia-cutlass-dsl-libs-core"]
    optional += [f"nvidia-cutlass-dsl-libs-cu{major}" for major in (12, 13)]
    found = [f"{name} {importlib.metadata.version(name)}" for name in names]
    for name in optional:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return found


def _cpu_features() -> str:
    """What this CPU can do: host code is compiled for it, and a home directory may be shared with a lesser machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _cache() -> DiskCache:
    return _cache_in(cache_root() / "programs" / _version())


@functools.cache
def _cache_in(directory: Path) -> DiskCache:
    return DiskCache(directory)


def _compile(kernel_class: type, config: Any, arch: str) -> Program:
    """The program of the first of the kernel's `ptxas_levels` that spills nothing, or of the last one.

    A kernel class without that attribute is compiled at the assembler's default, level 3.
    """
    for level in getattr(kernel_class, "ptxas_levels", (3,)):
        program = _compile_at_level(kernel_class, config, arch, level)
        if not any(kernel.stack_bytes for kernel in kernel_resources(program.cubin).values()):
            break
    return program


def _compile_at_level(kernel_class: type, config: Any, arch: str, level: int) -> Program:
    """Trace and compile. The target is an option of the compilation, which takes precedence over CUTE_DSL_ARCH."""
    import cutlass.cute as cute

    kernel = kernel_class(config)
    with _compile_lock, tempfile.TemporaryDirectory(prefix="cute-attn-") as scratch:
        options = (
            f"--enable-tvm-ffi --gpu-arch {arch} --ptxas-options -O{level} "
            f"--keep-ptx --keep-cubin --dump-dir {shlex.quote(scratch)}"
        )
        compiled = cute.compile(kernel, *kernel.fake_arguments(), options=options)
        object_file = Path(scratch) / "program.o"
        compiled.export_to_c(object_file_path=str(object_file), function_name=_FUNCTION)
        return Program(
            name=kernel_class.__name__,
            arch=arch,
            object_code=object_file.read_bytes(),
            ptx=compiled.__ptx__,
            cubin=compiled.__cubin__,
            kernels=tuple(compiled.kernel_info),
            arguments=_argument_names(kernel_class),
            shared_bytes=_launched_shared_bytes(str(compiled.ir_module)),
        )


def _argument_names(kernel_class: type) -> tuple[str, ...]:
    names = list(inspect.signature(kernel_class.__call__).parameters)
    return tuple(names[1:-1])  # without self and the stream


def _launched_shared_bytes(host_ir: str) -> int | None:
    """Dynamic shared memory of the program's launch: the constant stored to the third field of its cudaLaunchConfig_t.

    None if there are several launches, or the size is computed at run time.
    """
    constants = dict(re.findall(r"(%\w+) = llvm\.mlir\.constant\((\d+) : i64\)", host_ir))
    config = r"!llvm\.struct<\(array<3 x i32>, array<3 x i32>, i64"
    field = rf"(%\w+) = llvm\.getelementptr %\w+\[0, 2\] : \(!llvm\.ptr\) -> !llvm\.ptr, {config}"
    stored = [
        match[1]
        for pointer in re.findall(field, host_ir)
        if (match := re.search(rf"llvm\.store (%\w+), {pointer} : i64", host_ir))
    ]
    return int(constants[stored[0]]) if len(stored) == 1 and stored[0] in constants else None


def _link(program: Program, libraries: list[str]) -> Callable[..., Any]:
    """Load the host code into the process, its CUDA runtime symbols resolved from ``libraries``."""
    import tvm_ffi
    from cutlass.base_dsl.export import ExternalBinaryModule

    engine = ExternalBinaryModule.load_provider.execution_engine_constructor(program.object_code, libraries, True)
    entry = engine.lookup(f"__tvm_ffi_{_FUNCTION}")
    return tvm_ffi.Function.__from_extern_c__(entry, keep_alive_object=engine)


def _on_cuda(program: Program) -> Callable[..., Any]:
    """The TVM-FFI function itself: it checks the arguments, sets the device, and takes PyTorch's current stream."""
    from cutlass.cute.runtime import find_runtime_libraries

    return _link(program, find_runtime_libraries(enable_tvm_ffi=True))


def _on_emulator(program: Program) -> Callable[..., Any]:
    from cute_attn import emulator

    emulator.register(program.cubin, program.ptx)
    function = _link(program, [str(emulator.runtime_library())])

    def run(*arguments: Any) -> Any:
        return emulator.call(function, arguments, program.arch, names=program.arguments)

    return run
