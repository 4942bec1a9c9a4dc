"""The benchmark without a GPU: a clock that is told what to show, peers that are told what to do, the emulator."""

from __future__ import annotations

import concurrent.futures.process
import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
import unittest.mock
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cute_attn import cli, jit, recipes, reference
from cute_attn.arch import ARCHS
from cute_attn.bench import comparison, compilation, cuda_timer, problems, provenance, results, runner, table
from cute_attn.bench.accuracy import Sample
from cute_attn.bench.compilation import kernels_needed
from cute_attn.bench.contender import Formats, Prepared
from cute_attn.bench.ours import Ours, chosen_recipes, recipe_from_text
from cute_attn.bench.peers import chosen_peers, peers
from cute_attn.bench.peers.torch_sdpa import TorchSdpa
from cute_attn.bench.provenance import Clocks, Provenance
from cute_attn.bench.runner import Machine, Settings
from cute_attn.bench.timing import Pace, Timing, measure
from cute_attn.commands import bench
from cute_attn.commands.check import random_inputs
from cute_attn.dispatch import Support, default_config
from cute_attn.kernels.attention_sm90 import AttentionSm90
from cute_attn.problem import Problem
from cute_attn.reference import Errors

from . import bench_peers

PROVENANCE = Provenance(
    "NVIDIA H200", "9.0", 132, 1 << 37, 60 << 20, "580", "13.0", 91400, "3.11", "Linux", {"torch": "2.13"}, "abc"
)


class FakeTimer:
    """Shows the seconds that a call returns, or those of a table by call, and keeps a log."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def ready(self, call, capturable):
        return call, "graph" if capturable else "stream"

    def cold(self) -> None:
        self.log.append("cold")

    def seconds(self, call) -> float:
        out = call()
        self.log.append(str(out) if isinstance(out, float) else "run")
        return out if isinstance(out, float) else 0.25


def machine(timer=None) -> Machine:
    return Machine(
        torch.device("cpu"),
        (9, 0),
        "sm_90a",
        timer or FakeTimer(),
        PROVENANCE,
        lambda work: Clocks(1755, 3201, 640, 61 + 0 * work().numel()),
    )


@pytest.fixture(autouse=True)
def on_the_emulator(monkeypatch):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")


# Timing


def test_contenders_take_turns_and_caches_are_cold():
    timer = FakeTimer()
    found = measure(
        {"a": (lambda: 0.1, True), "b": (lambda: 0.2, False)}, timer, Pace(seconds=1.0, warm_up=0.1, fewest=2)
    )
    one_round = ["cold", "0.1", "cold", "0.2"]
    assert timer.log == ["0.1", "0.2", *one_round, "cold", "0.2", "cold", "0.1", *one_round]  # the first two: warm-up
    assert found["a"] == Timing(0.1, 0.1, 0.1, 0.1, 3, "graph")
    assert found["b"] == Timing(0.2, 0.2, 0.2, 0.2, 3, "stream")


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 5), (1.0, 10), (100.0, 20)])
def test_rounds_follow_from_the_seconds_allowed(seconds, rounds):
    found = measure({"a": (lambda: 0.1, True)}, FakeTimer(), Pace(seconds, 0.05, 5, 20))
    assert found["a"].samples == rounds


def test_warm_up_lasts_as_long_as_it_should():
    timer = FakeTimer()
    measure({"a": (lambda: 0.1, True)}, timer, Pace(seconds=0.0, warm_up=0.45, fewest=1))
    assert timer.log.count("0.1") == 5 + 1


def test_median_and_spread():
    shown = iter([9.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    found = measure({"a": (lambda: next(shown), True)}, FakeTimer(), Pace(seconds=0.0, warm_up=0.1, fewest=5))
    assert (found["a"].median, found["a"].quartile_1, found["a"].quartile_3, found["a"].fastest) == (3, 2, 4, 1)
    assert found["a"].spread == pytest.approx(1 / 3)


def test_a_call_that_fails_does_not_stop_the_others():
    class Capturing(FakeTimer):
        def ready(self, call, capturable):
            if capturable:
                raise RuntimeError("cannot\n capture this")
            return call, "stream"

    answers = iter([0.1, 0.1, 0.1])

    def tires() -> float:
        try:
            return next(answers)
        except StopIteration:
            raise MemoryError from None

    calls = {"never": (lambda: 0.1, True), "tires": (tires, False), "works": (lambda: 0.1, False)}
    found = measure(calls, Capturing(), Pace(seconds=0.0, warm_up=0.1, fewest=4))
    assert found["never"] == "RuntimeError: cannot capture this"
    assert found["tires"] == "MemoryError"
    assert found["works"].samples == 4


# Problems and recipes by name


def test_names_of_problems_read_back():
    for suite in problems.SUITES.values():
        for problem in suite:
            assert problems.chosen([problems.label(problem)], quick=False, dtype="bfloat16") == [problem]
    cross = Problem(2, 8, 2, 512, 4096, 96, "float16", True)
    assert problems.label(cross) == "b2_h8_kv2_s512x4096_d96_causal"
    assert problems.chosen([problems.label(cross)], quick=True, dtype="float16") == [cross]


def test_suites_and_their_short_form():
    everything = problems.chosen(None, quick=False, dtype="bfloat16")
    assert len(everything) == len(set(everything)) == 24 + 3 + 2 + 6
    quick = problems.chosen(None, quick=True, dtype="float16")
    assert {p.dtype for p in quick} == {"float16"}
    assert [replace(p, dtype="bfloat16") for p in quick] == list(problems.QUICK)
    for suite in problems.SUITES.values():
        assert set(suite) & set(problems.QUICK)
    assert len(problems.chosen(["video", "video"], quick=False, dtype="bfloat16")) == 2
    with pytest.raises(ValueError, match="--shapes vidoe: use a suite .peers, model, video, short. or a shape such as"):
        problems.chosen(["vidoe"], quick=False, dtype="bfloat16")


def test_recipes_by_name():
    assert recipe_from_text("int8") == recipes()["int8"]
    changed = recipe_from_text("int8_fp16:accumulate=float16+float32,smooth_v=true")
    assert changed == recipes()["int8_fp16"].replace(accumulate="float16+float32", smooth_v=True)
    assert [ours.name for ours in chosen_recipes(None, "sm_80")] == list(recipes())
    assert chosen_recipes(["none"], "sm_80") == []
    for text, message in (
        ("int9", "recipe='int9' is not known"),
        ("int8:speed=high", "'speed=high' is not FIELD=VALUE; fields are accumulate"),
        ("int8:smooth_v", "'smooth_v' is not FIELD=VALUE"),
        ("int8:accumulate=float16", "recipe.accumulate='float16' is not offered"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe_from_text(text)


def test_tile_configs_from_the_command_line():
    problem = Problem(1, 8, 8, 1000, 1000, 128, "bfloat16", False)
    text = "int8_fp8:smooth_v=true@warpgroups=2,overlap=true"
    (ours,) = chosen_recipes([text], "sm_90a")
    assert ours.name == text and ours.recipe.smooth_v and ours.supports(problem)
    default = default_config(ours.recipe, problem, ARCHS["sm_90a"])
    assert ours.config(problem) == replace(default, warpgroups=2, overlap=True)
    assert {k.config.overlap for k in kernels_needed([problem], [ours]) if k.kernel_class is AttentionSm90} == {True}
    assert chosen_recipes(["int8_fp8"], "sm_90a")[0].config(problem) is None
    (refused,) = chosen_recipes(["int8_fp8@overlap=true"], "sm_90a")
    assert "use warpgroups=2" in refused.supports(problem).reason
    (other,) = chosen_recipes(["int8_fp8@warps=4"], "sm_90a")
    assert "has no field 'warps'; use one of warpgroups" in other.supports(problem).reason
    with pytest.raises(ValueError, match="'speed=1' is not FIELD=VALUE; fields are cluster, fma_eighths, m_tiles"):
        chosen_recipes(["int8@speed=1"], "sm_90a")


# Accuracy


@pytest.mark.parametrize("causal", [False, True])
def test_a_sample_of_all_rows_has_the_errors_of_the_whole(causal):
    problem = Problem(2, 4, 4, 40, 60, 16, "float16", causal)
    q, k, v = random_inputs(problem, "normal", 0)
    out = reference.attention(q, k, v, causal=causal)[0].half()
    expected = reference.errors(out, reference.attention(q, k, v, causal=causal)[0])
    found = Sample(q, k, v, problem).errors(out)
    assert found.rel_l2 == pytest.approx(expected.rel_l2, rel=1e-9)
    assert found.cos == pytest.approx(expected.cos, rel=1e-12)


def test_a_sample_spans_rows_heads_and_batches():
    problem = Problem(3, 16, 8, 300, 200, 16, "float16", True)  # the first 100 rows see no key
    q, k, v = random_inputs(problem, "normal", 0)
    sample = Sample(q, k, v, problem)
    exact = reference.attention(q, k, v, causal=True)[0]
    assert sample.errors(exact).rel_l2 < 1e-12
    for wrong in ((0, 0, 299), (2, 15, 299), (0, 0, 0), (2, 15, 100)):
        out = exact.clone()
        out[wrong] += 1
        assert sample.errors(out).rel_l2 > 0.01, wrong


# What a time means


def row(contender: str, seconds: float | None, rel_l2: float, **changes) -> results.Row:
    spent = None if seconds is None else Timing(seconds, seconds, seconds, seconds, 5, "graph")
    fields = {
        "problem": Problem(4, 32, 32, 8192, 8192, 128, "bfloat16"),
        "contender": contender,
        "ours": False,
        "quantises": True,
        "formats": Formats("int8", "e4m3", "float32+float32"),
        "attention": spent,
        "whole": spent and replace(spent, median=1.1 * seconds),
        "errors": Errors(rel_l2, rel_l2, 1 - rel_l2**2 / 2, rel_l2),
    }
    return results.Row(**{**fields, **changes})


def test_operations_per_second_and_share_of_the_peak():
    ours = row("int8_fp8", 4 * 4 * 32 * 8192**2 * 128 / 1.1e15, 0.01)
    assert comparison.tops(ours, "attention") == pytest.approx(1100)
    assert comparison.tops(ours, "whole") == pytest.approx(1000)
    assert comparison.of_peak(ours, "attention", "NVIDIA H200") == pytest.approx(1100 / 1978.9, rel=1e-4)
    assert comparison.of_peak(ours, "attention", "NVIDIA GeForce GTX 1080") is None
    causal = replace(ours, problem=replace(ours.problem, causal=True))
    assert comparison.tops(causal, "attention") == pytest.approx(550)


def test_the_best_peer_is_not_more_accurate():
    ours = row("int8_fp8", 1.0, 0.02, ours=True)
    rows = [
        ours,
        row("another of ours", 0.1, 0.03, ours=True),
        row("as accurate", 1.5, 0.0195),
        row("worse", 1.4, 0.05),
        row("slow and bad", 3.0, 0.5),
        row("more accurate", 1.3, 0.002, quantises=False, whole=None),
        row("not measured", None, 0.04),
        row("broken", 0.1, float("nan")),
        replace(row("another problem", 0.2, 0.04), problem=Problem(1, 1, 1, 8, 8, 8, "float16")),
    ]
    assert comparison.best_peer(ours, rows, "attention") == (pytest.approx(1.4), "worse")
    assert comparison.best_peer(ours, rows, "attention", any_accuracy=True) == (pytest.approx(1.3), "more accurate")
    assert comparison.best_peer(ours, rows, "whole", any_accuracy=True) == (pytest.approx(1.3 / 1.1), "more accurate")
    assert comparison.best_peer(ours, rows[:2], "attention") is None
    assert comparison.best_peer(rows[-2], rows, "attention") is None


# Results


def test_results_read_back_and_are_not_edited(tmp_path):
    file = tmp_path / "results" / "h200.json"
    kept = results.Results(PROVENANCE, {"seed": 0}, {"sage": "not installed"}, (row("a", 1.0, 0.1), row("b", None, 1)))
    kept.save(file)
    assert results.load(file) == kept
    assert [path.name for path in file.parent.iterdir()] == ["h200.json"]
    text = file.read_text()
    file.write_text(text.replace('"median": 1.0', '"median": 0.9'))
    with pytest.raises(ValueError, match="was changed after it was written"):
        results.load(file)
    file.write_text(text.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(ValueError, match="has schema 2, this version reads 1"):
        results.load(file)
    for other in ("{}", "[]", "no JSON"):
        file.write_text(other)
        with pytest.raises(ValueError, match="is no result of cute-attn bench"):
            results.load(file)


def test_where_results_come_from(monkeypatch):
    installed = provenance.versions()
    assert installed["torch"] == torch.__version__ and "cute-attn" in installed and "sageattention" not in installed
    (head,) = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    ).stdout.split()
    assert provenance.commit() in (head, head + "+changes")
    monkeypatch.setenv("PATH", "")  # no git, as in a copy of the sources on another machine
    assert provenance.commit() is None
    monkeypatch.setenv("CUTE_ATTN_COMMIT", "abc")
    assert provenance.commit() == "abc"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("1755, 3201, 640.5, 61", Clocks(1755, 3201, 640.5, 61)), ("[N/A], 1, 2, 3", None), ("", None)],
)
def test_clocks_are_read_while_the_device_works(monkeypatch, answer, expected):
    worked = threading.Event()

    def asked(device, fields):
        assert worked.wait(10) and fields.startswith("clocks.sm,")
        return answer.split(", ")

    monkeypatch.setattr(provenance, "_asked", asked)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert provenance.clocks(torch.device("cuda"), worked.set) == expected


# A run


class FakePeer:
    """Exact attention, or what the test wants to go wrong."""

    ours, capturable, quantises = False, True, False

    def __init__(self, name: str, where: str = "") -> None:
        self.name, self.where = name, where

    def formats(self, problem):
        return Formats(problem.dtype, problem.dtype)

    def available(self):
        if self.where == "import":
            raise ImportError("undefined symbol")
        return Support("is not installed" if self.where == "available" else None)

    def supports(self, problem):
        return Support("takes no such problem" if self.where == "supports" else None)

    def prepare(self, q, k, v, problem):
        if self.where == "prepare":
            raise AssertionError("wants other tensors")
        calls = iter(range(1 if self.where == "timing" else 1000))

        def call():
            if next(calls, None) is None:
                raise RuntimeError("device lost")
            return reference.attention(q, k, v, causal=problem.causal)[0].to(q.dtype)

        return Prepared(call)


def test_a_run_with_everything_that_can_go_wrong():
    problem = Problem(1, 2, 1, 40, 40, 32, "float16", True)
    contenders = [
        Ours("int8", recipes()["int8"], "sm_90a"),
        Ours("int4_int8", recipes()["int4_int8"], "sm_90a"),
        *(FakePeer(where or "exact", where) for where in ("", "available", "import", "supports", "prepare", "timing")),
    ]
    found = runner.run([problem], contenders, machine(), Settings(pace=Pace(1.0, 0.1, 2, 2)))
    by_name = {row.contender: row for row in found.rows}
    assert found.absent == {"available": "is not installed", "import": "ImportError: undefined symbol"}
    assert list(by_name) == ["int8", "int4_int8", "exact", "supports", "prepare", "timing"]
    ours = by_name["int8"]
    assert ours.attention.samples == ours.whole.samples == 2 and ours.reason is None
    assert 1e-4 < ours.errors.rel_l2 < 0.05 and by_name["exact"].errors.rel_l2 < 1e-3
    assert by_name["exact"].whole is None and by_name["exact"].clocks == Clocks(1755, 3201, 640, 61)
    assert "has no kernel for sm_90a" in by_name["int4_int8"].reason
    assert by_name["supports"].reason == "takes no such problem"
    assert by_name["prepare"].reason == "AssertionError: wants other tensors"
    assert by_name["timing"].reason == "attention: RuntimeError: device lost"
    assert by_name["timing"].attention is None and by_name["timing"].errors is not None
    printed = table.text(found)
    assert "b1_h2_kv1_s40_d32_causal, float16, SM at 1755 MHz" in printed
    assert "> int8 " in printed and "not there\n  available: is not installed" in printed
    assert printed.count("not measured: ") == 4


def test_the_larger_error_of_the_two_calls_counts():
    class Wrong(FakePeer):
        quantises = True

        def prepare(self, q, k, v, problem):
            right = super().prepare(q, k, v, problem).attention
            return Prepared(lambda: right() * float("nan"), right)

    problem = Problem(1, 1, 1, 8, 8, 8, "float16")
    (only,) = runner.run([problem], [Wrong("wrong")], machine(), Settings(pace=Pace(0.1, 0.1, 1, 1))).rows
    assert only.errors.rel_l2 != only.errors.rel_l2


# The command


def run_command(capsys, monkeypatch, *options: str) -> tuple[int, str, str]:
    monkeypatch.setattr(bench, "cuda_machine", machine)
    status = cli.main(["bench", "--seconds", "0.1", "--jobs", "1", *options])
    return status, *capsys.readouterr()


def test_command(capsys, monkeypatch, tmp_path):
    file = tmp_path / "new" / "out.json"
    options = "--shapes b1_h2_s40_d32 b1_h2_s40_d32_causal --recipes int8 fp16 --peers sdpa_flash sdpa_cudnn sage"
    extra = ["--dtype", "float16", "--inputs", "uniform", "--seed", "3", "--json", str(file)]
    status, printed, _ = run_command(capsys, monkeypatch, *options.split(), *extra)
    assert status == 0
    found = results.load(file)
    assert [row.contender for row in found.rows] == ["int8", "fp16", "sdpa_flash", "sdpa_cudnn"] * 2
    assert [row.problem.causal for row in found.rows] == [False] * 4 + [True] * 4
    for row in found.rows:
        assert row.problem.dtype == "float16"
        assert (row.attention is None) == (row.contender == "sdpa_cudnn"), row
        assert row.attention is None or row.errors.rel_l2 < 0.02  # uniform inputs
    assert found.settings["inputs"] == "uniform" and found.settings["seed"] == 3
    assert found.settings["pace"]["seconds"] == 0.1
    assert "sage: SageAttention is not installed" in printed and f"written to {file}" in printed
    assert "sdpa_cudnn" in printed and "not measured: RuntimeError: No " in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--peers nobody",
            "--peers nobody is not known; use some of sdpa_flash, sdpa_cudnn, flash_attn_4, ",
        ),
        ("--recipes none --peers none", "leave nothing to measure"),
        ("--seconds 0", "--seconds 0.0: use more than 0"),
        ("--jobs 0", "--jobs 0: use 1 or more"),
        ("--shapes 17", "--shapes 17: use a suite"),
    ],
)
def test_command_refuses(capsys, monkeypatch, options, message):
    status, _, error = run_command(capsys, monkeypatch, *options.split())
    assert status == 2 and message in error


def test_command_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--quick"]) == 2
    printed = capsys.readouterr().err
    assert "measures on a CUDA device, and PyTorch sees none" in printed and "python perf/static.py" in printed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.main(["bench", "--quick"]) == 2
    assert "CUTE_ATTN_BACKEND=emulator hides it" in capsys.readouterr().err


def test_the_device_that_is_measured(monkeypatch):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "cuda")
    for name, answer in (
        ("is_available", lambda: True),
        ("current_device", lambda: 1),
        ("get_device_capability", lambda device: (9, 0)),
    ):
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(bench, "CudaTimer", lambda device: FakeTimer())
    monkeypatch.setattr(bench, "provenance", lambda device: PROVENANCE)
    found = bench.cuda_machine()
    assert (found.device, found.capability, found.arch) == (torch.device("cuda", 1), (9, 0), "sm_90a")


def test_cuda_timer_captures_checks_and_reads_events(monkeypatch):
    """PyTorch's CUDA calls, with the CPU doing the work: a graph replays what was called while it was captured."""
    calls: list[str] = []
    pools: list[object] = []
    streams: list[object] = []
    moments = iter([10.0, 12.5])

    class Graph:
        def pool(self) -> Graph:
            return self

        def replay(self) -> None:
            calls.append("replay")
            if replayed is not None:
                replayed()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(moments)

        def synchronize(self) -> None: ...
        def elapsed_time(self, end) -> float:
            return end.at - self.at

    @contextlib.contextmanager
    def capture(graph, pool, stream):
        calls.append("capture")
        pools.append(pool)
        streams.append(stream)
        yield

    fakes = {"Event": Event, "CUDAGraph": Graph, "graph": capture, "Stream": lambda device: object()}
    fakes |= {"stream": lambda stream: contextlib.nullcontext(), "current_stream": lambda device: "current"}
    for name, fake in {**fakes, "synchronize": lambda device: None}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(cuda_timer, "_FLUSHED_BYTES", 64)
    out = torch.zeros(4, dtype=torch.float8_e4m3fn)

    def call() -> torch.Tensor:
        calls.append("call")
        return out.fill_(1)

    timer, replayed = cuda_timer.CudaTimer(torch.device("cpu")), call
    ready, launch = timer.ready(call, True)
    assert launch == "graph" and calls == [*["call"] * 3, "capture", "call", "replay", "call"]
    timer.cold()
    calls.clear()
    assert timer.seconds(ready) == pytest.approx(2.5e-3) and calls == ["replay", "call"]
    assert timer.ready(call, False) == (call, "stream")
    again, _ = timer.ready(call, True)
    assert pools == [None, ready.__self__] and streams[0] is streams[1]

    def uncapturable() -> torch.Tensor:
        if len(pools) == 3:
            raise RuntimeError("not permitted while capturing")
        return out

    with pytest.raises(RuntimeError, match="not permitted"):
        timer.ready(uncapturable, True)
    replayed = None  # launched elsewhere: the graph is empty
    with pytest.raises(RuntimeError, match="leaves parts of the output unwritten"):
        timer.ready(call, True)
    assert pools[2] in (ready.__self__, again.__self__) and streams[2] is streams[1]
    assert pools[3] is None and streams[3] is not streams[2]


def test_every_kernel_is_compiled_ahead_once():
    shapes = [Problem(1, 2, 2, 40, seq_k, 32, "float16") for seq_k in (40, 80)]  # the same kernels
    contenders = [*chosen_recipes(["int8", "bf16", "fp16"], "sm_90a"), FakePeer("exact")]
    needed = compilation.kernels_needed(shapes, contenders)
    assert len(needed) == 5 + 1  # four quantisers and attention; bf16 takes no float16
    done = []
    compilation.compile_ahead(needed[-2:], 2, lambda: done.append(True))
    assert len(done) == 2
    for kernel in needed[-2:]:
        assert jit.build(kernel.kernel_class, kernel.config, kernel.arch).arch == "sm_90a"


def test_a_broken_pool_says_so_once(monkeypatch, caplog):
    def broken(*arguments, **options):
        executor = unittest.mock.MagicMock()
        executor.__enter__.return_value = executor
        future = concurrent.futures.Future()
        future.set_exception(concurrent.futures.process.BrokenProcessPool("terminated abruptly"))
        executor.submit.return_value = future
        return executor

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", broken)
    compilation.compile_ahead(["one", "another"], 2, lambda: pytest.fail("nothing was compiled"))
    assert [record.getMessage() for record in caplog.records] == ["compiling ahead failed: terminated abruptly"]


# Peers


def peer_errors(name: str, problem: Problem, capability=(9, 0)) -> list[Errors]:
    """Of attention alone and with quantisation, those of the two that there are."""
    peer = peers(capability)[name]
    assert peer.available() and peer.supports(problem)
    q, k, v = random_inputs(problem, "normal", 0)
    sample = Sample(q, k, v, problem)
    prepared = peer.prepare(q, k, v, problem)
    return [sample.errors(prepared.output(call())) for call in (prepared.attention, prepared.whole) if call]


@pytest.fixture
def pretend(monkeypatch):
    """Makes modules importable."""

    def add(modules):
        for name, module in modules.items():
            module.__spec__ = importlib.util.spec_from_loader(name, None)
            monkeypatch.setitem(sys.modules, name, module)

    return add


@pytest.mark.parametrize("causal", [False, True])
def test_sage_is_called_as_its_code_wants(pretend, causal):
    pretend(bench_peers.sageattention())
    alone, whole = peer_errors("sage", Problem(2, 4, 2, 150, 150, 64, "bfloat16", causal))
    assert 1e-3 < alone.rel_l2 < 0.05  # really quantised
    assert whole.rel_l2 < 5e-3


def test_sparge_is_called_as_its_code_wants(pretend):
    pretend(bench_peers.spas_sage_attn())
    (only,) = peer_errors("sparge_1", Problem(1, 2, 2, 128, 128, 64, "float16", True))
    assert only.rel_l2 < 1e-3


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn_3_is_called_as_its_code_wants(pretend, causal):
    pretend(bench_peers.flash_attn_interface())
    alone, whole = peer_errors("flash_attn_3_fp8", Problem(2, 4, 2, 40, 70, 64, "bfloat16", causal))
    assert 1e-3 < alone.rel_l2 < 0.1 and whole == alone


@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_is_called_as_its_bindings_want(monkeypatch, pretend, causal):
    pretend(bench_peers.cudnn())

    class Stream:
        cuda_stream = 0

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    alone, whole = peer_errors("cudnn_fp8", Problem(2, 4, 2, 70, 70, 64, "bfloat16", causal))
    assert 1e-3 < alone.rel_l2 < 0.1 and 1e-3 < whole.rel_l2 < 0.1
    assert abs(alone.rel_l2 - whole.rel_l2) < 5e-3


def test_sdpa_says_why_a_backend_does_not_serve():
    assert peer_errors("sdpa_flash", Problem(1, 2, 2, 40, 40, 32, "bfloat16", True))[0].rel_l2 < 5e-3
    problem = Problem(1, 2, 2, 40, 40, 32, "bfloat16")
    with pytest.raises(RuntimeError, match="No (available|viable)"):
        TorchSdpa((9, 0), "cudnn").prepare(*random_inputs(problem, "normal", 0), problem)


def test_flash_attn_4_is_right_on_the_emulator():
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn-4 is not installed; `pip install cute-attn[test]` brings it")
    script = Path(__file__).with_name("foreign_bench_peer.py")
    done = subprocess.run([sys.executable, str(script), "sm_90a"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["shape"] == [1, 4, 150, 64] and found["rel_l2"] < 5e-3


def test_peers_refuse_with_a_reason():
    problem = Problem(1, 2, 1, 40, 60, 96, "float16", True)
    on_hopper, on_pascal = peers((9, 0)), peers((6, 1))
    for name in ("sdpa_flash", "sdpa_cudnn", "cudnn_fp8"):
        assert "top-left" in on_hopper[name].supports(problem).reason
    assert on_hopper["flash_attn_4"].supports(problem)
    assert "64 and 128" in on_hopper["sage"].supports(problem).reason
    assert "KV heads" in on_hopper["sparge_0.5"].supports(replace(problem, head_dim=64)).reason
    assert "at least 128 queries" in on_hopper["sparge_1"].supports(replace(problem, head_dim=64, kv_heads=2)).reason
    assert "6.1" in on_pascal["sage"].available().reason and "6.1" in on_pascal["sparge_1"].available().reason
    assert "8.0" in on_pascal["flash_attn_4"].available().reason
    assert "Hopper" in on_pascal["flash_attn_3_fp8"].available().reason
    assert "64, 128 and 256" in on_hopper["flash_attn_3_fp8"].supports(problem).reason
    assert "Hopper" in on_pascal["cudnn_fp8"].available().reason
    for name in ("sage", "sparge_1", "cudnn_fp8"):
        if importlib.util.find_spec({"sage": "sageattention", "sparge_1": "spas_sage_attn"}.get(name, "cudnn")) is None:
            assert "not installed" in on_hopper[name].available().reason
    assert [peer.name for peer in chosen_peers(None, (9, 0))] == list(on_hopper)


# On a GPU


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "cuda")
    file = tmp_path / "out.json"
    options = ["--shapes", "b2_h4_s512_d64_causal", "--recipes", "int8", "bf16", "--peers", "sdpa_flash"]
    assert cli.main(["bench", "--seconds", "0.2", *options, "--json", str(file)]) == 0
    rows = {row.contender: row for row in results.load(file).rows}
    for row in rows.values():
        assert row.attention.launch == "graph" and 1e-6 < row.attention.median < 0.1, row
        assert row.errors.rel_l2 < 0.05
    assert rows["int8"].whole.samples >= 5 and rows["bf16"].whole is None
