"""Static cost of our attention kernels beside the peers', head dim 128: no GPU needed, nothing is run.

Both sides are read off machine code in the same way (`cute_attn.report`): warp instructions per 32 scores of the
steady main loop, and the cycles each pipe of an SM sub-partition is then busy, at the rates of `cute_attn.pipe_costs`.
The largest of these numbers bounds the kernel. The peers' rows were taken once from their compiled forward kernels:
FlashAttention-2 as the CuTe DSL's example, SageAttention 2, INT-FlashAttention (Triton, 64×64 tiles).

python perf/static_costs.py [--json]
"""

from __future__ import annotations

import argparse
import json

from cute_attn import Problem, jit, kernel_calls
from cute_attn.arch import ARCHS
from cute_attn.recipe import recipes
from cute_attn.report import report

# name, arch, registers, spills in the loop, slots per 32 scores, floors tensor/xu/alu/fma/lsu
PEERS = (
    ("FlashAttention-2 bf16", "sm_80", 255, 32, 16.14, (32.0, 8.5, 6.9, 9.6, 20.9)),
    ("SageAttention INT8+FP16, FP32 acc.", "sm_80", 255, 1, 13.72, (25.0, 16.5, 6.4, 7.5, 14.9)),
    ("SageAttention INT8+FP16, FP16 acc.", "sm_80", 252, 0, 12.62, (25.0, 16.5, 5.8, 4.9, 14.7)),
    ("INT-FlashAttention full INT8", "sm_80", 255, 0, 33.97, (16.0, 42.0, 13.3, 23.0, 35.0)),
    ("SageAttention2 INT8+FP8", "sm_89", 255, 0, 12.41, (48.0, 8.5, 6.7, 4.3, 10.9)),
    ("SageAttention2++ INT8+FP8", "sm_89", 255, 2, 14.78, (32.0, 8.5, 6.9, 8.2, 10.9)),
)


def ours(arch: str) -> list[dict[str, object]]:
    """One row per recipe that runs on ``arch``, no mask and causal."""
    rows = []
    for recipe in recipes().values():
        for causal in (False, True):
            problem = Problem(1, 1, 1, 4096, 4096, 128, recipe.dtypes[0], causal)
            kernel_class, config = kernel_calls.kernels_of(problem, recipe, ARCHS[arch])["attention"]
            facts = report(jit.build(kernel_class, config, arch), 128)[0].to_json()
            name = f"ours, {recipe.name}{', causal' if causal else ''}"
            kept = {key: facts[key] for key in ("arch", "registers", "spills", "slots_per_32", "floors")}
            rows.append({"kernel": name, **kept})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print our rows as JSON")
    arguments = parser.parse_args()
    archs = ("sm_80", "sm_89")
    if arguments.json:
        print(json.dumps([row for arch in archs for row in ours(arch)], indent=1))
        return
    print(f"{'kernel':36s} arch   registers spills  slots (without rescaling)   tensor/xu/alu/fma/lsu   bound")
    for arch in archs:
        for name, where, registers, spills, slots, floors in PEERS:
            if where == arch:
                print_row(name, arch, registers, spills, f"{slots:5.2f}", max(slots, *floors), floors)
        for row in ours(arch):
            slots, floors = row["slots_per_32"], tuple(row["floors"].values())
            both = f"{slots['all']:5.2f} ({slots['fast']:.2f})"
            print_row(row["kernel"], arch, row["registers"], row["spills"], both, max(slots["all"], *floors), floors)


def print_row(
    name: str, arch: str, registers: int, spills: int, slots: str, bound: float, floors: tuple[float, ...]
) -> None:
    cycles = "/".join(f"{f:.1f}" for f in floors)
    print(f"{name:36s} {arch:6s} {registers:9d} {spills:6d}  {slots:26s} {cycles:23s} {bound:5.1f}")


if __name__ == "__main__":
    main()
