"""Accuracy of every recipe, from the simulators: relative errors and cosine against float64 attention.

The simulators equal the kernels within the tolerances that the tests hold, and take any number of tokens in seconds.

python perf/accuracy.py [--tokens 1024 4096] [--head-dim 128] [--inputs normal uniform outliers] [--json]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from cute_attn import Problem, reference, simulator
from cute_attn.commands.check import INPUTS, random_inputs
from cute_attn.recipe import Recipe, recipes


def variants() -> list[tuple[str, Recipe]]:
    """Every preset, and what its fields change."""
    presets = recipes()
    rows = list(presets.items())
    for name, field, values in (
        ("int8", "qk_scale", ("thread", "warp", "block")),
        ("int8", "v_scale", ("tensor",)),
        ("int8", "smooth_v", (True,)),
        ("int8_fp16", "qk_scale", ("thread", "block")),
        ("int8_fp16", "accumulate", ("float16", "float16+float32")),
        ("int8_fp8", "qk_scale", ("token", "block")),
        ("int8_fp8", "smooth_v", (True,)),
        ("int8_fp8", "accumulate", ("float16+float32",)),
        ("int8_fp8", "exponent", ("fast",)),
        ("fp8", "qk_scale", ("token", "block")),
        ("fp8", "accumulate", ("float16+float32",)),
        ("fp8", "exponent", ("fast",)),
        ("int4_fp16", "qk_scale", ("thread", "warp", "block")),
        ("int4_fp16", "smooth_q", (False,)),
    ):
        rows += [(f"{name}, {field}={value}", presets[name].replace(**{field: value})) for value in values]
    return sorted(rows, key=lambda row: list(presets).index(row[0].split(",")[0]))


def measured(recipe: Recipe, inputs: str, tokens: int, head_dim: int) -> dict[str, float]:
    dtype = recipe.dtypes[0]
    q, k, v = random_inputs(Problem(1, 2, 2, tokens, tokens, head_dim, dtype), inputs, 0)
    out, _ = simulator.attention(q, k, v, recipe=recipe)
    return asdict(reference.errors(out, reference.attention(q, k, v)[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="default: %(default)s")
    parser.add_argument("--head-dim", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--inputs", nargs="+", choices=tuple(INPUTS), default=list(INPUTS), help="default: all")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    results = []
    for inputs in arguments.inputs:
        for tokens in arguments.tokens:
            if not arguments.json:
                print(f"\n{inputs}, {tokens} tokens, head dim {arguments.head_dim}")
                print(f"{'recipe':40s} relative L1  relative L2   cosine")
            for name, recipe in variants():
                errors = measured(recipe, inputs, tokens, arguments.head_dim)
                results.append({"recipe": name, "inputs": inputs, "tokens": tokens, **errors})
                if not arguments.json:
                    rel_l1, rel_l2 = 100 * errors["rel_l1"], 100 * errors["rel_l2"]
                    print(f"{name:40s} {rel_l1:9.3f} %  {rel_l2:9.3f} %   {errors['cos']:.6f}", flush=True)
    if arguments.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
