"""``python -m cute_attn.emulator``: a program that believes in CUDA, run without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = str(Path(__file__).with_name("foreign_script.py"))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cute_attn.emulator", *arguments], capture_output=True, text=True, check=False
    )


def test_runs_the_program_and_lists_its_launches() -> None:
    done = command("--arch", "sm_90a", "--multiprocessors", "3", "--seed", "1", SCRIPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["device (9, 0) 3", "PASS"]
    report = done.stderr[done.stderr.index("emulator: 2 launches in ") :].splitlines()
    assert report[1].split() == ["kernel", "grid", "cluster", "block", "shared", "launches", "seconds"]
    add, persistent = report[2:4]
    assert "add_kernel" in add and "4 × 1 × 1  2 × 1 × 1  64 × 1 × 1  0       1 " in add
    assert "persistent_kernel" in persistent and "3 × 1 × 1  1 × 1 × 1  32 × 1 × 1  0       1 " in persistent


def test_a_finding_is_the_exit_status_even_if_the_program_goes_on() -> None:
    done = command("--arch", "sm_90a", "--quiet", SCRIPT, "--overrun", "64", "--swallow")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "went on after OutOfBounds"
    assert "emulator: finding 1, OutOfBounds:" in done.stderr and "add_kernel" in done.stderr
    assert f"({SCRIPT}:" in done.stderr, "the finding names no source line"
    assert "Traceback" not in done.stderr and "launches in" not in done.stderr


def test_exceptions_and_exit_statuses_are_the_programs_own(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys\nprint(sys.argv[1:], __name__)\nsys.exit(7) if sys.argv[1:] else print(1 / 0)\n")
    done = command(str(program), "-x", "--seed")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (7, "['-x', '--seed'] __main__", "")
    done = command(str(program))
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert done.stderr.splitlines()[1] == f'  File "{program}", line 3, in <module>'  # the runner's frames are left out


RACE = """
import cutlass, cutlass.cute as cute, torch
from cutlass.cute.runtime import from_dlpack

@cute.kernel
def reverse(x: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    tile = cutlass.memory.SmemAllocator().allocate_tensor(cutlass.Float32, cute.make_layout(64))
    tile[thread] = x[thread]
    x[thread] = tile[63 - thread]

@cute.jit
def run(x: cute.Tensor):
    reverse(x).launch(grid=[1, 1, 1], block=[64, 1, 1])

run(from_dlpack(torch.zeros(64)))
"""


def test_races_are_looked_for_where_asked(tmp_path: Path) -> None:
    program = tmp_path / "race.py"
    program.write_text(RACE)
    assert command("--no-races", str(program)).returncode == 0
    done = command("--races", str(program))
    assert done.returncode == 1 and "emulator: finding 1, DataRace:" in done.stderr
    assert f"({program}:9)" in done.stderr and f"({program}:10)" in done.stderr  # both accesses, by source line


def test_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    done = command("--arch", "sm_90a", "--trace", str(path), SCRIPT)
    assert done.returncode == 0, done.stderr
    events = json.loads(path.read_text())["traceEvents"]
    assert sum(e["name"] == "process_name" for e in events) == 4  # two CTAs of each launch
    assert {"add_kernel", "persistent_kernel"} <= {e["name"] for e in events if e["ph"] == "X"}  # by line information
    assert f"written to {path}" in done.stderr


def test_what_cannot_be_run(tmp_path: Path) -> None:
    """It is said before anything runs, and without a traceback."""
    for arguments, message in (
        (["nowhere.py"], "there is no nowhere.py; -m runs a module by its name"),
        (["--seed", "-1", SCRIPT], "seed=-1: a number from 0 on"),
        (["--multiprocessors", "0", SCRIPT], "multiprocessors=0: a positive number"),
        (["--trace", str(tmp_path / "no" / "where.json"), SCRIPT], "No such file or directory"),
    ):
        done = command(*arguments)
        assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
        assert message in done.stderr.splitlines()[-1]


def test_help() -> None:
    done = command("--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("--arch", "--seed", "examples:", "exit status:"))
    assert command().returncode == 2
