"""Static cost of every attention kernel beside the peers', and a roofline: no GPU needed, nothing is run.

Both sides are read off machine code in the same way (`cute_attn.report`): warp instructions per 32 scores of the
steady main loop, and the cycles each pipe of an SM sub-partition is then busy, at the rates of `cute_attn.pipe_costs`.
The peers' rows (`peer_costs.py`) were taken once. What a GPU could make of it, and the assumptions: `roofline.py`.

python perf/static.py [--archs sm_90a] [--recipes int8 fp16] [--no-roofline] [--json] [--write]

--write keeps the rows of all kernels in perf/static.json, which docs/benchmarks.md is made from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peer_costs import HEAD_DIM, MIX, PEERS, PeerCost
from roofline import bound, gpus_of, traffic

from cute_attn import Problem, dispatch, jit, kernel_calls
from cute_attn.arch import ARCHS
from cute_attn.gpus import Gpu
from cute_attn.recipe import Recipe, recipes
from cute_attn.report import report

FILE = Path(__file__).with_name("static.json")

TOKENS = (1024, 8192)
"""At which the roofline's DRAM bounds are shown."""


@dataclass(frozen=True)
class Cost:
    """The steady main loop of one of our kernels.

    rows:   of Q per CTA; smem: bytes of shared memory per CTA
    slots:  with the rescaling of the accumulators; fast: without
    others: as in `peer_costs.PeerCost`
    """

    recipe: str
    arch: str
    causal: bool
    formats: tuple[str, str]
    rows: int
    registers: int
    spills: int
    smem: int
    slots: float
    fast: float
    floors: dict[str, float]

    @property
    def kernel(self) -> str:
        return f"ours, {self.recipe}{', causal' if self.causal else ''}"


def cost(recipe: Recipe, arch: str, causal: bool) -> Cost | None:
    """None where there is no such kernel."""
    problem = Problem(4, 32, 32, 4096, 4096, HEAD_DIM, recipe.dtypes[0], causal)
    if not dispatch.supports(recipe, arch, problem):
        return None
    kernel_class, config = kernel_calls.kernels_of(problem, recipe, ARCHS[arch])["attention"]
    (kernel,) = report(jit.build(kernel_class, config, arch), HEAD_DIM)
    facts, steady = kernel.to_json(), kernel.steady
    if steady is None:
        raise RuntimeError(f"{kernel_class.__name__} for {arch} has no main loop that the report can find")
    return Cost(
        recipe.name,
        arch,
        causal,
        (recipe.qk_format, recipe.pv_format),
        dispatch.default_config(recipe, problem, ARCHS[arch]).rows,
        facts["registers"],
        facts["spills"],
        facts["smem"],
        steady.slots["all"],
        steady.slots["fast"],
        steady.floors,
    )


def costs(archs: Sequence[str], names: Sequence[str]) -> list[Cost]:
    """Every kernel of those architectures and recipes, without a mask and causal."""
    found = []
    for arch in archs:
        for name in names:
            for causal in (False, True):
                print(f"\r{arch} {name:12s}", end="", file=sys.stderr, flush=True)
                found.append(cost(recipes()[name], arch, causal))
    print("\r" + " " * 30 + "\r", end="", file=sys.stderr)
    return [row for row in found if row is not None]


def kept() -> list[Cost]:
    """The rows in `FILE`."""
    return [Cost(**{**row, "formats": tuple(row["formats"])}) for row in json.loads(FILE.read_text(encoding="utf-8"))]


def keep(rows: Sequence[Cost]) -> None:
    lines = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in rows)
    FILE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def peers_of(arch: str) -> list[PeerCost]:
    return [peer for peer in PEERS if peer.arch == arch]


def peer_lines() -> list[str]:
    header = f"{'peer':42s} {'arch':8s}  threads × regs spills  slots  " + " ".join(f"{kind:>8s}" for kind in MIX)
    lines = [header]
    for peer in PEERS:
        mix = " ".join(f"{share:8.2f}" for share in peer.mix)
        lines.append(
            f"{peer.kernel:42s} {peer.arch:8s} {peer.threads:8d} × {peer.registers:4d} {peer.spills:6d} "
            f"{peer.slots:6.2f}  {mix}"
        )
    return lines


def cost_lines(rows: Sequence[Cost]) -> list[str]:
    lines = []
    for arch in dict.fromkeys(row.arch for row in rows):
        lines += ["", f"{arch:42s} registers spills  slots (fast)   tensor/xu/alu/fma/lsu      bound"]
        for peer in peers_of(arch):
            lines.append(_line(peer.kernel, peer.registers, peer.spills, peer.slots, None, peer.floors))
        for row in rows:
            if row.arch == arch:
                lines.append(_line(row.kernel, row.registers, row.spills, row.slots, row.fast, row.floors))
    return lines


def _line(name: str, registers: int, spills: int, slots: float, fast: float | None, floors: dict[str, float]) -> str:
    both = f"{slots:5.2f}" + ("" if fast is None else f" ({fast:.2f})")
    cycles = "/".join(f"{value:.1f}" for value in floors.values())
    busiest = max(slots if fast is None else fast, *floors.values())
    return f"{name:42s} {registers:9d} {spills:6d}  {both:13s}  {cycles:25s} {busiest:6.1f}"


def roofline_lines(rows: Sequence[Cost]) -> list[str]:
    lines = []
    for arch in dict.fromkeys(row.arch for row in rows):
        for gpu in gpus_of(arch):
            memory = "  ".join(f"DRAM {tokens // 1024}K (whole)" for tokens in TOKENS)
            lines += ["", f"{gpu.name:42s} bound by  upper  in turns  published  L2 TB/s   {memory}"]
            lines += [_peer_bound(peer, gpu) for peer in peers_of(arch)]
            lines += [_our_bound(row, gpu) for row in rows if row.arch == arch]
    return lines


def _peer_bound(peer: PeerCost, gpu: Gpu) -> str:
    found = bound(peer.slots, peer.floors, HEAD_DIM, gpu)
    published = peer.published.get(gpu.name)
    shown = "" if published is None else f"{published}"
    return f"{peer.kernel:42s} {found.pipe:9s} {found.upper:5.0f} {found.in_turns:9.0f} {shown:>10s}"


def _our_bound(row: Cost, gpu: Gpu) -> str:
    found = bound(row.fast, row.floors, HEAD_DIM, gpu)
    moved = [traffic(found.upper, row.formats, row.rows, HEAD_DIM, tokens, gpu) for tokens in TOKENS]
    memory = "  ".join(f"{each.memory_tops:6.0f} ({each.memory_tops_whole:5.0f})" for each in moved)
    return (
        f"{row.kernel:42s} {found.pipe:9s} {found.upper:5.0f} {found.in_turns:9.0f} {'':10s} {moved[0].l2_tb_s:8.1f}"
        f"   {memory}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", choices=tuple(ARCHS), help="default: all")
    parser.add_argument("--recipes", nargs="+", choices=tuple(recipes()), help="default: all")
    parser.add_argument("--no-roofline", action="store_true", help="costs only")
    parser.add_argument("--json", action="store_true", help="print our rows as JSON, and nothing else")
    parser.add_argument("--write", action="store_true", help=f"also keep our rows in {FILE.name}")
    arguments = parser.parse_args()
    if arguments.write and (arguments.archs or arguments.recipes):
        parser.error("--write keeps all kernels: leave --archs and --recipes out")
    if arguments.json and arguments.no_roofline:
        parser.error("--json has no roofline to leave out: leave --no-roofline out")
    rows = costs(arguments.archs or list(ARCHS), arguments.recipes or list(recipes()))
    if arguments.write:
        keep(rows)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False))
        return
    print("\n".join([*peer_lines(), *cost_lines(rows), *([] if arguments.no_roofline else roofline_lines(rows))]))


if __name__ == "__main__":
    main()
