"""Compiling, the caches, the backends, and host code that launches on the emulator."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from cute_attn import emulator, jit
from cute_attn.arch import ARCHS
from cute_attn.disk_cache import DiskCache, cache_root
from cute_attn.emulator.errors import InvalidLaunch, OutOfBounds

from .scaled_copy import ScaledCopy, ScaledCopyConfig

CONFIG = ScaledCopyConfig()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test starts with empty caches, in memory and on disk."""
    monkeypatch.setenv("CUTE_ATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(jit, "_loaded", {})
    return tmp_path


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """(configuration, arch) of every compilation; what is "compiled" is made up, so that the caches are tried fast."""
    done: list[tuple] = []

    def pretend(kernel_class: type, config: object, arch: str) -> jit.Program:
        done.append((config, arch))
        return jit.Program("ScaledCopy", arch, b"object", "ptx", b"cubin", ("kernel",), ("x", "out"), len(done))

    monkeypatch.setattr(jit, "_compile", pretend)
    return done


def entries(directory: Path, pattern: str = "*.entry") -> list[Path]:
    return sorted(directory.rglob(pattern))


# ---- caches ----


def test_a_program_is_compiled_once(compilations: list) -> None:
    first, second = (jit.build(ScaledCopy, CONFIG, "sm_80") for _ in range(2))
    assert first == second
    assert len(compilations) == 1


def test_configuration_and_arch_are_the_key(compilations: list) -> None:
    keys = [(CONFIG, "sm_80"), (CONFIG, "sm_89"), (ScaledCopyConfig(threads=128), "sm_80")]
    for key in keys * 2:
        assert jit.build(ScaledCopy, *key).arch == key[1]
    assert compilations == keys


def test_environment_of_the_compiler_is_not_part_of_the_key(
    compilations: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    jit.build(ScaledCopy, CONFIG, "sm_80")
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    jit.build(ScaledCopy, CONFIG, "sm_80")
    assert len(compilations) == 1


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:40] + b"\0" + b[41:], lambda b: b"", lambda b: b + b"x"]
)
def test_a_corrupt_entry_is_set_aside_and_rebuilt(compilations: list, own_cache: Path, damage) -> None:
    good = jit.build(ScaledCopy, CONFIG, "sm_80")
    (entry,) = entries(own_cache)
    entry.write_bytes(damage(entry.read_bytes()))
    again = jit.build(ScaledCopy, CONFIG, "sm_80")
    assert len(compilations) == 2
    assert dataclasses.replace(again, shared_bytes=good.shared_bytes) == good
    assert len(entries(own_cache, "*.corrupt")) == 1
    assert jit.build(ScaledCopy, CONFIG, "sm_80") == again


def test_no_disk_cache_if_switched_off(compilations: list, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTE_ATTN_DISK_CACHE", "0")
    for _ in range(2):
        jit.build(ScaledCopy, CONFIG, "sm_80")
    assert len(compilations) == 2
    assert not entries(own_cache, "*")
    monkeypatch.setenv("CUTE_ATTN_DISK_CACHE", "no")
    with pytest.raises(ValueError, match="CUTE_ATTN_DISK_CACHE='no'"):
        jit.build(ScaledCopy, CONFIG, "sm_80")


def test_a_directory_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    cache = DiskCache(blocked / "programs")
    with pytest.warns(UserWarning, match="CUTE_ATTN_CACHE_DIR") as said:
        assert cache.get("key", lambda: {"a": b"1"}) == {"a": b"1"}
        assert cache.get("key", lambda: {"a": b"2"}) == {"a": b"2"}
    assert len(said) == 1


def test_an_exception_while_building_keeps_nothing(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    with pytest.raises(OSError, match="the compiler's own"):
        cache.get("key", lambda: (_ for _ in ()).throw(OSError("the compiler's own")))
    assert cache.get("key", lambda: {"a": b"1"}) == {"a": b"1"}


def test_threads_that_want_the_same_entry_build_it_once(tmp_path: Path) -> None:
    cache, built, start = DiskCache(tmp_path), [], threading.Barrier(4)

    def build() -> dict[str, bytes]:
        built.append(1)
        return {"a": b"1"}

    def want() -> None:
        start.wait()
        assert cache.get("key", build) == {"a": b"1"}

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_build_and_load_in_two_threads_do_not_block_each_other(compilations: list, own_cache: Path) -> None:
    """While a thread holds the compiler, as `load` does, another one's `build` must not hold the entry's lock."""
    with jit._compile_lock:
        builder = threading.Thread(target=jit.build, args=(ScaledCopy, CONFIG, "sm_80"), daemon=True)
        builder.start()
        builder.join(0.3)
        assert not entries(own_cache, "*.lock")
    builder.join(10)
    assert len(compilations) == 1


def test_compiler_packages_and_cpu_are_part_of_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    version = jit._version.__wrapped__()
    assert version == jit._version.__wrapped__()
    monkeypatch.setattr(jit, "_cpu_features", lambda: "flags: fewer")
    other_cpu = jit._version.__wrapped__()
    installed = jit._compiler_packages()
    assert any(package.startswith("nvidia-cutlass-dsl-libs-cu") for package in installed)
    monkeypatch.setattr(jit, "_compiler_packages", lambda: ["nvidia-cutlass-dsl 0"])
    assert len({version, other_cpu, jit._version.__wrapped__()}) == 3


def test_two_processes_race_for_one_entry(tmp_path: Path) -> None:
    """Both get the same bytes, one of them builds, and nothing temporary is left."""
    program = textwrap.dedent(
        """
        import sys, time, pathlib
        from cute_attn.disk_cache import DiskCache
        directory = pathlib.Path(sys.argv[1])
        def build():
            (directory / f"built.{sys.argv[2]}").touch()
            time.sleep(0.3)
            return {"who": sys.argv[2].encode()}
        print(DiskCache(directory).get("key", build)["who"].decode())
        """
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), name], stdout=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    answers = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    assert answers[0] == answers[1] and answers[0] in ("a", "b")
    assert len(entries(tmp_path, "built.*")) == 1
    assert len(entries(tmp_path)) == 1 and not entries(tmp_path, ".*")


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUTE_ATTN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/cute-attn")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "cute-attn"


def test_a_user_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CUTE_ATTN_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_root() == cache_root()
    assert cache_root().stat().st_mode & 0o777 == 0o700


def test_importing_the_package_does_not_import_the_compiler() -> None:
    code = "import sys, cute_attn.jit; assert not {'cutlass', 'tvm_ffi'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- refusals ----


def test_a_refused_configuration_says_why() -> None:
    with pytest.raises(ValueError, match="ScaledCopy cannot be built .*threads=33 is no multiple of a warp"):
        jit.build(ScaledCopy, ScaledCopyConfig(threads=33), "sm_80")


def test_unknown_arch_and_backend() -> None:
    with pytest.raises(ValueError, match=r"arch='sm_70' is not known; use one of sm_80, .*sm_120a"):
        jit.build(ScaledCopy, CONFIG, "sm_70")
    with pytest.raises(ValueError, match="backend='tpu' is not known; use emulator or cuda"):
        jit.load(ScaledCopy, CONFIG, "sm_80", "tpu")


def test_a_configuration_must_be_frozen_and_plain() -> None:
    @dataclasses.dataclass
    class Changing:
        threads: int = 32

    @dataclasses.dataclass(frozen=True)
    class Odd:
        threads: object = object()

    @dataclasses.dataclass(frozen=True)
    class Hiding:
        threads: int = dataclasses.field(default=32, repr=False)

    refused = (
        (Changing(), "frozen dataclass"),
        ({"threads": 32}, "frozen"),
        (Odd(), "plain value"),
        (Hiding(), "repr"),
    )
    for config, problem in refused:
        with pytest.raises(TypeError, match=problem):
            jit.build(ScaledCopy, config, "sm_80")


# ---- backend ----


def test_backend_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "emulator"):
        monkeypatch.setenv("CUTE_ATTN_BACKEND", name)
        assert jit.backend() == name
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "gpu")
    with pytest.raises(ValueError, match="CUTE_ATTN_BACKEND='gpu' is not known; use emulator or cuda"):
        jit.backend()


@pytest.mark.parametrize("there_is_a_gpu", [False, True])
def test_backend_without_a_choice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, there_is_a_gpu
) -> None:
    monkeypatch.delenv("CUTE_ATTN_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_a_gpu)
    jit._default_backend.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "cute_attn"):
            assert {jit.backend() for _ in range(2)} == {"cuda" if there_is_a_gpu else "emulator"}
        assert len(caplog.records) == (0 if there_is_a_gpu else 1)
    finally:
        jit._default_backend.cache_clear()


# ---- compiled programs on the emulator ----


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def load(shared_cache: Path, monkeypatch: pytest.MonkeyPatch):
    """Really compiles, each configuration once for all of these tests."""
    monkeypatch.setenv("CUTE_ATTN_CACHE_DIR", str(shared_cache))
    return lambda arch="sm_80", **config: jit.load(ScaledCopy, ScaledCopyConfig(**config), arch, "emulator")


def test_program_facts(load, shared_cache: Path) -> None:
    load()
    program = jit.build(ScaledCopy, CONFIG, "sm_80")
    assert program.arguments == ("x", "bias", "out", "factor")
    assert program.shared_bytes == 0
    assert len(program.kernels) == 1 and program.kernels[0] in program.ptx
    assert ".target sm_80" in program.ptx and program.cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_for_every_claimed_arch_without_a_gpu(load, arch: str) -> None:
    load(arch)
    assert f".target {arch}" in jit.build(ScaledCopy, CONFIG, arch).ptx


def test_the_compilers_environment_changes_nothing(load, tmp_path: Path) -> None:
    load()
    code = """
        import sys
        from cute_attn import jit
        from tests.scaled_copy import ScaledCopy, ScaledCopyConfig
        sys.stdout.write(jit.build(ScaledCopy, ScaledCopyConfig(), "sm_80").ptx)
    """
    other = {"CUTE_DSL_ARCH": "sm_120a", "CUTE_DSL_KEEP": "all", "CUTE_DSL_DUMP_DIR": str(tmp_path)}
    environment = {
        **os.environ,
        **other,
        "CUTE_ATTN_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == jit.build(ScaledCopy, CONFIG, "sm_80").ptx


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_120a"])
def test_runs_on_strided_tensors(load, arch: str) -> None:
    x = torch.randn(40, 60).t()[2:50:3, 1:-2]
    out = torch.full((16, 80), 7.0)
    load(arch)(x, None, out[:, 1:75:2], 2.0)
    assert torch.equal(out[:, 1:75:2], x * 2)
    assert (out[:, ::2] == 7).all() and (out[:, 75:] == 7).all()
    record = emulator.launches()[-1]
    assert (tuple(record.grid), tuple(record.block)) == ((16, 1, 1), (64, 1, 1))


def test_optional_tensors(load) -> None:
    x, bias, out = torch.randn(3, 100), torch.randn(100), torch.empty(3, 100)
    load(has_bias=True)(x, bias, out, 1.0)
    assert torch.equal(out, x + bias)
    with pytest.raises(TypeError, match="argument #1"):
        load()(x, bias, out, 1.0)


def test_numpy_arrays_are_tensors_too(load) -> None:
    x, out = torch.randn(3, 10).numpy(), torch.zeros(3, 10).numpy()
    load()(x[::-1], None, out, 1.0)
    assert (out == x[::-1]).all()


def test_programs_with_equal_kernel_names_are_told_apart(load) -> None:
    """`overrun` changes the machine code and not the kernel's name."""
    x, out = torch.randn(2, 64), torch.empty(2, 64)
    assert load() is load()
    load(overrun=-63)(x, None, out.zero_(), 1.0)
    assert torch.equal(out[:, :1], x[:, :1]) and not out[:, 1:].any()
    load()(x, None, out, 1.0)
    assert torch.equal(out, x)


def test_the_emulators_exception_comes_out_as_itself(load) -> None:
    x, out = torch.randn(1, 64), torch.empty(1, 64)
    with pytest.raises(OutOfBounds, match=r"\bx\b"):
        load(overrun=10_000)(x, None, out, 1.0)
    load()(x, None, out, 1.0)  # and the next call is none the worse
    assert torch.equal(out, x)


def test_an_empty_grid_is_an_invalid_launch(load) -> None:
    with pytest.raises(InvalidLaunch, match=r"grid \(0, 1, 1\).* not positive"):
        load()(torch.empty(0, 8), None, torch.empty(0, 8), 1.0)


def test_host_code_checks_its_arguments(load) -> None:
    x = torch.randn(4, 8)
    for bad in (torch.empty(5, 8), torch.empty(4, 8, dtype=torch.float64), torch.empty(8)):
        with pytest.raises((ValueError, TypeError), match="argument #2"):
            load()(x, None, bad, 1.0)


def test_calls_from_two_threads(load) -> None:
    function, failures = load(), []

    def work(value: float) -> None:
        x, out = torch.full((8, 64), value), torch.empty(8, 64)
        for _ in range(3):
            function(x, None, out, 2.0)
            if not torch.equal(out, x * 2):
                failures.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in (1.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_settings_hold_for_a_while(load) -> None:
    x, out = torch.randn(8, 64), torch.empty(8, 64)
    with emulator.settings(seed=3, profile=True):
        load()(x, None, out, 1.0)
        assert emulator.launches()[-1].profile
    load()(x, None, out, 1.0)
    assert not emulator.launches()[-1].profile
    with pytest.raises(TypeError, match="sead"), emulator.settings(sead=1):
        pass


def test_a_foreign_program_runs_unchanged(tmp_path: Path) -> None:
    """Compiled and called without TVM-FFI, on `from_dlpack` tensors, as the CuTe DSL's own examples do it."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            from cute_attn.emulator import foreign
            foreign.install("sm_80")
            import cutlass.cute as cute, torch
            from cutlass.cute.runtime import from_dlpack

            @cute.kernel
            def double(x: cute.Tensor, y: cute.Tensor):
                thread, _, _ = cute.arch.thread_idx()
                y[thread] = x[thread] * 2

            @cute.jit
            def launch(x: cute.Tensor, y: cute.Tensor):
                double(x, y).launch(grid=[1, 1, 1], block=[32, 1, 1])

            x, y = torch.arange(32.0), torch.zeros(32)
            arguments = from_dlpack(x), from_dlpack(y)
            launch(*arguments)
            assert torch.equal(y, 2 * x)
            cute.compile(launch, *arguments)(*arguments)
            short = from_dlpack(x), from_dlpack(y[:31])
            try:
                cute.compile(launch, *short)(*short)
            except Exception as error:
                print(type(error).__name__)
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUTE_DSL_ARCH": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "OutOfBounds"
