"""``cute-attn bench``: ours and every installed peer, measured on this GPU in one run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from cute_attn import jit
from cute_attn.arch import arch_for_capability
from cute_attn.bench import problems, table
from cute_attn.bench.compilation import compile_ahead, kernels_needed
from cute_attn.bench.contender import Contender
from cute_attn.bench.cuda_timer import CudaTimer
from cute_attn.bench.ours import chosen_recipes
from cute_attn.bench.peers import chosen_peers
from cute_attn.bench.provenance import clocks, provenance
from cute_attn.bench.results import Results
from cute_attn.bench.runner import Machine, Progress, Settings
from cute_attn.bench.runner import run as measure
from cute_attn.bench.timing import Pace
from cute_attn.commands.check import INPUTS
from cute_attn.disk_cache import disk_cache_enabled
from cute_attn.problem import DTYPES, Problem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a shape or two of each suite, and fewer samples")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help=f"suites ({', '.join(problems.SUITES)}) or shapes such as b1_h64_kv8_s8192_d128_causal (default: all)",
    )
    parser.add_argument(
        "--recipes",
        nargs="+",
        metavar="RECIPE",
        help="presets, perhaps with fields changed, int8_fp16:accumulate=float16, or with fields of their default tile "
        "config, int8_fp8@warpgroups=2,overlap=true; none (default: all presets)",
    )
    parser.add_argument("--peers", nargs="+", metavar="PEER", help="peers by name, or none (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of Q, K and V (default: %(default)s)")
    parser.add_argument("--inputs", choices=tuple(INPUTS), default="normal", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="of samples per problem (default: 4, or 1 with --quick)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile ahead (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there, problem by problem")


def cuda_machine() -> Machine:
    """This process's CUDA device. Raises ValueError where there is none, or the emulator was asked for."""
    if not torch.cuda.is_available() or jit.backend() != "cuda":
        why = "PyTorch sees none" if not torch.cuda.is_available() else "CUTE_ATTN_BACKEND=emulator hides it"
        raise ValueError(
            f"this command measures on a CUDA device, and {why}. Without one, `python perf/static.py` reads slots, "
            "floors and a roofline off the machine code, `cute-attn check` runs kernels on the emulator"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    arch = arch_for_capability(capability).name
    return Machine(device, capability, arch, CudaTimer(device), provenance(device), lambda work: clocks(device, work))


class _Bar(Progress):
    """A progress bar; prints each problem's table when it is done, and keeps the file up to date."""

    def __init__(self, bar: Any, file: Path | None) -> None:
        self._bar, self._file = bar, file

    def problem(self, problem: Problem) -> None:
        self._bar.set_description(problems.label(problem))

    def step(self, what: str) -> None:
        self._bar.set_postfix_str(what, refresh=False)
        self._bar.update(0)  # draws no more often than the bar allows

    def rows(self, results: Results) -> None:
        self._bar.update()
        last = [row for row in results.rows if row.problem == results.rows[-1].problem] if results.rows else []
        if last:
            self._bar.write(table.problem_table(last, results.provenance.gpu) + "\n")
        if self._file is not None:
            results.save(self._file)


def run(arguments: argparse.Namespace) -> int:
    if arguments.seconds is not None and not arguments.seconds > 0:
        raise ValueError(f"--seconds {arguments.seconds}: use more than 0")
    if arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs}: use 1 or more")
    chosen = problems.chosen(arguments.shapes, quick=arguments.quick, dtype=arguments.dtype)
    machine = cuda_machine()
    contenders: list[Contender] = [
        *chosen_recipes(arguments.recipes, machine.arch),
        *chosen_peers(arguments.peers, machine.capability),
    ]
    if not contenders:
        raise ValueError("--recipes none and --peers none leave nothing to measure")
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise SystemExit("the benchmark needs tqdm: pip install 'cute-attn[bench]'") from error

    kernels = kernels_needed(chosen, contenders)
    if disk_cache_enabled():
        with tqdm(total=len(kernels), unit="kernel", desc="compiling") as bar:
            compile_ahead(kernels, arguments.jobs, bar.update)
    else:
        print("the disk cache is off: kernels are compiled one by one, when they are needed")
    pace = Pace(seconds=arguments.seconds or (1.0 if arguments.quick else 4.0))
    settings = Settings(arguments.inputs, arguments.seed, pace)
    with tqdm(total=len(chosen), unit="problem") as bar:
        results = measure(chosen, contenders, machine, settings, _Bar(bar, arguments.json))
    for name, reason in results.absent.items():
        print(f"not there: {name}: {reason}")
    print(table.LEGEND)
    if arguments.json is not None:
        print(f"written to {arguments.json}")
    return 0
