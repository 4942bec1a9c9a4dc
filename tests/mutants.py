"""Kernels with one synchronising instruction less, launched in place of the original on the same memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from unittest import mock

from cute_attn.emulator import capture
from cute_attn.emulator.errors import EmulatorError
from cute_attn.emulator.launch import LaunchRecord
from cute_attn.emulator.module import Kernel
from cute_attn.emulator.parser import parse

_PHASE_WAIT = re.compile(r"\s*mbarrier\.try_wait\S*\s+(%?\w+),")
_GROUP_WAIT = re.compile(r"\s*(?:cp\.async|cp\.async\.bulk|wgmma)\.wait_group\S*\s+(\d+);")


def without_each(ptx: str, synchronises: str) -> dict[str, str]:
    """The program without each of the instructions that match a pattern, by line number and text.

    A wait for all but n groups waits for one less too; a wait at an mbarrier finds the phase complete at once.
    """
    lines = ptx.splitlines()
    variants = {}

    def put(n: int, *replacement: str) -> None:
        text = replacement[0] if replacement else lines[n]
        variants[f"{n}: {' '.join(text.split())}"] = "\n".join([*lines[:n], *replacement, *lines[n + 1 :]])

    for n, line in enumerate(lines):
        if not re.match(rf"\s*(?:{synchronises})", line):
            continue
        if wait := _PHASE_WAIT.match(line):
            put(n, f"setp.eq.u32 {wait[1]}, 0, 0; // {line.strip()}")
            continue
        put(n)
        if wait := _GROUP_WAIT.match(line):
            put(n, line.replace(f"{wait[1]};", f"{int(wait[1]) + 1};"))
    return variants


def _finding(launch: Callable[..., LaunchRecord], *arguments: object) -> EmulatorError | None:
    try:
        launch(*arguments)
    except EmulatorError as error:
        return error
    return None


def findings(name: str, synchronises: str, run: Callable[[], object]) -> dict[str, EmulatorError | None]:
    """What is found in each variant of the kernels whose name contains `name`, launched as `run` launches them."""
    found: dict[str, EmulatorError | None] = {}
    original = capture.launch

    def launch(kernel: Kernel, *arguments: object) -> LaunchRecord:
        if name in kernel.name:
            modules = capture._runtime.modules
            ptx = next(m.ptx for m in modules if m.kernels and any(kernel is known for known in m.kernels.values()))
            for what, text in without_each(ptx, synchronises).items():
                found[what] = _finding(original, parse(text)[kernel.name], *arguments)
        return original(kernel, *arguments)

    with mock.patch.object(capture, "launch", launch):
        run()
    assert found
    return found
