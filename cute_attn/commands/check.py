"""``cute-attn check``: a kernel against its simulator, and the simulator against float64."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from cute_attn import Problem, attention, dispatch, jit, reference
from cute_attn.arch import Arch
from cute_attn.arguments import resolve_arch
from cute_attn.commands.place import backend_device
from cute_attn.commands.recipe_arguments import add_recipe_arguments, chosen_recipe
from cute_attn.problem import DTYPES, LAYOUTS
from cute_attn.recipe import Recipe

TOLERANCE = {
    "int8": {"float16": 2.5e-3, "bfloat16": 4.5e-3},
    "e4m3": {"float16": 2.5e-3, "bfloat16": 4.5e-3},
    "float16": {"float16": 5e-4, "bfloat16": 2.5e-3},
    "bfloat16": {"bfloat16": 2.5e-3},
}
"""Largest relative L2 distance of kernel and simulator, by format of P and V, and by dtype of the output."""
LSE_TOLERANCE = {"int8": 0.012, "e4m3": 2.0**-3, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Largest absolute difference of their LSEs, by format of P: the last bit of a score or of 2^x can round a probability
the other way, by a unit in the last place; of 8 bits that is one in a row's sum of at least 90 (255 · 2^-1.5)."""


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) - 0.5


def _outliers(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """N(0, 1) with every 16th channel ten times as large and shifted, as K of real models has it."""
    x = torch.randn(shape, generator=generator, device=generator.device)
    x[..., ::16] = 10 * x[..., ::16] + 5
    return x


INPUTS: dict[str, Callable[[tuple[int, ...], torch.Generator], torch.Tensor]] = {
    "normal": _normal,
    "uniform": _uniform,
    "outliers": _outliers,
}


def add_problem_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name a recipe, a problem and its random inputs."""
    add_recipe_arguments(parser)
    parser.add_argument("--arch", help="GPU target (default: the GPU's, or sm_80 on the emulator)")
    for name, default in (("batch", 1), ("heads", 2), ("seq-q", 128), ("seq-k", 128), ("head-dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--kv-heads", type=int, help="default: as many as --heads")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the first that the recipe takes")
    parser.add_argument("--layout", choices=LAYOUTS, default="bhsd", help="default: %(default)s")
    parser.add_argument("--inputs", choices=tuple(INPUTS), default="normal", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default: %(default)s)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_problem_arguments(parser)
    parser.add_argument(
        "--seeds",
        type=int,
        default=0,
        metavar="N",
        help="on the emulator: N more orders of warps and CTAs, which must give the same bits (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def random_inputs(
    problem: Problem, kind: str, seed: int, device: str | torch.device = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B, H, S, D] of the problem's dtype; another device's generator makes other numbers of the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, problem.dtype)
    q_shape = (problem.batch, problem.heads, problem.seq_q, problem.head_dim)
    k_shape = (problem.batch, problem.kv_heads, problem.seq_k, problem.head_dim)
    q, k, v = (INPUTS[kind](shape, generator).to(dtype) for shape in (q_shape, k_shape, k_shape))
    return q, k, v


def run_kernel(
    inputs: tuple[torch.Tensor, ...], recipe: Recipe, causal: bool, layout: str, arch: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` on the backend in use; out as [B, H, S, D] and lse, on the CPU."""
    device = backend_device()
    if layout == "bshd":
        inputs = tuple(x.transpose(1, 2).contiguous() for x in inputs)
    q, k, v = (x.to(device) for x in inputs)
    out, lse = attention(q, k, v, recipe=recipe, causal=causal, layout=layout, return_lse=True, arch=arch)
    return (out.transpose(1, 2) if layout == "bshd" else out).cpu(), lse.cpu()


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max|a − b|, where equal infinities differ by nothing."""
    return float(torch.where(a == b, 0.0, (a - b).abs()).max()) if a.numel() else 0.0


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def compare(problem: Problem, arch: Arch, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures that ``check --json`` prints."""
    from cute_attn import emulator, simulator

    inputs = random_inputs(problem, arguments.inputs, arguments.seed)
    recipe = chosen_recipe(arguments)
    tile = dispatch.default_config(recipe, problem, arch)
    simulated, simulated_lse = simulator.attention(
        *inputs,
        causal=problem.causal,
        recipe=recipe,
        warp_rows=tile.warp_rows,
        cta_rows=tile.rows,
        tile_tokens=tile.tile_tokens,
        pack_gqa=tile.pack_gqa,
    )
    exact, _ = reference.attention(*inputs, causal=problem.causal)
    figures: dict[str, Any] = {
        "kernel_vs_simulator": None,
        "simulator_vs_float64": asdict(reference.errors(simulated, exact)),
        "lse_max_abs": None,
        "findings": [],
        "seeds": arguments.seeds,
        "seeds_identical": None,
    }

    def run_once(seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        with emulator.settings(races=True, seed=seed):
            return run_kernel(inputs, recipe, problem.causal, arguments.layout, arch.name)

    try:
        out, lse = run_once()
        for seed in range(1, arguments.seeds + 1):
            again, again_lse = run_once(seed)
            same = same_bits(again, out) and same_bits(again_lse, lse)
            figures["seeds_identical"] = same and figures["seeds_identical"] is not False
            if not same:
                figures["findings"].append(f"seed {seed}: the result differs from that of the fixed order")
    except emulator.EmulatorError as error:
        figures["findings"].append(str(error))
        return figures
    figures["kernel_vs_simulator"] = asdict(reference.errors(out, simulated))
    figures["lse_max_abs"] = largest_difference(lse, simulated_lse)
    return figures


def named_problem(arguments: argparse.Namespace) -> tuple[Problem, Arch]:
    """What the options name. Raises NotImplementedError where there is no kernel for it."""
    recipe = chosen_recipe(arguments)
    problem = Problem(
        batch=arguments.batch,
        heads=arguments.heads,
        kv_heads=arguments.heads if arguments.kv_heads is None else arguments.kv_heads,
        seq_q=arguments.seq_q,
        seq_k=arguments.seq_k,
        head_dim=arguments.head_dim,
        dtype=arguments.dtype or recipe.dtypes[0],
        causal=arguments.causal,
    )
    arch = resolve_arch(arguments.arch, torch.empty(0, device=backend_device()))
    if not (answer := dispatch.supports(recipe, arch.name, problem)):
        raise NotImplementedError(answer.reason)
    return problem, arch


def run(arguments: argparse.Namespace) -> int:
    if arguments.seeds < 0:
        raise ValueError(f"--seeds {arguments.seeds}: how many orders, 0 or more")
    if jit.backend() == "emulator":
        # The compiler reads it when it is imported. Findings name the kernel's source lines then; the code is the same.
        os.environ.setdefault("CUTE_DSL_LINEINFO", "1")
    elif arguments.seeds:
        raise ValueError("--seeds is for the emulator: CUTE_ATTN_BACKEND=emulator")
    problem, arch = named_problem(arguments)
    recipe = chosen_recipe(arguments)
    tolerance = TOLERANCE[recipe.pv_format][problem.dtype]
    figures = compare(problem, arch, arguments)
    distance = figures["kernel_vs_simulator"]
    lse_tolerance = LSE_TOLERANCE[recipe.pv_format]
    right = not figures["findings"] and (distance["rel_l2"] <= tolerance and figures["lse_max_abs"] <= lse_tolerance)
    if arguments.json:
        print(json.dumps(figures))
        return 0 if right else 1
    print(f"{problem}")
    print(f"recipe {recipe.name}, {recipe.accumulate} accumulators, {arch.name}, {jit.backend()} backend")
    print(f"{arguments.inputs} inputs, seed {arguments.seed}")
    if arguments.seeds:
        print(f"{arguments.seeds} more orders of warps and CTAs")
    for pair in ("kernel_vs_simulator", "simulator_vs_float64"):
        if figures[pair] is not None:
            print(f"{pair:22s}" + "".join(f"  {name} {value:.3g}" for name, value in figures[pair].items()))
    if figures["lse_max_abs"] is not None:
        print(f"{'lse_max_abs':22s}  {figures['lse_max_abs']:.3g}")
    for finding in figures["findings"]:
        print(f"finding: {finding}")
    if right:
        print("right")
    elif figures["findings"]:
        print("wrong")
    else:
        print(
            f"wrong: the kernel may differ from its simulator by {tolerance} (rel_l2), its LSE by {lse_tolerance:.2g}"
        )
    return 0 if right else 1
