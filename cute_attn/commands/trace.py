"""``cute-attn trace``: a kernel's warps on the emulator, as a trace file for Perfetto and as a table by role."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cute_attn.commands import check
from cute_attn.commands.recipe_arguments import chosen_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    check.add_problem_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, default=Path("trace.json"), help="default: %(default)s")
    parser.add_argument("--ctas", type=int, default=2, help="how many CTAs of each launch (default: %(default)s)")
    parser.add_argument(
        "--kernel",
        default="attention_",
        metavar="TEXT",
        help='only kernels with this in their name (default: "%(default)s"; "" also traces the quantisers)',
    )


def run(arguments: argparse.Namespace) -> int:
    # The compiler reads its variable when it is imported, and `jit` keeps programs with line information apart.
    os.environ.update(CUTE_ATTN_BACKEND="emulator", CUTE_DSL_LINEINFO="1")
    from cute_attn import emulator

    problem, arch = check.named_problem(arguments)
    inputs = check.random_inputs(problem, arguments.inputs, arguments.seed)
    with emulator.trace(arguments.output, ctas=arguments.ctas, kernel=arguments.kernel) as recorder:
        check.run_kernel(inputs, chosen_recipe(arguments), problem.causal, arguments.layout, arch.name)
    if not recorder.launches:
        raise ValueError(f"no kernel that ran has {arguments.kernel!r} in its name")
    print(recorder.summary())
    print(f"written to {arguments.output}; open it in https://ui.perfetto.dev. The time is logical: no measurement.")
    return 0
