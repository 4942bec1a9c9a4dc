"""The race detector on our own kernels: nothing found, and every barrier, wait or commit that is taken away is."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

import cute_attn
from cute_attn.emulator import capture
from cute_attn.emulator.errors import DataRace, EmulatorError
from cute_attn.emulator.launch import LaunchRecord
from cute_attn.emulator.module import Kernel
from cute_attn.emulator.parser import parse

SYNCHRONISES = re.compile(r"\s*(?:bar\.sync|cp\.async\.wait_group|cp\.async\.commit_group)\b")


@pytest.fixture(autouse=True)
def on_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")


def finding(launch: Callable[..., LaunchRecord], *arguments: object) -> EmulatorError | None:
    try:
        launch(*arguments)
    except EmulatorError as error:
        return error
    return None


def run_mutants(
    monkeypatch: pytest.MonkeyPatch, name: str, mutate: Callable[[str], dict[str, str]], run: Callable[[], object]
) -> dict[str, EmulatorError | None]:
    """What is found in variants of the kernel whose name contains `name`, each launched as `run` launches it."""
    found: dict[str, EmulatorError | None] = {}
    original = capture.launch

    def launch(kernel: Kernel, *arguments: object) -> LaunchRecord:
        if name in kernel.name:
            modules = capture._runtime.modules
            ptx = next(m.ptx for m in modules if m.kernels and any(kernel is known for known in m.kernels.values()))
            for what, text in mutate(ptx).items():
                found[what] = finding(original, parse(text)[kernel.name], *arguments)
        return original(kernel, *arguments)

    monkeypatch.setattr(capture, "launch", launch)
    run()
    assert found
    return found


def without_each(ptx: str) -> dict[str, str]:
    """The program without one of its barriers, waits and commits, for each of them; and with waits for one less."""
    lines = ptx.splitlines()
    variants = {}
    for n, line in enumerate(lines):
        if SYNCHRONISES.match(line):
            variants[f"{n}: {line.strip()}"] = "\n".join(lines[:n] + lines[n + 1 :])
        if "cp.async.wait_group" in line:
            more = re.sub(r"\d+;", lambda count: f"{int(count[0][:-1]) + 1};", line)
            variants[f"{n}: {more.strip()}"] = "\n".join([*lines[:n], more, *lines[n + 1 :]])
    return variants


def inputs(seq: int, head_dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 1, seq, head_dim, generator=generator).half() for _ in range(3)]


def test_attention_without_one_barrier_wait_or_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal, so that the masked and the steady loop both run."""
    found = run_mutants(
        monkeypatch,
        "AttentionSm80",
        without_each,
        lambda: cute_attn.attention(*inputs(256, 64), causal=True, arch="sm_80"),
    )
    opcodes = [what.split()[1].split(";")[0] for what in found]
    assert {opcode: opcodes.count(opcode) for opcode in {*opcodes}} == {
        "bar.sync": 2,
        "cp.async.wait_group": 4,
        "cp.async.commit_group": 3,
    }
    missed = [what for what, error in found.items() if not isinstance(error, DataRace)]
    assert not missed
    for what, error in found.items():
        if "bar.sync" in what:
            assert "no barrier orders" in str(error)
        else:
            assert "cp.async.wait_group" in str(error)


def test_quantiser_without_one_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_mutants(
        monkeypatch, "KeyValueTiles", without_each, lambda: cute_attn.quantize(*inputs(128, 64), arch="sm_80")
    )
    assert all("bar.sync" in what for what in found)
    assert not [what for what, error in found.items() if not isinstance(error, DataRace)]


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("causal, seq, head_dim", [(False, 200, 128), (True, 333, 64)])
def test_nothing_is_found_in_any_order(seed: int | None, causal: bool, seq: int, head_dim: int) -> None:
    q, k, v = inputs(seq, head_dim)
    usual = cute_attn.attention(q, k, v, causal=causal, arch="sm_80")
    with cute_attn.emulator.settings(seed=seed, races=True):
        assert torch.equal(cute_attn.attention(q, k, v, causal=causal, arch="sm_80"), usual)
