"""``cute-attn compile``: all kernels of a recipe for one architecture, and their cost, read off the machine code."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cute_attn import Problem, dispatch, jit, kernel_calls
from cute_attn.arch import ARCHS
from cute_attn.commands.recipe_arguments import add_recipe_arguments, chosen_recipe
from cute_attn.problem import DTYPES
from cute_attn.report import KernelReport, report
from cute_attn.sass import sass_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument(
        "--arch", default="sm_80", help=f"one of {', '.join(ARCHS)} (default: %(default)s); no GPU is needed"
    )
    parser.add_argument("--head-dim", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the first that the recipe takes")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write PTX, cubin and SASS of every kernel there")
    parser.add_argument("--json", action="store_true", help="print one JSON object, kernel by kernel, and nothing else")


def keep(program: jit.Program, directory: Path, name: str) -> None:
    """Write what the compiler made of one kernel into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = f"{name}.{program.arch}"
    (directory / f"{stem}.ptx").write_text(program.ptx)
    (directory / f"{stem}.cubin").write_bytes(program.cubin)
    (directory / f"{stem}.sass").write_text(sass_text(program.cubin))


def table_row(name: str, kernel: KernelReport) -> str:
    facts: dict[str, Any] = kernel.to_json()
    row = f"{name:22s} {facts['registers']:9d} {facts['spills']:6d} {facts['smem']:7d}"
    if facts["slots_per_32"] is not None:
        slots = facts["slots_per_32"]
        floors = "/".join(f"{cycles:.1f}" for cycles in facts["floors"].values())
        row += f"   {slots['all']:5.2f} {slots['fast']:6.2f}   {floors}"
    return row


def run(arguments: argparse.Namespace) -> int:
    recipe = chosen_recipe(arguments)
    problem = Problem(
        batch=1,
        heads=1,
        kv_heads=1,
        seq_q=4096,
        seq_k=4096,
        head_dim=arguments.head_dim,
        dtype=arguments.dtype or recipe.dtypes[0],
        causal=arguments.causal,
    )
    if not (answer := dispatch.supports(recipe, arguments.arch, problem)):
        raise NotImplementedError(answer.reason)
    reports: dict[str, KernelReport] = {}
    for name, (kernel_class, config) in kernel_calls.kernels_of(problem, recipe, ARCHS[arguments.arch]).items():
        program = jit.build(kernel_class, config, arguments.arch)
        reports[name] = report(program, arguments.head_dim)[0]
        if arguments.keep:
            keep(program, arguments.keep, name)
    if arguments.json:
        print(json.dumps({name: kernel.to_json() for name, kernel in reports.items()}))
        return 0
    mask = "causal" if arguments.causal else "no mask"
    print(f"recipe {recipe.name}, {arguments.arch}, head dim {arguments.head_dim}, {problem.dtype}, {mask}")
    print(f"{'kernel':22s} registers spills    smem     all   fast   tensor/xu/alu/fma/lsu")
    for name, kernel in reports.items():
        print(table_row(name, kernel))
    print(
        "spills: local loads and stores in main loops; smem: bytes per CTA; all, fast: warp instructions per 32 scores"
    )
    print(
        "of the steady main loop with and without rescaling; then cycles per 32 scores of each pipe, at assumed rates"
    )
    return 0
