"""The script for a lent GPU: what it keeps, compares and runs, with the emulator in the GPU's place."""

from __future__ import annotations

import json
import sys

import gpu_session
import pytest
import torch

from cute_attn.bench.ours import chosen_recipes
from cute_attn.bench.problems import chosen
from cute_attn.cli import build_parser

SHAPES = ((1, 2, 1, 40, 70, 32, True),)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """What the emulator makes of two recipes."""
    file = tmp_path_factory.mktemp("session") / "new" / "emulated.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUTE_ATTN_BACKEND", "emulator")
        some = {name: recipe for name, recipe in gpu_session.recipes().items() if name in ("int8", "fp16")}
        patch.setattr(gpu_session, "recipes", lambda: some)
        gpu_session.prepare(file, "sm_90a", SHAPES)
    return file


@pytest.fixture(autouse=True)
def on_the_emulator(monkeypatch):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")


def test_equal_outputs_agree(kept):
    rows = gpu_session.compare(kept, torch.device("cpu"))
    assert [row["case"] for row in rows] == [
        "int8 b1 h2/1 s40x70 d32 causal float16",
        "int8 b1 h2/1 s40x70 d32 causal bfloat16",
        "fp16 b1 h2/1 s40x70 d32 causal float16",
    ]
    for row in rows:
        assert row["same_bits"] and row["out_rel_l2"] == row["lse_max_abs"] == 0 and row["wrong"] == []


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("kv.image", lambda x: x ^ 1, "kv.image is not the same bits"),
        ("q.scale", lambda x: x.double(), "q.scale is not the same bits"),
        ("out", lambda x: x * 1.01, "out differs by 0.0099"),
        ("out", lambda x: x * float("nan"), "out differs by nan"),
        ("lse", lambda x: x + 0.05, "lse differs by 0.05"),
    ],
)
def test_differences_are_named(kept, tmp_path, name, change, message):
    contents = torch.load(kept, weights_only=True)
    first = contents["cases"][0]["outputs"]
    first[name] = change(first[name])
    torch.save(contents, tmp_path / "changed.pt")
    rows = gpu_session.compare(tmp_path / "changed.pt", torch.device("cpu"))
    assert len(rows[0]["wrong"]) == 1 and rows[0]["wrong"][0].startswith(message)
    assert not any(row["wrong"] for row in rows[1:])


def test_a_case_that_cannot_run_leaves_the_others(kept, tmp_path):
    contents = torch.load(kept, weights_only=True)
    contents["cases"][0]["case"]["recipe"] = "int3"
    torch.save(contents, tmp_path / "changed.pt")
    first, *others = gpu_session.compare(tmp_path / "changed.pt", torch.device("cpu"), jobs=2)
    assert first["wrong"] == ["KeyError: 'int3'"]
    assert len(others) == 2 and all(row["same_bits"] and not row["wrong"] for row in others)


def test_every_recipe_with_a_kernel_is_compared():
    names = {case.recipe for case in gpu_session.cases("sm_90a")}
    assert names == {name for name in gpu_session.recipes() if not name.startswith("int4")}
    assert {case.recipe for case in gpu_session.cases("sm_80")} > {"int4_int8", "int4_fp16"}


def test_steps_end_each_for_itself(tmp_path, capsys):
    python = [sys.executable, "-c"]
    steps = {
        "compare": [*python, "print('fine')"],
        "bench": [*python, "raise SystemExit(3)"],
        "tests": [*python, "import time; print('slow', flush=True); time.sleep(60)"],
        "more": [*python, "print('there is still time')"],
    }
    results = gpu_session.run(steps, tmp_path / "out", 8.0)
    assert {name: result["status"] for name, result in results.items()} == {
        "compare": 0,
        "bench": 3,
        "tests": "out of time",
        "more": 0,
    }
    assert 3 <= results["tests"]["seconds"] <= 5  # half of what was left
    assert json.loads((tmp_path / "out" / "session.json").read_text()) == results
    assert (tmp_path / "out" / "compare.txt").read_text() == "fine\n"
    assert "slow" in capsys.readouterr().out


def test_what_the_steps_run(tmp_path):
    steps = gpu_session.commands(tmp_path, tmp_path / "emulated.pt", True, list(gpu_session.STEPS))
    assert list(steps) == ["compare", "bench", "tiles", "tests"]
    assert steps["bench"][-3:] == ["--json", str(tmp_path / "bench.json"), "--quick"]
    assert steps["tests"][1:5] == ["-m", "pytest", "-m", "gpu"]
    asked = build_parser(steps["tiles"][3:]).parse_args(steps["tiles"][3:])
    contenders = chosen_recipes(asked.recipes, "sm_90a")
    problems = chosen(asked.shapes, quick=False, dtype="bfloat16")
    assert len(contenders) == 2 * len(gpu_session.TILES) and len(problems) == len(gpu_session.TILE_SHAPES)
    assert {ours.supports(problem).reason for ours in contenders for problem in problems} == {None}
    assert list(gpu_session.commands(tmp_path, None, False, ["bench"])) == ["bench"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "out"], "PyTorch sees no CUDA device"),
        (["run", "out", "--only", "compare"], "compare needs --emulated"),
        (["run", "out", "--only", "bench", "--emulated", "file"], "which --only leaves out"),
    ],
)
def test_refusals(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "CUDA" not in message)
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu_session.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err
