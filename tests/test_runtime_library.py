"""The stand-in for the CUDA runtime: how it is built, its limits, and what it refuses."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from cute_attn import jit
from cute_attn.emulator import EmulatorError, capture, runtime, settings
from cute_attn.emulator.capture import session
from cute_attn.emulator.device import device_for
from cute_attn.emulator.device_view import DeviceView, present
from cute_attn.emulator.errors import InvalidLaunch, OutOfBounds
from cute_attn.emulator.launch_attributes import LaunchAttributes, read_attributes
from cute_attn.emulator.parser import parse

from .emulator.tensor_maps import encode
from .mma_loop import MmaLoop, MmaLoopConfig
from .scaled_copy import ScaledCopy, ScaledCopyConfig

# ---- building ----


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which the install could not build the library, with an empty cache."""
    monkeypatch.setattr("importlib.machinery.EXTENSION_SUFFIXES", [])
    monkeypatch.setenv("CUTE_ATTN_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_compiled_on_first_use_and_kept(not_installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = runtime.runtime_library.__wrapped__()
    assert library.parent == not_installed / "runtime"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert runtime.runtime_library.__wrapped__() == library


def test_compiled_for_this_process_where_the_cache_cannot_be_written(
    not_installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = not_installed / "file"
    blocked.write_text("")
    monkeypatch.setenv("CUTE_ATTN_CACHE_DIR", str(blocked))
    with pytest.warns(UserWarning, match="CUTE_ATTN_CACHE_DIR"):
        library = runtime.runtime_library.__wrapped__()
    assert ctypes.CDLL(str(library)).cute_attn_runtime_version() == runtime._INTERFACE_VERSION


def test_without_a_compiler(not_installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(not_installed))
    monkeypatch.setenv("CC", "")
    with pytest.raises(RuntimeError, match=r"needs a C compiler: none of \$CC, cc, gcc, clang .* Install a C compiler"):
        runtime.runtime_library.__wrapped__()


def test_a_compiler_that_fails_is_quoted(not_installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = not_installed / "cc"
    compiler.write_text("#!/bin/sh\necho no headers here >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(RuntimeError, match="no headers here"):
        runtime.runtime_library.__wrapped__()


def test_every_symbol_of_the_real_runtime_that_host_code_may_use_is_there() -> None:
    """The CUDA forwarding symbols and the host code's helpers; the embedding interface for JAX is no part of it."""
    from cutlass.cute.runtime import find_runtime_libraries

    def symbols(library: str) -> set[str]:
        listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
        return {line.split()[-1] for line in listed.stdout.splitlines()}

    real = next(path for path in find_runtime_libraries() if "cute_dsl_runtime" in path)
    wanted = {s for s in symbols(real) if s.startswith(("_cu", "cuda_dialect", "CuteDSLRT_TVMFFI"))}
    assert len(wanted) > 60
    assert wanted <= symbols(str(runtime.runtime_library()))


# ---- refusals ----


def test_an_unsupported_call_is_named() -> None:
    library = ctypes.CDLL(str(runtime.runtime_library()))
    with pytest.raises(EmulatorError, match="_cudaMallocHost"), session([], "sm_80"):
        assert library._cudaMallocHost() == 999


def test_an_attribute_that_is_not_modelled_is_named() -> None:
    library, value = ctypes.CDLL(str(runtime.runtime_library())), ctypes.c_int()
    with session([], "sm_86"):
        assert library._cudaDeviceGetAttribute(ctypes.byref(value), 97, 0) == 0
        assert value.value == 99 * 1024
    with pytest.raises(EmulatorError, match="cudaDeviceAttr 12345"), session([], "sm_80"):
        library._cudaDeviceGetAttribute(ctypes.byref(value), 12345, 0)


@pytest.mark.parametrize(
    ("arch", "kib"), [("sm_80", 163), ("sm_89", 99), ("sm_90", 227), ("sm_90a", 227), ("sm_120a", 99)]
)
def test_shared_memory_per_arch(arch: str, kib: int) -> None:
    assert device_for(arch).shared_optin_bytes == kib * 1024
    with pytest.raises(ValueError, match="no device for arch 'sm_70'"):
        device_for("sm_70")


def test_more_shared_memory_than_the_device_has() -> None:
    """120 KiB fit an sm_80 CTA and no sm_89 one, whatever the compiler thinks."""
    config, out = MmaLoopConfig(shared_values=30 * 1024), torch.empty(32, 16)
    jit.load(MmaLoop, config, "sm_80", "emulator")(out, 0)
    assert not out.any()
    with pytest.raises(
        InvalidLaunch, match=f"{120 * 1024} bytes of dynamic shared memory, but {99 * 1024} are allowed"
    ):
        jit.load(MmaLoop, config, "sm_89", "emulator")(out, 0)


def test_too_many_threads() -> None:
    x = torch.empty(1, 8)
    with pytest.raises(InvalidLaunch, match=r"block \(2048, 1, 1\) exceeds \(1024, 1024, 64\)"):
        jit.load(ScaledCopy, ScaledCopyConfig(threads=2048), "sm_80", "emulator")(x, None, x.clone(), 1.0)


def test_launch_attributes() -> None:
    """Clusters and cooperative launches are read, what has no effect on a result passes, the rest is refused."""
    attributes = (runtime.LaunchAttribute * 2)()
    config = runtime.LaunchConfig(attributes=attributes, attribute_count=2)
    attributes[0].id, attributes[0].value[:3] = 4, [2, 1, 1]
    attributes[1].id, attributes[1].value[0] = 2, 1
    assert read_attributes("name", config) == LaunchAttributes(cluster=(2, 1, 1), cooperative=True)
    attributes[0].id, attributes[1].value[0] = 6, 0
    assert read_attributes("name", config) == LaunchAttributes()
    attributes[0].id = 7
    with pytest.raises(EmulatorError, match="launch of name: cudaLaunchAttributeID 7"):
        read_attributes("name", config)


@pytest.mark.parametrize(
    ("directives", "requested", "arch", "outcome"),
    [
        ("", None, "sm_80", (1, 1, 1)),
        ("", (2, 1, 1), "sm_90a", (2, 1, 1)),
        (".explicitcluster .reqnctapercluster 2, 1, 1", None, "sm_90a", (2, 1, 1)),
        (".explicitcluster", (1, 1, 1), "sm_90a", (1, 1, 1)),
        (".explicitcluster", None, "sm_90a", "the launch names none"),
        (".reqnctapercluster 2, 1, 1", (4, 1, 1), "sm_90a", r"requires \(2, 1, 1\)"),
        (".maxclusterrank 4", (8, 1, 1), "sm_90a", "the kernel allows 4"),
        ("", (2, 1, 1), "sm_89", "the device allows none"),
        ("", (16, 1, 1), "sm_90a", "allows 8 without the non-portable cluster size"),
    ],
)
def test_clusters(directives: str, requested: tuple | None, arch: str, outcome: tuple | str) -> None:
    ptx = f".version 8.8\n.target sm_90a\n.address_size 64\n.visible .entry k() {directives} {{ ret; }}"
    loaded = capture._LoadedKernel(parse(ptx)["k"], 0)
    if isinstance(outcome, tuple):
        assert capture._cluster(loaded, requested, device_for(arch)) == outcome
    else:
        with pytest.raises(InvalidLaunch, match=outcome):
            capture._cluster(loaded, requested, device_for(arch))


def test_a_large_cluster_has_to_be_asked_for() -> None:
    kernel = parse(".version 8.8\n.target sm_90a\n.address_size 64\n.visible .entry k() { ret; }")["k"]
    asked = capture._LoadedKernel(kernel, 0, large_clusters=True)
    assert capture._cluster(asked, (16, 1, 1), device_for("sm_90a")) == (16, 1, 1)
    with pytest.raises(InvalidLaunch, match="allows none"):
        capture._cluster(asked, (16, 1, 1), device_for("sm_80"))


# ---- what host code may ask for besides launches ----


def test_device_memory() -> None:
    """Copies and fills are checked against the allocation they lie in, and freeing twice is an error."""
    library, pointer = ctypes.CDLL(str(runtime.runtime_library())), ctypes.c_void_p()
    numbers = (ctypes.c_int * 4)(1, 2, 3, 4)
    with session([], "sm_80"):
        assert library._cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(16)) == 0
        assert pointer.value % 256 == 0 and capture.heap().spans()[-1].start == pointer.value
        assert library._cudaMemcpy(pointer, numbers, ctypes.c_size_t(16), 1) == 0
        assert library._cudaMemset(pointer, 255, ctypes.c_size_t(4)) == 0
        assert library._cudaMemcpyAsync(numbers, pointer, ctypes.c_size_t(16), 2, None) == 0
        assert list(numbers) == [-1, 2, 3, 4]
    with pytest.raises(OutOfBounds, match="reaches 4 bytes past allocation"), session([], "sm_80"):
        library._cudaMemset(ctypes.c_void_p(pointer.value + 8), 0, ctypes.c_size_t(12))
    with session([], "sm_80"):
        assert library._cudaFree(pointer) == 0 and library._cudaFree(None) == 0
    with pytest.raises(EmulatorError, match="freed it before"), session([], "sm_80"):
        library._cudaFree(pointer)


def test_streams_and_events() -> None:
    library = ctypes.CDLL(str(runtime.runtime_library()))
    streams, events = [ctypes.c_void_p() for _ in range(2)], [ctypes.c_void_p() for _ in range(2)]
    milliseconds = ctypes.c_float(-1)
    assert all(library._cudaStreamCreate(ctypes.byref(s)) == 0 for s in streams)
    assert streams[0].value != streams[1].value
    for event in events:
        assert library._cudaEventCreate(ctypes.byref(event)) == 0 and library._cudaEventRecord(event, streams[0]) == 0
    assert library._cudaEventElapsedTime(ctypes.byref(milliseconds), *events) == 0
    assert 0 <= milliseconds.value < 1000
    assert all(library._cudaEventDestroy(event) == 0 for event in events)


@pytest.mark.parametrize(
    ("number", "kind", "swizzle", "box", "options"),
    [
        (6, "f16", 3, (64, 8, 2), {"swizzle": "128"}),
        (9, "bf16", 2, (32, 8, 2), {"swizzle": "64", "nan": True}),
        (8, "f64", 0, (2, 8, 2), {}),
        (11, "tf32", 1, (8, 8, 2), {"swizzle": "32"}),
        (0, "u8", 5, (64, 8, 2), {"swizzle": "flip"}),
        (2, "u32", 6, (8, 8, 6), {"swizzle": "128/64", "steps": (1, 2, 3)}),
    ],
)
def test_tensor_maps(number: int, kind: str, swizzle: int, box: tuple, options: dict) -> None:
    """The driver's numbers of types and swizzles, in the hardware's format as the tests' own encoder knows it."""
    address, sizes, strides = 1 << 20, (64, 10, 5), (512 + 2**36, 8192)
    found = (ctypes.c_uint8 * 128)()
    arguments = (
        *((ctypes.c_uint64 * 3)(*sizes), (ctypes.c_uint64 * 2)(*strides), (ctypes.c_uint32 * 3)(*box)),
        *((ctypes.c_uint32 * 3)(*options.get("steps", (1, 1, 1))), 0, swizzle, 2, int(options.get("nan", False))),
    )
    library = ctypes.CDLL(str(runtime.runtime_library()))
    with session([], "sm_90a"):
        assert library._cuTensorMapEncodeTiled(found, number, 3, ctypes.c_void_p(address), *arguments) == 0
    assert bytes(found) == encode(address, kind, sizes, strides, box, **options).tobytes()
    with pytest.raises(EmulatorError, match="cuTensorMapEncodeTiled: the tensor's address"), session([], "sm_90a"):
        library._cuTensorMapEncodeTiled(found, number, 3, ctypes.c_void_p(address + 8), *arguments)
    with pytest.raises(EmulatorError, match="CUtensorMapDataType 99"), session([], "sm_90a"):
        library._cuTensorMapEncodeTiled(found, 99, 3, ctypes.c_void_p(address), *arguments)


@pytest.mark.parametrize(
    ("arch", "threads", "shared", "ctas"),
    [("sm_80", 128, 0, 16), ("sm_80", 100, 0, 16), ("sm_80", 128, 40 * 1024, 4), ("sm_89", 128, 0, 12)],
)
def test_occupancy(arch: str, threads: int, shared: int, ctas: int) -> None:
    """2048 or 1536 threads, 164 KiB of shared memory of which every CTA costs one more than it asks for."""
    assert device_for(arch).resident_ctas(threads, shared) == ctas


def test_the_number_of_multiprocessors_is_a_setting() -> None:
    library, value = ctypes.CDLL(str(runtime.runtime_library())), ctypes.c_int()
    for wanted in (4, 132):
        with settings(multiprocessors=wanted), session([], "sm_90a"):
            assert library._cudaDeviceGetAttribute(ctypes.byref(value), 16, 0) == 0
        assert value.value == wanted


# ---- tensors ----


def test_a_span_reaches_from_the_lowest_to_the_highest_element() -> None:
    x = torch.zeros(6, 10, dtype=torch.bfloat16)
    view = x[1:5:2, 3:7]
    span = DeviceView(view).span("x")
    assert (span.start, span.nbytes, span.name) == (view.data_ptr(), 2 * (20 + 4), "x")
    backwards = x.float().numpy()[::-1]
    span = DeviceView(backwards).span("x")
    assert (span.start, span.nbytes) == (backwards[-1:].ctypes.data, 240)
    assert DeviceView(x[:0]).span("x") is None
    assert DeviceView(x[:1].expand(6, 10)).span("x").nbytes == 20


def test_presented_arguments() -> None:
    x, pair = torch.zeros(2), (torch.zeros(3), None)
    views = present([x, pair, 1.5, None], ["x", "pair"])
    assert [s.name for s in views.spans] == ["x", "pair[0]"]
    assert views.arguments[2:] == [1.5, None] and views.arguments[1][1] is None
    assert views.arguments[0].__dlpack_device__() == (2, 0)
    assert x.__dlpack_device__()[0] == 1  # the tensor itself still says what it is
