"""Traces: the file is what Chrome's format asks for, and its times are those that the documented costs give by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cute_attn.emulator.errors import Deadlock
from cute_attn.emulator.trace import Recorder
from cute_attn.emulator.trace.costs import BYTES_PER_UNIT, LATENCY

from .harness import run
from .test_mbarrier import wait
from .wgmma_program import Program, integers, operand

STAGES, TILES, TILE = 2, 5, 1024
PREAMBLE = 4  # instructions of the harness besides its parameter loads
FULL, EMPTY, DATA = 0, 16, 1024
MMA = """
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
        {%r24, %r25, %r26, %r27}, {%r28, %r28, %r28, %r28}, {%r28, %r28}, {%r24, %r25, %r26, %r27};
"""


def pipeline() -> str:
    """Warp 0 copies tiles into two stages, warps 1 and 2 multiply and add them up: out[t] is the sum of tile t."""
    return f"""
    setp.eq.u32 %p11, %r50, 0;
    @%p11 mbarrier.init.shared::cta.b64 [{FULL}], 1;
    @%p11 mbarrier.init.shared::cta.b64 [{FULL + 8}], 1;
    @%p11 mbarrier.init.shared::cta.b64 [{EMPTY}], 64;
    @%p11 mbarrier.init.shared::cta.b64 [{EMPTY + 8}], 64;
    fence.mbarrier_init.release.cluster;
    bar.sync 0;
    mov.u32 %r10, 0;
    mov.u64 %rd10, %rd0;
    {" ".join(f"mov.b32 %r{n}, 0;" for n in range(24, 29))}
    setp.ge.u32 %p1, %r50, 32;
    @%p1 bra consumer;
produce:
    and.b32 %r11, %r10, 1;
    shr.u32 %r12, %r10, 1;
    and.b32 %r12, %r12, 1;
    xor.b32 %r12, %r12, 1;
    shl.b32 %r13, %r11, 3;
    mad.lo.u32 %r14, %r11, {TILE}, {DATA};
    {wait(f"%r13+{EMPTY}", "%r12", "empty")}
    @%p11 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r13+{FULL}], {TILE};
    @%p11 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r14], [%rd10], {TILE}, [%r13];
    add.u64 %rd10, %rd10, {TILE};
    add.u32 %r10, %r10, 1;
    setp.lt.u32 %p2, %r10, {TILES};
    @%p2 bra produce;
    bra done;
consumer:
    and.b32 %r11, %r10, 1;
    shr.u32 %r12, %r10, 1;
    and.b32 %r12, %r12, 1;
    shl.b32 %r13, %r11, 3;
    mad.lo.u32 %r14, %r11, {TILE}, {DATA};
    sub.u32 %r15, %r50, 32;
    mad.lo.u32 %r14, %r15, 16, %r14;
    {wait(f"%r13+{FULL}", "%r12", "full")}
    ld.shared.v4.u32 {{%r20, %r21, %r22, %r23}}, [%r14];
    {MMA * 50}
    mbarrier.arrive.shared::cta.b64 _, [%r13+{EMPTY}];
    add.u32 %r20, %r20, %r21;
    add.u32 %r22, %r22, %r23;
    add.u32 %r20, %r20, %r22;
    mad.lo.u32 %r16, %r10, 64, %r15;
    mad.wide.u32 %rd11, %r16, 4, %rd1;
    st.global.u32 [%rd11], %r20;
    add.u32 %r10, %r10, 1;
    setp.lt.u32 %p2, %r10, {TILES};
    @%p2 bra consumer;
done:
"""


def run_pipeline(grid: int = 1, **options: Any) -> tuple[Any, np.ndarray]:
    tiles = np.random.default_rng(0).integers(0, 1000, (TILES, TILE // 4), np.uint32)
    out = np.zeros((TILES, 64), np.uint32)
    shared = DATA + STAGES * TILE
    record = run(
        pipeline(), {"tiles": tiles, "out": out}, grid=(grid, 1, 1), block=(96, 1, 1), shared=shared, **options
    )
    assert (out == tiles.reshape(TILES, 64, 4).sum(2)).all()
    return record, out


def written(recorder: Recorder, path: Path) -> dict[str, Any]:
    recorder.write(path)
    return json.loads(path.read_text())


def slices(content: dict[str, Any], track: str, pid: int = 1) -> list[dict[str, Any]]:
    """Slices of the track of a process whose name begins so, in time."""
    names = {
        e["tid"]: e["args"]["name"]
        for e in content["traceEvents"]
        if e["ph"] == "M" and e["name"] == "thread_name" and e["pid"] == pid
    }
    found = [e for e in content["traceEvents"] if e["ph"] == "X" and e["pid"] == pid]
    return sorted((e for e in found if names[e["tid"]].startswith(track)), key=lambda e: e["ts"])


def track_names(content: dict[str, Any], pid: int = 1) -> list[str]:
    events = (e for e in content["traceEvents"] if e["ph"] == "M" and e["name"] == "thread_name" and e["pid"] == pid)
    return [e["args"]["name"] for e in sorted(events, key=lambda e: e["tid"])]


def check_format(content: dict[str, Any]) -> None:
    """What every trace has to fulfil: known phases, named tracks, slices that do not overlap, arrows between slices."""
    events = content["traceEvents"]
    assert {e["ph"] for e in events} <= {"M", "X", "s", "f"}
    named = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    processes = {e["pid"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    tracks = defaultdict(list)
    for e in events:
        if e["ph"] == "X":
            assert type(e["ts"]) is int and type(e["dur"]) is int and e["ts"] >= 0 and e["dur"] > 0, e
            assert e["name"] and (e["pid"], e["tid"]) in named and e["pid"] in processes
            tracks[e["pid"], e["tid"]].append((e["ts"], e["ts"] + e["dur"]))
    for spans in tracks.values():
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    ends = defaultdict(list)
    for e in events:
        if e["ph"] in "sf":
            ends[e["id"]].append(e)
            assert any(start <= e["ts"] < end for start, end in tracks[e["pid"], e["tid"]]), e
    for pair in ends.values():
        tail, head = sorted(pair, key=lambda e: e["ph"] == "f")
        assert (tail["ph"], head["ph"], len(pair)) == ("s", "f", 2) and tail["ts"] <= head["ts"]


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_a_pipeline(tmp_path: Path, seed: int | None) -> None:
    recorder = Recorder()
    run_pipeline(trace=recorder, seed=seed)
    content = written(recorder, tmp_path / "trace.json")
    check_format(content)
    assert track_names(content)[:3] == ["warp 0: producer (TMA)", "warp 1: mma", "warp 2: mma"]
    copies = slices(content, "copies into this CTA")
    assert [c["args"]["mbarrier"] for c in copies] == ["0x0", "0x8", "0x0", "0x8", "0x0"]
    assert all(c["dur"] == LATENCY + TILE // BYTES_PER_UNIT and c["args"]["bytes"] == TILE for c in copies)
    assert [s["name"] for s in slices(content, "warp 1")].count(
        "mma.sync"
    ) == TILES  # a slice for each turn of the loop
    landed = {c["ts"] + c["dur"]: c["args"]["mbarrier"] for c in copies}
    waits = [s for s in slices(content, "warp 1") if s["cat"] == "wait" and "mbarrier" in s["name"]]
    assert waits and all(f"mbarrier {landed[w['ts'] + w['dur']]} phase" in w["name"] for w in waits)
    # The producer waits for whichever of the consumers is later to empty a stage.
    sources = {e["id"]: e for e in content["traceEvents"] if e["ph"] == "s"}
    heads = {e["ts"]: e["id"] for e in content["traceEvents"] if e["ph"] == "f" and e["tid"] == 0}
    waits = [s for s in slices(content, "warp 0") if s["cat"] == "wait" and "mbarrier" in s["name"]]
    assert [w["name"] for w in waits] == [
        f"wait mbarrier {0x10 + 8 * (t % 2):#x} phase {t // 2}" for t in range(TILES - 2)
    ]
    for w in waits:
        source = sources[heads[w["ts"] + w["dur"] - 1]]
        assert source["tid"] in (1, 2) and source["ts"] == w["ts"] + w["dur"] - 1


def test_times_of_an_arrival_and_a_wait(tmp_path: Path) -> None:
    """Warp 0 adds 100 times and arrives; warp 1, 2 exp2 later, waits: all times can be counted by hand."""
    body = f"""
    setp.eq.u32 %p11, %r50, 0;
    @%p11 mbarrier.init.shared::cta.b64 [16], 32;
    bar.sync 0;
    setp.ge.u32 %p1, %r50, 32;
    @%p1 bra consumer;
    {"add.u32 %r1, %r1, 1;" * 100}
    mbarrier.arrive.shared::cta.b64 _, [16];
    {"add.u32 %r1, %r1, 1;" * 7}
    bra done;
consumer:
    {"ex2.approx.f32 %r1, %r1;" * 2}
    {wait("16", "0", "again")}
    {"ex2.approx.f32 %r1, %r1;" * 5}
done:
"""
    recorder = Recorder()
    run(body, block=(64, 1, 1), shared=24, trace=recorder)
    content = written(recorder, tmp_path / "trace.json")
    check_format(content)
    arrival = PREAMBLE + 5 + 100 + 1
    (waited,) = [s for s in slices(content, "warp 1") if s["cat"] == "wait"]
    assert waited["name"] == "wait mbarrier 0x10 phase 0"
    assert waited["ts"] == PREAMBLE + 5 + 2 * 8 + 1  # the wait itself, which is not parked: warp 0 goes first
    assert waited["ts"] + waited["dur"] == arrival
    producer, consumer = slices(content, "warp 0"), slices(content, "warp 1")
    assert producer[-1]["ts"] + producer[-1]["dur"] == arrival + 7 + 1 + 1  # bra, ret
    assert consumer[-1]["ts"] + consumer[-1]["dur"] == arrival + 1 + 5 * 8 + 1  # the wait's branch, exp2, ret
    assert [s["name"] for s in consumer if s["cat"] == "work"][-1] == "exp2"


def test_times_of_a_barrier_and_of_commit_groups(tmp_path: Path) -> None:
    data = np.arange(64, dtype=np.uint32)
    body = """
    shl.b32 %r1, %r50, 2;
    mad.wide.u32 %rd1, %r50, 4, %rd0;
    cp.async.ca.shared.global [%r1], [%rd1], 4;
    cp.async.commit_group;
    setp.ge.u32 %p1, %r50, 32;
    @%p1 bra late;
    bra meet;
late:
    {slow}
meet:
    bar.sync 3, 64;
    cp.async.wait_group 0;
    ld.shared.u32 %r3, [%r1];
"""
    recorder = Recorder()
    run(body.format(slow="add.u32 %r2, %r2, 1;" * 50), {"data": data}, block=(64, 1, 1), shared=256, trace=recorder)
    content = written(recorder, tmp_path / "trace.json")
    check_format(content)
    early, late = ([s for s in slices(content, f"warp {w}") if s["cat"] == "wait"] for w in (0, 1))
    issued = 1 + PREAMBLE + 3
    arrived = issued + 3 + 50 + 1
    assert [s["name"] for s in early] == ["bar.sync 3", "wait cp.async group 0"]
    assert [s["name"] for s in late] == ["wait cp.async group 0"]
    assert (early[0]["ts"], early[0]["ts"] + early[0]["dur"]) == (issued + 4 + 1, arrived)
    assert {s["ts"] + s["dur"] for s in (early[1], late[0])} == {issued + LATENCY + 1}
    (group,) = slices(content, "groups of cp.async")
    assert (group["ts"], group["dur"]) == (issued, LATENCY + 1)
    assert group["args"] == {"group": 0, "bytes": 256, "instructions": 2}


def test_times_of_a_clusters_barrier(tmp_path: Path) -> None:
    """CTA 1 comes 30 instructions later, twice."""
    meet = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
    body = f"""
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, 0;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra first;
    {"add.u32 %r2, %r2, 1;" * 30}
first:
    {meet}
    @%p1 bra second;
    {"add.u32 %r2, %r2, 1;" * 30}
second:
    {meet}
"""
    recorder = Recorder()
    run(body, block=(32, 1, 1), grid=(2, 1, 1), cluster=(2, 1, 1), target="sm_90a", trace=recorder)
    content = written(recorder, tmp_path / "trace.json")
    check_format(content)
    arrivals = [PREAMBLE + 4 + 30 + 1, PREAMBLE + 4 + 30 + 2 + 1 + 30 + 1]  # of CTA 1
    waits = [s for s in slices(content, "warp 0") if s["cat"] == "wait"]
    assert [(s["name"], s["ts"] + s["dur"]) for s in waits] == [("barrier.cluster", time) for time in arrivals]
    assert not [s for s in slices(content, "warp 0", 2) if s["cat"] == "wait"]


def test_a_cluster_that_is_a_round_ahead(tmp_path: Path) -> None:
    """CTA 1 has arrived for the second time when the emulator lets CTA 0 wait for the first."""
    body = f"""
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, 0;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra slow;
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
    {"add.u32 %r2, %r2, 1;" * 30}
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
    bra done;
slow:
    barrier.cluster.arrive.release.aligned;
    {"add.u32 %r2, %r2, 1;" * 5}
    barrier.cluster.wait.acquire.aligned;
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
done:
"""
    recorder = Recorder()
    run(body, block=(32, 1, 1), grid=(2, 1, 1), cluster=(2, 1, 1), target="sm_90a", trace=recorder)
    (waited,) = [s for s in slices(written(recorder, tmp_path / "trace.json"), "warp 0") if s["cat"] == "wait"]
    start = PREAMBLE + 4
    assert (waited["ts"], waited["ts"] + waited["dur"]) == (start + 1 + 5 + 3, start + 2 + 30 + 1)


def test_each_turn_of_a_loop_is_a_slice(tmp_path: Path) -> None:
    body = f"""
    mov.u32 %r2, 0;
again:
    {"add.u32 %r2, %r2, 1;" * 40}
    setp.lt.u32 %p1, %r2, 120;
    @%p1 bra again;
"""
    recorder = Recorder()
    run(body, trace=recorder)
    found = slices(written(recorder, tmp_path / "trace.json"), "warp 0")
    assert [s["dur"] for s in found] == [PREAMBLE + 1 + 42, 42, 42 + 1]


def test_wgmma_follow_one_another(tmp_path: Path) -> None:
    left, right = integers("f16", 64, 64), integers("f16", 64, 64)
    recorder = Recorder()
    program = Program(
        "wgmma.fence.sync.aligned; {wgmma 0 0} {wgmma 1} {wgmma 2} {wgmma 3} wgmma.commit_group.sync.aligned;"
        "wgmma.wait_group.sync.aligned 0;",
        "f16", "f16", "f32", 64, operand(left, "f16"), operand(right, "f16"), ", 1, 1, 0, 0",
        settings={"trace": recorder},
    )  # fmt: skip
    assert (program.run() == left @ right.T).all()
    content = written(recorder, tmp_path / "trace.json")
    check_format(content)
    assert track_names(content)[:4] == [f"warp {w}: consumer (wgmma)" for w in range(4)]
    (group,) = slices(content, "wgmma of warps 0 to 3")
    # 64 x 64 x 16 multiply-adds, a quarter of them in each of four tensor cores that do 512 per clock.
    assert group["name"] == "wgmma m64n64k16"
    assert (group["dur"], group["args"]) == (4 * 32, {"group": 0, "instructions": 4})
    for warp in range(4):
        waited = next(s for s in slices(content, f"warp {warp}") if s["name"] == "wait wgmma group 0")
        assert waited["ts"] + waited["dur"] == group["ts"] + group["dur"]


@pytest.mark.parametrize("seed", [None, 5])
def test_counts_are_the_launchs(tmp_path: Path, seed: int | None) -> None:
    recorder = Recorder(ctas=3)
    record, _ = run_pipeline(3, trace=recorder, seed=seed)
    content = written(recorder, tmp_path / "trace.json")
    counted = sum(
        s["args"]["instructions"] for pid in (1, 2, 3) for s in slices(content, "warp", pid) if s["cat"] == "work"
    )
    assert counted == sum(record.instructions.values())


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    texts = []
    for name in ("a", "b"):
        recorder = Recorder()
        run_pipeline(2, trace=recorder, seed=3)
        recorder.write(tmp_path / name)
        texts.append((tmp_path / name).read_bytes())
    assert texts[0] == texts[1]


def test_ctas_and_launches_are_chosen(tmp_path: Path) -> None:
    recorder = Recorder(ctas=[3, 1])
    for _ in range(2):
        run_pipeline(4, trace=recorder)
    content = written(recorder, tmp_path / "trace.json")
    check_format(content)
    names = {e["pid"]: e["args"]["name"] for e in content["traceEvents"] if e["name"] == "process_name"}
    assert names == {n: f"kernel CTA ({1 if n % 2 else 3}, 0, 0)" for n in (1, 2, 3, 4)}
    assert [launch["CTAs shown"] for launch in content["otherData"]["launches"]] == [[1, 3], [1, 3]]
    assert "not measured" in content["otherData"]["time"]
    ends = max(s["ts"] + s["dur"] for pid in (1, 2) for s in slices(content, "", pid))
    assert min(s["ts"] for s in slices(content, "warp", 3)) > ends  # launches follow one another
    other = Recorder(kernel="attention")
    run_pipeline(trace=other)
    assert written(other, tmp_path / "other.json")["traceEvents"] == []


@pytest.mark.parametrize(
    "roles, expected",
    [
        ({0: "load", (1, 3): "math"}, ["load", "math", "math"]),
        ({1: "first"}, ["producer (TMA)", "first", "mma"]),
        (lambda warp: "even" if warp % 2 == 0 else None, ["even", "mma", "even"]),
    ],
)
def test_roles_are_given(tmp_path: Path, roles: Any, expected: list[str]) -> None:
    recorder = Recorder(roles=roles)
    run_pipeline(trace=recorder)
    content = written(recorder, tmp_path / "trace.json")
    assert track_names(content)[:3] == [f"warp {n}: {role}" for n, role in enumerate(expected)]
    for role in {*expected}:
        (row,) = (line for line in recorder.summary().splitlines() if line.strip().startswith(role))
        assert row[len(role) + 2 :].split()[0] == str(expected.count(role))


SOURCE = """\
class Kernel:
    @kernel
    def kernel(self):
        self.prepare()
        if warp == 0:
            self.load()
        else:
            self.multiply()

    def load(self):
        self.step()
        address()

    def multiply(self):
        self.step()

    def step(self):
        increment()

    def prepare(self):
        increment()
"""


def test_line_information_names_slices_and_roles(tmp_path: Path) -> None:
    source = tmp_path / "kernel.py"
    source.write_text(SOURCE)
    body = f"""
    .loc 1 3 0
    mov.u32 %r1, 0;
    .loc 1 21 8
    {"add.u32 %r1, %r1, 5;" * 200}
    .loc 1 5 8
    setp.ge.u32 %p1, %r50, 32;
    @%p1 bra other;
    .loc 1 12 8
    {"add.u32 %r1, %r1, 3;" * 40}
    .loc 1 18 8
    {"add.u32 %r1, %r1, 1;" * 60}
    .loc 1 6 8
    bra done;
other:
    .loc 1 18 8
    {"add.u32 %r1, %r1, 1;" * 60}
    .loc 1 15 8
    {"add.u32 %r1, %r1, 2;" * 40}
done:
"""
    recorder = Recorder()
    run(body, block=(96, 1, 1), module=f'.file 1 "{source}"', trace=recorder)
    content = written(recorder, tmp_path / "trace.json")
    check_format(content)
    assert track_names(content) == ["warp 0: load", "warp 1: multiply", "warp 2: multiply"]
    assert {"prepare", "load", "step"} <= {s["name"] for s in slices(content, "warp 0")}
    step = next(s for s in slices(content, "warp 2") if s["name"] == "step")
    assert step["args"]["work"] == "arithmetic" and abs(step["dur"] - 60) <= 32


def test_a_launch_that_fails_is_drawn_up_to_there(tmp_path: Path) -> None:
    recorder = Recorder()
    body = f"""
    setp.eq.u32 %p11, %r50, 0;
    @%p11 mbarrier.init.shared::cta.b64 [0], 33;
    bar.sync 0;
    {wait("0", "0", "again")}
"""
    with pytest.raises(Deadlock):
        run(body, shared=8, trace=recorder)
    content = written(recorder, tmp_path / "trace.json")
    check_format(content)
    assert slices(content, "warp 0")[0]["args"]["instructions"] >= PREAMBLE + 3


def test_nothing_is_recorded_where_nothing_is_asked_for() -> None:
    recorder = Recorder()
    traced, _ = run_pipeline(trace=recorder)
    plain, _ = run_pipeline()
    assert traced.instructions == plain.instructions
    (launch,) = recorder.launches
    sources = [(launch.program.source(b), launch.program.source(b, traced=True)) for b in range(3)]
    assert all("trace" not in plain for plain, _ in sources) and any("trace.at" in traced for _, traced in sources)


def test_command(tmp_path: Path) -> None:
    """Our attention kernel, compiled with line information in a process of its own."""
    path = tmp_path / "trace.json"
    arguments = ["trace", "--arch", "sm_80", "--seq-q", "128", "--seq-k", "192", "--head-dim", "64", "--ctas", "1"]
    code = f"import sys; from cute_attn import cli; sys.exit(cli.main({[*arguments, '-o', str(path)]!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads(path.read_text())
    check_format(content)
    assert track_names(content)[:2] == ["warp 0: mma", "warp 1: mma"]
    assert {"multiply", "dequantise", "probabilities"} <= {s["name"] for s in slices(content, "warp 0")}
    assert any(s["name"].startswith("wait cp.async group") for s in slices(content, "warp 0"))
    table = done.stdout.splitlines()
    assert table[1].split() == ["role", "warps", "instructions", "units", "waiting", "for"]
    assert table[2].split()[0] == "mma" and "cp.async" in table[2]
    assert f"written to {path}" in table[-1]
