"""The ``cute-attn`` command, as a user calls it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from cute_attn import cli

DISTANCES = {"rel_l2", "rel_l1", "cos", "max_abs"}


@pytest.fixture(autouse=True)
def on_emulator(monkeypatch):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    monkeypatch.setenv("CUTE_DSL_LINEINFO", "0")  # commands set it for the rest of the process


def test_help_lists_the_commands_without_the_compiler():
    code = "import sys; from cute_attn import cli; s = cli.main([]); print(s, 'cutlass' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("2 False\n")
    for command in cli.COMMANDS:
        assert command in result.stdout


def test_info(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "backend in use: emulator" in printed
    assert re.search(r"sm_80 +int8, int8_fp16, int4_int8, int4_fp16, fp16, bf16 +A100", printed)
    assert re.search(r"sm_90a +int8, int8_fp16, int8_fp8, fp8, fp16, bf16 +H100", printed)
    assert re.search(r"sm_100a +none yet", printed)


def test_check_json(capsys):
    command = "check --recipe int8 --arch sm_89 --batch 1 --heads 2 --kv-heads 1 --seq-q 70 --seq-k 90 --head-dim 64"
    options = "--causal --dtype bfloat16 --layout bshd --inputs outliers --seed 3 --json"
    assert cli.main([*command.split(), *options.split()]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["kernel_vs_simulator"].keys() == DISTANCES
    assert figures["simulator_vs_float64"].keys() == DISTANCES
    assert figures["kernel_vs_simulator"]["rel_l2"] <= 4.5e-3
    assert figures["simulator_vs_float64"]["cos"] > 0.99
    assert figures["lse_max_abs"] < 1e-4
    assert figures["findings"] == []


def test_check_of_another_recipe(capsys):
    command = "check --recipe int8_fp16 --accumulate float16+float32 --seq-q 40 --seq-k 90 --head-dim 32"
    assert cli.main(command.split()) == 0
    printed = capsys.readouterr().out
    assert "recipe int8_fp16, float16+float32 accumulators" in printed
    assert printed.endswith("right\n")
    assert cli.main(["check", "--accumulate", "float16"]) == 2
    assert (
        "recipe.accumulate='float16' is not offered with qk_format='int8' and pv_format='int8'"
        in capsys.readouterr().err
    )


def test_compile_of_another_recipe(capsys):
    assert cli.main(["compile", "--recipe", "int8_fp16", "--head-dim", "64", "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)
    assert [facts["spills"] for facts in kernels.values()] == [0] * 5
    assert cli.main(["compile", "--recipe", "bf16", "--dtype", "bfloat16", "--head-dim", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"attention"}


@pytest.mark.parametrize(("factor", "lse_shift"), [(1.01, 0.0), (1.0, 0.02)])
def test_check_fails_on_a_wrong_kernel(capsys, monkeypatch, factor, lse_shift):
    from cute_attn.commands import check

    right = check.run_kernel

    def wrong(*arguments):
        out, lse = right(*arguments)
        return out * factor, lse + lse_shift

    monkeypatch.setattr(check, "run_kernel", wrong)
    assert cli.main(["check", "--seq-q", "40", "--seq-k", "40", "--head-dim", "64"]) == 1
    assert "wrong: the kernel may differ from its simulator" in capsys.readouterr().out


def test_check_reports_findings(capsys, monkeypatch):
    from cute_attn.commands import check
    from cute_attn.emulator.errors import EmulatorError

    def broken(*arguments):
        raise EmulatorError("out of bounds")

    monkeypatch.setattr(check, "run_kernel", broken)
    assert cli.main(["check", "--seq-q", "40", "--seq-k", "40", "--head-dim", "64", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"] == ["out of bounds"]


def test_check_compares_orders(capsys, monkeypatch):
    from cute_attn.commands import check
    from cute_attn.emulator.settings import current_settings

    ran, results = [], []
    run_kernel = check.run_kernel

    def depends_on_the_order(*arguments):
        ran.append((current_settings().seed, current_settings().races))
        results.append(results[0] if results else run_kernel(*arguments))
        out, lse = results[0]
        return out, lse + 1e-6 * (ran[-1][0] == 2)

    monkeypatch.setattr(check, "run_kernel", depends_on_the_order)
    command = ["check", "--seq-q", "40", "--seq-k", "40", "--head-dim", "64", "--json", "--seeds"]
    assert cli.main([*command, "1"]) == 0
    assert cli.main([*command, "3"]) == 1
    assert ran == [(seed, True) for seed in (None, 1, None, 1, 2, 3)]
    right, wrong = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert right["seeds_identical"] is True and wrong["seeds_identical"] is False
    assert right["findings"] == [] and wrong["findings"] == ["seed 2: the result differs from that of the fixed order"]


def test_check_refuses_what_has_no_kernel(capsys):
    assert cli.main(["check", "--head-dim", "84"]) == 2
    assert "head_dim=84 has no kernel" in capsys.readouterr().err


def test_check_of_an_empty_batch(capsys):
    assert cli.main(["check", "--batch", "0", "--head-dim", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernel_vs_simulator"]["rel_l2"] == 0.0


def test_check_takes_kv_heads_as_given(capsys):
    assert cli.main(["check", "--kv-heads", "0"]) == 2
    assert "kv_heads=0; at least 1" in capsys.readouterr().err


def test_compile_cannot_keep_in_a_file(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert cli.main(["compile", "--head-dim", "64", "--keep", str(tmp_path / "file")]) == 2
    assert "File exists" in capsys.readouterr().err


def test_compile_json_and_keep(capsys, tmp_path):
    assert cli.main(["compile", "--arch", "sm_86", "--head-dim", "64", "--json", "--keep", str(tmp_path)]) == 0
    kernels = json.loads(capsys.readouterr().out)
    assert kernels.keys() == {"key_value_statistics", "finish_statistics", "key_value_tiles", "query_rows", "attention"}
    for facts in kernels.values():
        assert facts.keys() >= {"registers", "spills", "smem", "slots_per_32", "floors"}
        assert facts["spills"] == 0
    assert set(kernels["attention"]["slots_per_32"]) == {"all", "fast"}
    assert {"tensor", "xu", "alu", "fma", "lsu"} == set(kernels["attention"]["floors"])
    assert ".target sm_86" in (tmp_path / "attention.sm_86.ptx").read_text()
    assert "IMMA.16832.U8.S8" in (tmp_path / "attention.sm_86.sass").read_text()
    assert (tmp_path / "attention.sm_86.cubin").read_bytes()[:4] == b"\x7fELF"


def test_compile_refuses_an_arch_without_kernel(capsys):
    assert cli.main(["compile", "--arch", "sm_100a"]) == 2
    assert "recipe 'int8' has no kernel for sm_100a" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "text.txt holds no text"), (b"caf\xe9", "text.txt is not UTF-8 text")]
)
def test_demo_refuses_a_file_without_text(capsys, tmp_path, content, message):
    (tmp_path / "text.txt").write_bytes(content)
    assert cli.main(["demo", "--text", str(tmp_path / "text.txt")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "demo"])
def test_cuda_without_a_device(capsys, monkeypatch, command):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main([command]) == 2
    assert "CUTE_ATTN_BACKEND=cuda, but PyTorch sees no CUDA device" in capsys.readouterr().err


def test_compile_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setenv("NVDISASM", "/nowhere/nvdisasm")
    assert cli.main(["compile", "--head-dim", "64"]) == 2
    assert "pip install nvidia-cuda-nvdisasm" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["int8", "int8_fp16", "fp16"])
def test_demo(capsys, tmp_path, recipe):
    text = tmp_path / "text.txt"
    text.write_text("Attention is computed in eight bits. The quick brown fox jumps over the lazy dog.")
    assert cli.main(["demo", "--text", str(text), "--recipe", recipe]) == 0
    printed = capsys.readouterr().out
    layers = re.findall(r"^ +(\d) +(\d\.\d+) +\d\.\d+$", printed, re.MULTILINE)
    assert [int(layer) for layer, _ in layers] == list(range(6))
    assert all(0 < float(error) < 0.1 for _, error in layers)
    cosine = re.search(r"mean (\d\.\d+)", printed)
    assert cosine is not None
    assert float(cosine[1]) > 0.995
