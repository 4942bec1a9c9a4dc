"""Writes docs/benchmarks.md from the results in perf/results/ and the static costs in perf/static.json.

python docs/make_benchmarks.py [--check]

With --check nothing is written; the exit status says whether the page is what would be. Figures of results
(docs/figures/NAME_speed.svg, NAME_error.svg) are drawn anew with the page; --check looks whether they are there.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
for directory in (DOCS, ROOT / "perf"):
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))

import roofline  # noqa: E402
import static  # noqa: E402
from layouts.tables import table  # noqa: E402
from peer_costs import HEAD_DIM, MIX, PEERS  # noqa: E402

from cute_attn.bench import comparison  # noqa: E402
from cute_attn.bench.problems import SUITES, label  # noqa: E402
from cute_attn.bench.results import Row, load  # noqa: E402
from cute_attn.gpus import Gpu  # noqa: E402

PAGE = DOCS / "benchmarks.md"
RESULTS = ROOT / "perf" / "results"
FIGURES = DOCS / "figures"

INTRODUCTION = """\
# Benchmarks

How fast the kernels are beside their peers: as measured on GPUs, and as read off the machine code. This page is written
by `python docs/make_benchmarks.py` from the files in `perf/results/` and from `perf/static.json`; the tests do the same
and compare.
"""

MEASURING = """\
## How it is measured

```sh
pip install 'cute-attn[bench]' flash-attn-4          # the peers that are on PyPI; the others are built from source
cute-attn bench --quick                              # a minute or two
cute-attn bench --json perf/results/h200.json        # everything
cute-attn bench --shapes video b1_h64_kv8_s8192_d128_causal --recipes int8 int8_fp16:smooth_v=true --peers sdpa_cudnn
cute-attn bench --shapes peers --recipes int8_fp8 int8_fp8@persistent=false int8_fp8@warpgroups=2 --peers none
```

* All contenders of a problem get the same random inputs, N(0, 1) unless `--inputs` says otherwise, never zeros, in the
  layout that each of them takes without a copy. They take turns, one sample each in every round, every second round
  backwards, after half a second of the same work for the clocks to settle. Before each sample a gigabyte is written, so
  that L2 is cold.
* A sample is one replay of a CUDA graph between two events, and the figure the median of at least five, with half the
  distance of the quartiles as its spread. A graph whose replay leaves a part of the output unwritten is refused. What
  cannot be captured (SageAttention and SpargeAttn launch on CUDA's legacy default stream) is timed as it is called, and
  marked.
* Taking turns means that all contenders are in memory at once: Q, K and V, what each of them has quantised or laid out
  anew beforehand, and one pool in which all graphs have their outputs and scratch. Of the largest problem
  (`b4_h32_s32768_d128`, whose Q, K and V are 3.2 GB) that is reckoned to be 26 GB on a Hopper GPU with every peer.
* TOPS are 4·B·H·Sq·Sk·D operations, half of them when causal, over that time, whatever a kernel skips or pads.
  "Attention alone" starts from operands that are quantised already; "with quantisation" from 16-bit tensors.
* Peak is what the tensor cores could do in the contender's own formats at the boost clock (`cute_attn/gpus.py`; mixed
  formats: half the operations at each rate). It is "unknown" for a GPU that the table does not have.
* Errors are against float64 attention on the unquantised inputs, over 64 rows of up to four heads of two batch
  elements, each with all of its keys. Where attention alone and with quantisation differ, the larger counts.
* The ratio is to the fastest peer that is *as accurate or less*: its relative L2 error is not smaller, or by less than
  5 %. The ratio to the fastest of all, whatever its error, stands beside it.
* A peer that is missing or fails has a row that says why. The result file names GPU, driver, versions, commit and
  clocks, is written after every problem, and carries a checksum: edited files are refused.

| suite | problems |
|---|---|
{suites}

| peer | what it is | formats on Hopper | needs |
|---|---|---|---|
| `sdpa_flash`, `sdpa_cudnn` | PyTorch's `scaled_dot_product_attention`, one backend each | 16 bits | PyTorch |
| `flash_attn_4` | `flash_attn.cute.interface.flash_attn_func` | 16 bits | `pip install flash-attn-4` |
| `flash_attn_3_fp8` | FlashAttention-3's `flash_attn_func`, one scale per KV head | E4M3 | a build of its source |
| `cudnn_fp8` | cuDNN's `sdpa_fp8`, one scale per tensor, E4M3 output | E4M3 | `pip install nvidia-cudnn-frontend` |
| `sage` | the kernel that SageAttention 2's `sageattn` picks | INT8, E4M3 | a build of its source |
| `sparge_1`, `sparge_0.5` | SpargeAttn with all, or half, of the key blocks | INT8, E4M3 | a build of its source |

cuDNN and FlashAttention-3 have no quantiser; theirs is PyTorch's here. SpargeAttn's TOPS are counted as dense, and it
cannot be called without its quantisation. On random inputs no block matters less than another: its 0.5 says what a
skipped block gains, and nothing of what it costs a model.
"""

LENT = """\
## A GPU for ten minutes

Where a GPU is at hand only for a while, and perhaps without a network, one script asks it everything:

```sh
python perf/gpu_session.py prepare emulated.pt --arch sm_90a                       # before, on any machine
python perf/gpu_session.py run out --emulated emulated.pt --quick --minutes 9      # on the GPU
```

`prepare` runs every recipe on the emulator and keeps inputs, quantised tensors, outputs and LSEs. `run` compares them
with what the GPU makes of the same inputs, quantisers bit for bit, outputs within the tolerances that the tests hold
kernels to (`compare.json`); measures (`bench.json`, which belongs into `perf/results/`); and runs `pytest -m gpu`
(`tests.txt`). Each step is a process of its own and gets an equal share of the minutes that are left;
`--only compare bench tests` chooses. Kernels are compiled ahead in as many processes as there are cores.
"""

NOT_MEASURED = """\
## Measured

Nothing yet: `perf/results/` is empty. No kernel of this package has been timed on a GPU, and no figure of ours on this
page is a measurement. [Static cost](#static-cost) and [roofline](#roofline) are what the machine code says before
anybody runs it.
"""

STATIC = f"""\
## Static cost

The steady main loop of every attention kernel, head dim {HEAD_DIM}, per 32 scores (one warp instruction's worth of
S = Q·Kᵀ), read off the SASS: warp instructions issued (slots; in parentheses without the rescaling of the accumulators,
which most iterations skip) and the cycles that each pipe of an SM sub-partition is busy, at the rates of
`cute_attn/pipe_costs.py`. The largest of them bounds the kernel. `python perf/static.py` computes these tables; the
peers' rows were taken once, in the same way, from their compiled kernels. Nothing was run.
"""

ROOFLINE = """\
## Roofline

What a GPU could at most make of that, with these assumptions:

{assumptions}

Bold rows are ours, all without a mask. "Published" is what the peer's authors report: 32K tokens, quantisation left
out. DRAM: the most TOPS that its bandwidth allows at so many tokens, in parentheses with quantisation.
"""


def suites() -> str:
    lines = []
    for name, problems in SUITES.items():
        p = problems[0]
        kv = "" if p.kv_heads == p.heads else f", {p.kv_heads} KV heads"
        lengths = ", ".join(f"{n:,}" for n in dict.fromkeys(q.seq_q for q in problems))
        dims = " and ".join(str(d) for d in dict.fromkeys(q.head_dim for q in problems))
        masks = {(False,): "full", (True,): "causal", (False, True): "full and causal"}
        mask = masks[tuple(sorted({q.causal for q in problems}))]
        lines.append(f"| `{name}` | batch {p.batch}, {p.heads} heads{kv}, head dim {dims}, {lengths} tokens, {mask} |")
    return "\n".join(lines)


def measured(files: Sequence[Path]) -> str:
    if not files:
        return NOT_MEASURED
    return "\n".join(["## Measured\n", *(one_run(file) for file in files)])


def one_run(file: Path) -> str:
    """The section of one result file."""
    results = load(file)
    found = results.provenance
    versions = ", ".join(f"{name} {version}" for name, version in found.packages.items())
    parts = [
        f"### {found.gpu} (`perf/results/{file.name}`)\n",
        f"Driver {found.driver}, CUDA {found.cuda}, cuDNN {found.cudnn}, Python {found.python}; {versions}. "
        f"Commit `{(found.commit or 'unknown')[:12]}`. Inputs {results.settings['inputs']}.\n",
    ]
    parts += [f"![{figure.stem}](figures/{figure.name})\n" for figure in figures(file)]
    for problem in dict.fromkeys(row.problem for row in results.rows):
        parts.append(problem_table([row for row in results.rows if row.problem == problem], found.gpu))
    if results.absent:
        absent = "; ".join(f"`{name}`: {reason}" for name, reason in results.absent.items())
        parts.append(f"Not there: {absent}.\n")
    return "\n".join(parts)


def figures(file: Path) -> list[Path]:
    """Where the figures of a result file belong."""
    import plot

    results = load(file)
    names = {"speed": bool(plot.panels(results)), "error": plot.error(results) is not None}
    return [FIGURES / f"{file.stem}_{name}.svg" for name, there in names.items() if there]


def problem_table(rows: Sequence[Row], device_name: str) -> str:
    clocks = rows[0].clocks
    at = "" if clocks is None else f", SM at {clocks.sm_mhz:.0f} MHz"
    head = ("", "TOPS", "±", "of peak", "ratio", "of all", "with quantisation", "ratio", "cosine", "relative L2")
    done = [row for row in rows if row.attention or row.whole]
    done.sort(key=lambda row: min(t.median for t in (row.attention, row.whole) if t))
    lines = [
        f"`{label(rows[0].problem)}`, {rows[0].problem.dtype}{at}\n",
        table(head, (cells(r, rows, device_name) for r in done)),
    ]
    reasons = [f"`{row.contender}`: {row.reason}" for row in rows if row.reason]
    return "\n".join([*lines, *(["", "Not measured, or in part: " + "; ".join(reasons) + "."] if reasons else []), ""])


def cells(row: Row, rows: Sequence[Row], device_name: str) -> list[str]:
    alone, spent = comparison.tops(row, "attention"), row.attention
    whole, share = comparison.tops(row, "whole"), comparison.of_peak(row, "attention", device_name)
    every = comparison.best_peer(row, rows, "attention", any_accuracy=True) if row.ours else None
    mark = " (launched)" if spent is not None and spent.launch == "stream" else ""
    return [
        f"**`{row.contender}`**" if row.ours else f"`{row.contender}`",
        "–" if alone is None else f"{alone:.0f}{mark}",
        "–" if spent is None else f"{100 * spent.spread:.0f} %",
        "unknown" if share is None else f"{100 * share:.0f} %",
        ratio(row, rows, "attention"),
        "–" if every is None else f"{every[0]:.2f}",
        "–" if whole is None else f"{whole:.0f}",
        ratio(row, rows, "whole"),
        "–" if row.errors is None else f"{row.errors.cos:.6f}",
        "–" if row.errors is None else f"{row.errors.rel_l2:.5f}",
    ]


def ratio(row: Row, rows: Sequence[Row], mode: str) -> str:
    peer = comparison.best_peer(row, rows, mode) if row.ours else None
    return "–" if peer is None else f"{peer[0]:.2f} (`{peer[1]}`)"


def static_costs() -> str:
    kept = static.kept()
    parts = [STATIC]
    for arch in dict.fromkeys(row.arch for row in kept):
        rows: list[Iterable[object]] = [
            (
                p.kernel,
                p.registers,
                p.spills,
                f"{p.slots:.2f}",
                cycles(p.floors),
                f"{max(p.slots, *p.floors.values()):.1f}",
            )
            for p in static.peers_of(arch)
        ]
        for row in kept:
            if row.arch == arch:
                slots = f"{row.slots:.2f} ({row.fast:.2f})"
                busiest = f"{max(row.fast, *row.floors.values()):.1f}"
                rows.append((our_name(row), row.registers, row.spills, slots, cycles(row.floors), busiest))
        head = (f"`{arch}`", "registers", "spills in the loop", "slots", "tensor / XU / ALU / FMA / LSU", "bound")
        parts.append(table(head, rows) + "\n")
    columns = ("peer", "arch", "threads", *MIX)
    mix = [(p.kernel, f"`{p.arch}`", p.threads, *(f"{share:.2f}" for share in p.mix)) for p in PEERS]
    parts.append("What the peers' slots are:\n\n" + table(columns, mix) + "\n")
    return "\n".join(parts)


def our_name(row: static.Cost) -> str:
    return f"**`{row.recipe}`{', causal' if row.causal else ''}**"


def cycles(floors: dict[str, float]) -> str:
    return " / ".join(f"{value:.1f}" for value in floors.values())


def rooflines() -> str:
    kept = static.kept()
    assumptions = (roofline.__doc__ or "").split("\n\n", 1)[1].strip()
    parts = [ROOFLINE.replace("{assumptions}", assumptions)]
    for arch in dict.fromkeys(row.arch for row in kept):
        parts += [
            one_roofline([row for row in kept if row.arch == arch and not row.causal], arch, gpu)
            for gpu in roofline.gpus_of(arch)
        ]
    return "\n".join(parts)


def one_roofline(ours: Sequence[static.Cost], arch: str, gpu: Gpu) -> str:
    memory = [f"DRAM {tokens // 1024}K" for tokens in static.TOKENS]
    head = (gpu.name.removeprefix("NVIDIA "), "bound by", "upper", "in turns", "published", "L2, TB/s", *memory)
    rows = []
    for peer in static.peers_of(arch):
        found = roofline.bound(peer.slots, peer.floors, HEAD_DIM, gpu)
        published = peer.published.get(gpu.name, "–")
        rows.append(
            (
                peer.kernel,
                found.pipe,
                f"{found.upper:.0f}",
                f"{found.in_turns:.0f}",
                published,
                "–",
                *("–" for _ in memory),
            )
        )
    for row in ours:
        found = roofline.bound(row.fast, row.floors, HEAD_DIM, gpu)
        moved = [
            roofline.traffic(found.upper, row.formats, row.rows, HEAD_DIM, tokens, gpu) for tokens in static.TOKENS
        ]
        dram = [f"{each.memory_tops:.0f} ({each.memory_tops_whole:.0f})" for each in moved]
        bounds = (f"{found.upper:.0f}", f"{found.in_turns:.0f}")
        rows.append((our_name(row), found.pipe, *bounds, "–", f"{moved[0].l2_tb_s:.1f}", *dram))
    facts = f"{gpu.multiprocessors} multiprocessors at {gpu.boost_mhz} MHz, DRAM {gpu.memory_gb_s:,.0f} GB/s"
    if gpu.l2_bytes_per_clock is not None:
        rate = gpu.l2_bytes_per_clock * gpu.boost_mhz * 1e6 / 1e12
        facts += f", L2 {rate:.1f} TB/s ({gpu.l2_bytes_per_clock} bytes per clock)"
    return f"{table(head, rows)}\n\n{facts}. Source: {gpu.source}.\n"


def make_page() -> str:
    files = sorted(RESULTS.glob("*.json"))
    sections = (
        INTRODUCTION,
        measured(files),
        MEASURING.replace("{suites}", suites()),
        LENT,
        static_costs(),
        rooflines(),
    )
    return "\n".join(sections).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    arguments = parser.parse_args()
    page, files = make_page(), sorted(RESULTS.glob("*.json"))
    if not arguments.check:
        PAGE.write_text(page, encoding="utf-8")
        if files:
            import plot

            for file in files:
                if figures(file):
                    plot.write(file, FIGURES)
        return 0
    missing = [figure.name for file in files for figure in figures(file) if not figure.exists()]
    committed = PAGE.read_text(encoding="utf-8")
    if page == committed and not missing:
        return 0
    difference = difflib.unified_diff(committed.splitlines(), page.splitlines(), "benchmarks.md", "its sources", n=1)
    print("docs/benchmarks.md is not what its sources give: run python docs/make_benchmarks.py", file=sys.stderr)
    print("\n".join([*(f"missing: {name}" for name in missing), *itertools.islice(difference, 60)]), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
