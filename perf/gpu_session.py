"""Everything that a freshly lent GPU should be asked, in one go; needs no network.

On any machine, before:    python perf/gpu_session.py prepare FILE [--arch sm_90a]
On the machine with a GPU: python perf/gpu_session.py run DIRECTORY [--emulated FILE] [--quick] [--minutes 9]

`prepare` runs every recipe that has a kernel for the arch on the emulator, on small problems, and keeps inputs,
quantised tensors and outputs. `run` then writes into DIRECTORY

    compare.json   the same problems on the GPU: quantisers bit for bit, outputs within the tolerances of the tests
    bench.json     what `cute-attn bench` measures
    tiles.json     the same of `TILES`: what else the default tile configs might be
    tests.txt      what `pytest -m gpu` prints
    session.json   how long each took, and how it ended

each step in a process of its own, with an equal share of what is left of --minutes, so that neither a crash nor a hang
of one costs the others. The status is 0 if all of them ended well. The package must be importable: where nothing can be
downloaded, `pip install --no-deps --no-build-isolation -e .` beside wheels that were brought along.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cute_attn import Problem, attention, quantize, reference, supports
from cute_attn.arch import ARCHS
from cute_attn.bench.provenance import commit
from cute_attn.commands.check import LSE_TOLERANCE, TOLERANCE, largest_difference, random_inputs, same_bits
from cute_attn.recipe import recipes

STEPS = ("compare", "bench", "tiles", "tests")

ROOT = Path(__file__).resolve().parents[1]

SHAPES = (
    (1, 2, 1, 200, 300, 128, False),
    (2, 4, 2, 200, 200, 128, True),
    (1, 2, 2, 70, 330, 64, True),
)
"""batch, heads, kv_heads, seq_q, seq_k, head_dim, causal: ragged tails, shared heads, more keys than queries."""

TILES = (
    "",
    "persistent=false",
    "fma_eighths=1",
    "fma_eighths=2",
    "warpgroups=2",
    "warpgroups=2,overlap=true",
    "cluster=2",
    "warpgroups=2,overlap=true,cluster=2",
)
"""Changes to Hopper's default tile config that nobody has measured yet."""

TILE_SHAPES = ("b4_h32_s1024_d128_causal", "b4_h32_s8192_d128", "b4_h32_s8192_d128_causal")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One recipe on one problem."""

    recipe: str
    problem: Problem

    @property
    def name(self) -> str:
        p = self.problem
        shape = f"b{p.batch} h{p.heads}/{p.kv_heads} s{p.seq_q}x{p.seq_k} d{p.head_dim}"
        return f"{self.recipe} {shape}{' causal' if p.causal else ''} {p.dtype}"


def cases(arch: str, shapes: tuple[tuple[Any, ...], ...] = SHAPES) -> Iterator[Case]:
    """Every recipe in every element type that it takes, where there is a kernel."""
    for name, recipe in recipes().items():
        for dtype in recipe.dtypes:
            for *sizes, causal in shapes:
                batch, heads, kv_heads, seq_q, seq_k, head_dim = sizes
                problem = Problem(batch, heads, kv_heads, seq_q, seq_k, head_dim, dtype, causal)
                if supports(recipe, arch, problem):
                    yield Case(name, problem)


def outputs(case: Case, inputs: Tensors, arch: str, device: torch.device) -> Tensors:
    """Quantised tensors, by the names of their fields, out and lse, on the CPU."""
    q, k, v = (inputs[name].to(device) for name in "qkv")
    recipe = recipes()[case.recipe]
    operands: tuple[Any, ...] = (q, k, v)
    found: Tensors = {}
    if recipe.quantises:
        operands = quantize(q, k, v, recipe=recipe, arch=arch)
        for part, quantised in operands._asdict().items():
            for field in dataclasses.fields(quantised):
                if isinstance(value := getattr(quantised, field.name), torch.Tensor):
                    found[f"{part}.{field.name}"] = value
    found["out"], found["lse"] = attention(
        *operands, recipe=recipe, causal=case.problem.causal, return_lse=True, arch=arch
    )
    return {name: tensor.cpu() for name, tensor in found.items()}


def prepare(file: Path, arch: str, shapes: tuple[tuple[Any, ...], ...] = SHAPES) -> None:
    """Write what the emulator makes of every case."""
    os.environ["CUTE_ATTN_BACKEND"] = "emulator"
    kept = []
    for case in cases(arch, shapes):
        print(case.name, flush=True)
        inputs = dict(zip("qkv", random_inputs(case.problem, "normal", 0), strict=True))
        emulated = outputs(case, inputs, arch, torch.device("cpu"))
        kept.append({"case": asdict(case), "inputs": inputs, "outputs": emulated})
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"arch": arch, "commit": commit(), "cases": kept}, file)
    print(f"written to {file}: {len(kept)} cases, {file.stat().st_size >> 10} KiB")


def compare(file: Path, device: torch.device, jobs: int = 1) -> list[dict[str, Any]]:
    """What differs between the kept outputs and those of ``device``, case by case; "wrong" lists what must not.

    jobs: processes; each compiles what its cases need, which takes most of the time
    """
    count = len(torch.load(file, weights_only=True)["cases"])
    if jobs == 1:
        return [_compare_one(file, index, str(device)) for index in range(count)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return list(pool.map(_compare_one, *zip(*((file, i, str(device)) for i in range(count)), strict=True)))


def _compare_one(file: Path, index: int, device: str) -> dict[str, Any]:
    kept = torch.load(file, weights_only=True)
    entry = kept["cases"][index]
    case = Case(entry["case"]["recipe"], Problem(**entry["case"]["problem"]))
    row: dict[str, Any] = {"case": case.name, "wrong": []}
    try:
        found = outputs(case, entry["inputs"], kept["arch"], torch.device(device))
        return row | _differences(case, entry["outputs"], found)
    except Exception as error:  # the other cases are worth comparing all the same
        row["wrong"].append(f"{type(error).__name__}: {error}")
        return row


def _differences(case: Case, emulated: Tensors, found: Tensors) -> dict[str, Any]:
    pv_format, dtype = recipes()[case.recipe].pv_format, case.problem.dtype
    wrong = [f"{name} is only in one of them" for name in sorted(emulated.keys() ^ found.keys())]
    wrong += [
        f"{name} is not the same bits"
        for name in sorted((emulated.keys() & found.keys()) - {"out", "lse"})
        if emulated[name].shape != found[name].shape or not same_bits(emulated[name], found[name])
    ]
    errors = reference.errors(found["out"], emulated["out"])
    lse = largest_difference(found["lse"], emulated["lse"])
    if not errors.rel_l2 <= TOLERANCE[pv_format][dtype]:
        wrong.append(f"out differs by {errors.rel_l2:.2g} (relative L2), allowed are {TOLERANCE[pv_format][dtype]}")
    if not lse <= LSE_TOLERANCE[pv_format]:
        wrong.append(f"lse differs by {lse:.2g}, allowed are {LSE_TOLERANCE[pv_format]:.2g}")
    same = all(same_bits(emulated[name], found[name]) for name in ("out", "lse"))
    return {"out_rel_l2": errors.rel_l2, "lse_max_abs": lse, "same_bits": same, "wrong": wrong}


def compare_step(file: Path, directory: Path) -> int:
    """Compare on the CUDA device; prints what is wrong. Returns how the process should end."""
    os.environ["CUTE_ATTN_BACKEND"] = "cuda"
    rows = compare(file, torch.device("cuda"), os.cpu_count() or 1)
    (directory / "compare.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        for message in row["wrong"]:
            print(f"{row['case']}: {message}")
    agree = sum(not row["wrong"] for row in rows)
    print(f"{agree} of {len(rows)} cases agree, {sum(row.get('same_bits', False) for row in rows)} bit for bit")
    return 0 if agree == len(rows) else 1


def commands(directory: Path, emulated: Path | None, quick: bool, only: list[str]) -> dict[str, list[str]]:
    """What each step runs, in order."""
    found: dict[str, list[str]] = {}
    if "compare" in only and emulated is not None:
        found["compare"] = [sys.executable, __file__, "compare", str(emulated), str(directory)]
    start = [sys.executable, "-c", "import sys; from cute_attn.cli import main; sys.exit(main(sys.argv[1:]))", "bench"]
    if "bench" in only:
        found["bench"] = [*start, "--json", str(directory / "bench.json"), *(["--quick"] if quick else [])]
    if "tiles" in only:
        chosen = [f"{recipe}@{tile}" for recipe in ("int8_fp8", "fp8") for tile in TILES]
        options = ["--shapes", *TILE_SHAPES, "--seconds", "1", "--peers", "none", "--recipes", *chosen]
        found["tiles"] = [*start, "--json", str(directory / "tiles.json"), *options]
    if "tests" in only:
        # Most of their time is compiling.
        processes = ["-n", str(min(os.cpu_count() or 1, 8))] if importlib.util.find_spec("xdist") else []
        found["tests"] = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", *processes, str(ROOT / "tests")]
    return found


def run(
    steps: dict[str, list[str]], directory: Path, seconds: float, clock: Callable[[], float] = time.monotonic
) -> dict[str, dict[str, Any]]:
    """Run each step; its output goes to the console and to STEP.txt. A step gets an equal share of what is left of
    ``seconds``: one that hangs does not take the time of those after it."""
    directory.mkdir(parents=True, exist_ok=True)
    ends, results = clock() + seconds, {}
    for left, (name, command) in zip(range(len(steps), 0, -1), steps.items(), strict=True):
        started = clock()
        print(f"== {name}", flush=True)
        status = _run_step(command, directory / f"{name}.txt", max(ends - started, 0.0) / left)
        results[name] = {"status": status, "seconds": round(clock() - started, 1)}
        (directory / "session.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _run_step(command: list[str], log: Path, seconds: float) -> int | str:
    """Exit status, or "out of time"."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started to compile
            process.wait()
            status = "out of time"
    print(log.read_text(encoding="utf-8", errors="replace")[-8000:], flush=True)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    preparing = verbs.add_parser("prepare", help="keep the emulator's outputs")
    preparing.add_argument("file", type=Path)
    preparing.add_argument("--arch", default="sm_90a", choices=tuple(ARCHS), help="default: %(default)s")
    running = verbs.add_parser("run", help="ask the GPU everything")
    running.add_argument("directory", type=Path)
    running.add_argument("--emulated", type=Path, help="what `prepare` wrote")
    running.add_argument("--quick", action="store_true", help="the benchmark's short form")
    running.add_argument("--only", nargs="+", choices=STEPS, help="default: all steps")
    running.add_argument("--minutes", type=float, default=60.0, help="for all steps together (default: %(default)s)")
    comparing = verbs.add_parser("compare", help="one step of `run`")
    comparing.add_argument("file", type=Path)
    comparing.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "prepare":
        prepare(arguments.file, arguments.arch)
        return 0
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here; only `prepare` works without one")
    if arguments.verb == "compare":
        return compare_step(arguments.file, arguments.directory)
    only = arguments.only or list(STEPS)
    if "compare" in only and arguments.emulated is None:
        if arguments.only:
            parser.error("compare needs --emulated FILE, which `prepare` writes")
        print("no --emulated FILE: emulator and GPU are not compared")
    elif "compare" not in only and arguments.emulated is not None:
        parser.error("--emulated is for the step compare, which --only leaves out")
    directory = arguments.directory.resolve()
    emulated = arguments.emulated and arguments.emulated.resolve()
    if emulated is not None and (kept := torch.load(emulated, weights_only=True)["commit"]):
        os.environ.setdefault("CUTE_ATTN_COMMIT", kept)  # a copy of the sources has no git to ask
    steps = commands(directory, emulated, arguments.quick, only)
    results = run(steps, directory, 60 * arguments.minutes)
    for name, result in results.items():
        print(f"{name:8s} {result['seconds']:7.1f} s  {'well' if result['status'] == 0 else result['status']}")
    return 0 if all(result["status"] == 0 for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
