"""docs/benchmarks.md, its figures, and the static tables: made from what they say they are made from."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import make_benchmarks
import plot
import pytest
import roofline
import static
from peer_costs import HEAD_DIM, PEERS

from cute_attn import supports
from cute_attn.arch import ARCHS
from cute_attn.bench.results import Results
from cute_attn.gpus import gpu_named, peak_tops
from cute_attn.problem import Problem

from .conftest import assert_page_is_current
from .test_bench import PROVENANCE, row

DOCS = Path(__file__).parents[1] / "docs"


def test_page_is_what_its_sources_give() -> None:
    assert_page_is_current("make_benchmarks.py")


def some_results() -> Results:
    rows = []
    for seq, seconds in ((1024, 1e-4), (8192, 5e-3)):
        problem = Problem(4, 32, 32, seq, seq, 128, "bfloat16")
        rows += [
            row("int8_fp8", seconds, 0.010, ours=True, problem=problem),
            row("sage", 1.25 * seconds, 0.012, problem=problem),
            row("sdpa_flash", 2 * seconds, 0.002, problem=problem, quantises=False, whole=None),
            row("cudnn_fp8", None, 0.03, problem=problem, errors=None, reason="NotSupported: no"),
        ]
    rows[1] = replace(rows[1], attention=replace(rows[1].attention, launch="stream"))
    return Results(PROVENANCE, {"inputs": "normal"}, {"sparge_1": "SpargeAttn is not installed"}, tuple(rows))


@pytest.fixture
def with_results(monkeypatch, tmp_path):
    """The page's generator with one result file."""
    monkeypatch.setattr(make_benchmarks, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(make_benchmarks, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(make_benchmarks, "PAGE", tmp_path / "benchmarks.md")
    some_results().save(tmp_path / "results" / "h200.json")
    return tmp_path


def test_page_with_results(with_results, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["make_benchmarks.py"])
    assert make_benchmarks.main() == 0
    page = (with_results / "benchmarks.md").read_text()
    assert "Nothing yet" not in page and "### NVIDIA H200 (`perf/results/h200.json`)" in page
    line = next(line for line in page.splitlines() if line.startswith("| **`int8_fp8`** |"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    # 4·4·32·1024²·128 operations in 0.1 ms, of a peak of 1,979; 0.11 ms with quantisation
    assert cells[:6] == ["**`int8_fp8`**", "687", "0 %", "35 %", "1.25 (`sage`)", "1.25"]
    assert cells[6:] == ["625", "1.25 (`sage`)", "0.999950", "0.01000"]
    assert "| `sage` | 550 (launched) |" in page and "`cudnn_fp8`: NotSupported: no" in page
    assert "Not there: `sparge_1`: SpargeAttn is not installed." in page
    assert "![h200_speed](figures/h200_speed.svg)" in page
    monkeypatch.setattr(sys, "argv", ["make_benchmarks.py", "--check"])
    assert make_benchmarks.main() == 0
    (with_results / "figures" / "h200_speed.svg").unlink()
    assert make_benchmarks.main() == 1
    assert "missing: h200_speed.svg" in capsys.readouterr().err


def test_figures_show_every_contender(with_results) -> None:
    file, directory = with_results / "results" / "h200.json", with_results / "figures"
    first, second = plot.write(file, directory)
    for path in (first, second):
        drawn = path.read_text()
        for name in ("int8_fp8", "sage", "sdpa_flash"):
            assert f">{name}<" in drawn, (path, name)
        assert ">cudnn_fp8<" not in drawn  # has no figure to show
    assert ">1K<" in first.read_text() and ">8K<" in first.read_text()
    before = [path.read_bytes() for path in (first, second)]
    assert [path.read_bytes() for path in plot.write(file, directory)] == before


def test_nothing_to_draw(with_results) -> None:
    file = with_results / "results" / "one.json"
    one = some_results()
    replace(one, rows=one.rows[:4]).save(file)
    with pytest.raises(ValueError, match="no figure"):
        plot.write(file, with_results / "figures")
    assert make_benchmarks.figures(file) == []


# Static costs


def test_every_kernel_has_a_row() -> None:
    expected = {
        (name, arch, causal)
        for name, recipe in static.variants().items()
        for arch in ARCHS
        for causal in (False, True)
        if supports(recipe, arch, Problem(4, 32, 32, 4096, 4096, HEAD_DIM, recipe.dtypes[0], causal))
    }
    assert {(row.recipe, row.arch, row.causal) for row in static.kept()} == expected


SOME = (("int8", "sm_80"), ("int8_fp16", "sm_89"), ("fp16", "sm_90a"), ("int8", "sm_120a"))


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        pytest.param(row.recipe, row.arch, marks=[] if (row.recipe, row.arch) in SOME else pytest.mark.slow)
        for row in static.kept()
        if not row.causal
    ],
)
def test_rows_are_what_the_machine_code_says(name: str, arch: str) -> None:
    """If it says something else now: python perf/static.py --write, then python docs/make_benchmarks.py."""
    for causal in (False,) if (name, arch) in SOME else (False, True):
        (row,) = (r for r in static.kept() if (r.recipe, r.arch, r.causal) == (name, arch, causal))
        assert static.cost(name, arch, causal) == row


def test_some_rows_are_replaced() -> None:
    old = [replace(row, registers=1) for row in static.kept()] + [replace(static.kept()[0], recipe="no more")]
    new = [row for row in static.kept() if row.arch == "sm_89" and row.recipe == "fp16"]
    rows = static.merged(old, new[::-1], ["sm_89"], ["fp16"])
    assert [replace(row, registers=1) for row in rows] == old[:-1]
    assert [row for row in rows if row.registers != 1] == new and len(new) == 2


def test_peers_mixes_add_up_to_their_slots() -> None:
    for peer in PEERS:
        assert sum(peer.mix) == pytest.approx(peer.slots, abs=0.03), peer.kernel


def test_published_figures_are_near_the_bounds() -> None:
    """What was measured lies under the upper bound, and not far under the one of MMAs and softmax in turns."""
    compared = 0
    for peer in PEERS:
        for name, published in peer.published.items():
            found = roofline.bound(peer.slots, peer.floors, HEAD_DIM, gpu_named(name))
            assert 0.9 * found.in_turns < published < found.upper, peer.kernel
            compared += 1
    assert compared == 5


def test_a_loop_bound_by_its_mmas_reaches_the_peak() -> None:
    """FlashAttention-2's 32 cycles are 32 scores' multiply-adds and nothing else."""
    gpu = gpu_named("NVIDIA A100-SXM4-80GB")
    found = roofline.bound(16.0, {"tensor": 32.0, "lsu": 8.0}, 128, gpu)
    assert found.pipe == "tensor"
    assert found.upper == pytest.approx(peak_tops(gpu, "bfloat16", "bfloat16", "float32"))
    assert found.in_turns == pytest.approx(found.upper * 32 / 48)
    assert roofline.bound(40.0, {"tensor": 32.0}, 128, gpu).pipe == "issue"


def test_traffic() -> None:
    """By hand: D 128, 128 rows a CTA, K and V of a byte each: 2 bytes of L2 a score, and a score is 512 operations."""
    gpu = gpu_named("NVIDIA H200")
    found = roofline.traffic(512.0, ("int8", "e4m3"), 128, 128, 1024, gpu)
    assert found.l2_tb_s == pytest.approx(2.0)
    # DRAM: S·D elements of Q, K and V in a byte, of O in two; 4·S²·D operations
    assert found.memory_tops == pytest.approx(4.8 * 4 * 1024 / 5)
    assert found.memory_tops_whole == pytest.approx(4.8 * 4 * 1024 / 18)
    unquantised = roofline.traffic(512.0, ("bfloat16", "bfloat16"), 128, 128, 1024, gpu)
    assert unquantised.memory_tops == unquantised.memory_tops_whole == pytest.approx(4.8 * 4 * 1024 / 8)


def test_rooflines_are_of_gpus_with_the_floors_rates() -> None:
    assert [gpu.name for gpu in roofline.gpus_of("sm_89")] == ["NVIDIA GeForce RTX 4090"]
    assert "NVIDIA H200" in [gpu.name for gpu in roofline.gpus_of("sm_90a")]
    assert roofline.gpus_of("sm_100a") == []
