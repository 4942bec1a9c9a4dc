"""Branches, loops, divergence, barriers, deadlock, unknown instructions, launches."""

from __future__ import annotations

import numpy as np
import pytest

from cute_attn.emulator.errors import (
    Deadlock,
    DivergentWarp,
    EmulatorFault,
    InvalidLaunch,
    InvalidOperand,
    UnknownInstruction,
)
from cute_attn.emulator.parser import parse
from cute_attn.emulator.ptx_text import split_operands
from cute_attn.emulator.registry import ACTIONS, HELPERS

from .harness import run

STORE = "mad.wide.u32 %rd5, %r51, 4, %rd0; st.global.u32 [%rd5], %r1;"


def collatz(n: int) -> int:
    steps = 0
    while n != 1:
        n = 3 * n + 1 if n & 1 else n // 2
        steps += 1
    return steps


COLLATZ = f"""
    add.u32 %r2, %r51, 1; mov.u32 %r1, 0;
LOOP:
    setp.eq.u32 %p1, %r2, 1; @%p1 bra DONE;
    and.b32 %r3, %r2, 1; setp.eq.u32 %p2, %r3, 0; @%p2 bra EVEN;
    mad.lo.u32 %r2, %r2, 3, 1; bra.uni NEXT;
EVEN:
    shr.u32 %r2, %r2, 1;
NEXT:
    add.u32 %r1, %r1, 1; bra LOOP;
DONE:
    {STORE}
"""


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_divergent_loops(seed):
    out = np.zeros(192, np.uint32)
    record = run(COLLATZ, {"out": out}, grid=(3, 1, 1), block=(64, 1, 1), seed=seed)
    assert out.tolist() == [collatz(n + 1) for n in range(192)]
    assert record.instructions["st.global.u32"] == 6


def test_block_that_is_no_multiple_of_a_warp():
    out = np.zeros(2 * 37, np.uint32)
    run(f"mov.u32 %r1, %laneid; bar.sync 0; {STORE}", {"out": out}, grid=(2, 1, 1), block=(37, 1, 1))
    assert out.tolist() == [n % 32 for n in range(37)] * 2


def test_special_registers():
    out = np.zeros((24, 12), np.uint32)
    names = ["tid.x", "tid.y", "tid.z", "ctaid.x", "ctaid.y", "ntid.x", "ntid.y", "nctaid.x", "laneid", "warpid"]
    names += ["lanemask_lt", "lanemask_ge"]
    body = "mov.u32 %r1, %tid.y; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x; mad.lo.u32 %r1, %r1, %r2, %r3;"
    body += "mov.u32 %r4, %ctaid.y; mad.lo.u32 %r1, %r4, 12, %r1; mad.wide.u32 %rd5, %r1, 48, %rd0;"
    for n, name in enumerate(names):
        body += f"mov.u32 %r5, %{name}; st.global.u32 [%rd5+{4 * n}], %r5;"
    run(body, {"out": out}, grid=(1, 2, 1), block=(4, 3, 1))
    for cta in range(2):
        for t in range(12):
            expected = [t % 4, t // 4, 0, 0, cta, 4, 3, 1, t, 0, (1 << t) - 1, 2**32 - (1 << t)]
            assert out[12 * cta + t].tolist() == expected


def test_nested_scopes_rename_registers_and_labels():
    out = np.zeros(32, np.uint32)
    inner = """{
        .reg .pred p; .reg .b32 x; setp.gt.u32 p, %r50, LIMIT; mov.u32 x, 5; @p bra SKIP; add.u32 x, x, 1;
    SKIP: add.u32 %r1, %r1, x; }
    """
    body = "mov.u32 %r1, 0;" + inner.replace("LIMIT", "9") + inner.replace("LIMIT", "19") + STORE
    run(body, {"out": out})
    assert out.tolist() == [(6 if t <= 9 else 5) + (6 if t <= 19 else 5) for t in range(32)]


@pytest.mark.parametrize("seed", [None, 3, 4])
def test_barrier_orders_shared_memory(seed):
    out = np.zeros(256, np.uint32)
    body = f"""
        mov.u32 %r2, dynamic; mad.lo.u32 %r3, %r50, 4, %r2; st.shared.u32 [%r3], %r51; bar.sync 0;
        xor.b32 %r4, %r50, 96; mad.lo.u32 %r3, %r4, 4, %r2; ld.shared.u32 %r1, [%r3]; {STORE}
    """
    run(body, {"out": out}, grid=(2, 1, 1), block=(128, 1, 1), shared=512, seed=seed)
    assert out.tolist() == [n ^ 96 for n in range(256)]


NAMED = f"""
    mov.u32 %r2, dynamic; shr.u32 %r3, %r50, 5; setp.ne.u32 %p1, %r3, 0; @%p1 bra CONSUMER;
    mad.lo.u32 %r4, %r50, 4, %r2; add.u32 %r5, %r50, 70; st.shared.u32 [%r4], %r5;
    bar.arrive 3, 64; bra END;
CONSUMER:
    bar.sync 3, 64; and.b32 %r4, %r50, 31; mad.lo.u32 %r4, %r4, 4, %r2; ld.shared.u32 %r1, [%r4]; {STORE}
END:
"""


@pytest.mark.parametrize("seed", [None, 5, 6])
def test_named_barrier_with_arrive(seed):
    out = np.zeros(64, np.uint32)
    run(NAMED, {"out": out}, block=(64, 1, 1), shared=128, seed=seed)
    assert out[32:].tolist() == list(range(70, 102))


def test_deadlock_tells_who_waits_and_who_is_missing():
    body = NAMED.replace("bar.arrive 3, 64;", "")
    with pytest.raises(Deadlock) as caught:
        run(body, {"out": np.zeros(64, np.uint32)}, block=(64, 1, 1), shared=128)
    text = str(caught.value)
    assert "CTA (0, 0, 0): barrier 3 has 32 of 64 threads" in text
    assert "warps [1] wait at `bar.sync 3, 64`" in text and "not there: warps [0]" in text


def test_exited_threads_do_not_hold_a_barrier():
    out = np.zeros(64, np.uint32)
    body = f"mov.u32 %r1, 1; setp.lt.u32 %p1, %r50, 32; @%p1 exit; bar.sync 0; {STORE}"
    run(body, {"out": out}, block=(64, 1, 1))
    assert out.tolist() == [0] * 32 + [1] * 32


def test_barrier_under_divergence():
    body = "setp.lt.u32 %p1, %r50, 7; @%p1 bra SKIP; bar.sync 0; SKIP: mov.u32 %r1, 0;"
    with pytest.raises(DivergentWarp, match="barrier reached by 25 lanes of a warp"):
        run(body)


def test_barrier_number_out_of_range():
    with pytest.raises(InvalidOperand, match="barrier 16"):
        run("bar.sync 16;")


def test_unknown_instruction_is_quoted_when_reached():
    body = "setp.ne.u32 %p1, %r0, 0; @%p1 bra SKIP; frobnicate.sync.b32 %r1, %r2; SKIP: mov.u32 %r1, 1;"
    with pytest.raises(UnknownInstruction) as caught:
        run(body, scalars=(0,))
    assert "frobnicate.sync.b32 %r1, %r2" in str(caught.value)
    run(body, scalars=(1,))


def test_unknown_form_of_a_known_instruction():
    with pytest.raises(UnknownInstruction, match=r"cvt\.rs\.f16x2"):
        run("cvt.rs.f16x2.f32 %r1, %r2, %r3, %r4;")


@pytest.mark.parametrize(
    "text",
    [
        "add.odd.f32 %r1, %r2, %r3",
        "ld.global.v8.b32 %r1, [%rd1]",
        "add.f32.e4m3 %r1, %r2, %r3",
        "add.sat.u32 %r1, %r2, %r3",
        "cvt.rm.f16.f32 %h1, %r2",
        "cvt.rn.satfinite.tf32.f32 %r1, %r2",
        "set.eq.bf16.f32 %h1, %r2, %r3",
    ],
)
def test_unknown_modifiers_are_not_ignored(text):
    with pytest.raises(UnknownInstruction, match=text.split()[0]):
        run(text + ";")


def test_a_failure_of_the_emulator_names_the_instruction(monkeypatch):
    def broken(*arguments):
        raise IndexError("list index out of range")

    monkeypatch.setitem(HELPERS, "population_count", broken)
    with pytest.raises(EmulatorFault, match="IndexError: list index out of range") as caught:
        run("add.u32 %r1, %r50, 1; popc.b32 %r2, %r1; st.global.u32 [%rd0], %r2;", {"out": np.zeros(1, np.uint32)})
    assert caught.value.instruction == "popc.b32 %r2, %r1" and caught.value.kernel == "kernel"
    assert isinstance(caught.value.__context__, IndexError)
    monkeypatch.setitem(ACTIONS, "bar", broken)
    with pytest.raises(EmulatorFault) as caught:
        run("mov.u32 %r1, 2; bar.sync %r1;")
    assert caught.value.instruction == "bar.sync %r1"


def test_trap_is_reported():
    with pytest.raises(InvalidOperand, match="reached a trap"):
        run("setp.eq.u32 %p1, %r50, 9; @%p1 trap;")
    run("setp.eq.u32 %p1, %r50, 99; @%p1 trap;")


@pytest.mark.parametrize(
    "options,reason",
    [
        ({"block": (2048, 1, 1)}, "1024 are allowed"),
        ({"grid": (0, 1, 1)}, "not positive"),
        ({"shared": 300000}, "shared memory"),
        ({"grid": (1, 70000, 1)}, "65535"),
    ],
)
def test_impossible_launches(options, reason):
    with pytest.raises(InvalidLaunch, match=reason):
        run("mov.u32 %r1, 0;", **options)


def test_kernel_description():
    text = """
    .version 8.8
    .target sm_80
    .visible .entry first(.param .align 8 .b8 p0[20], .param .u64 .ptr .global .align 16 p1, .param .f32 p2)
    .reqntid 128, 2, 1 { .shared .align 16 .b8 buffer[100]; .reg .b32 %r<3>; mov.u32 %r1, buffer; ret; }
    .entry second() .maxntid 64 { ret; }
    """
    kernels = parse(text)
    first, second = kernels["first"], kernels["second"]
    assert [(p.name, p.offset, p.size) for p in first.parameters] == [("p0", 0, 20), ("p1", 24, 8), ("p2", 32, 4)]
    assert first.parameter_bytes == 36 and first.static_shared_bytes == 100 and first.target == "sm_80"
    assert first.required_block == (128, 2, 1) and first.max_threads == 256
    assert second.required_block is None and second.max_threads == 64 and second.parameters == []


def test_split_operands():
    assert split_operands("{%r1, %r2}, [%rd1 + 8], %p1|%p2, -1") == ["{%r1, %r2}", "[%rd1 + 8]", "%p1|%p2", "-1"]


def test_profile_names_families():
    record = run(COLLATZ, {"out": np.zeros(32, np.uint32)}, profile=True)
    assert {"integer", "load_store"} <= set(record.profile) and all(s > 0 for s in record.profile.values())


def test_a_thread_count_counts_whole_warps():
    """48 threads are two warps, which count as 64, whether they wait or only arrive, or one lane of them has left."""
    out = np.zeros(48, np.uint32)
    body = f"mov.u32 %r1, 1; setp.eq.u32 %p1, %r50, 5; @%p1 exit; bar.sync 1, 64; {STORE}"
    run(body, {"out": out}, block=(48, 1, 1))
    assert out.tolist() == [int(t != 5) for t in range(48)]
    swapped = NAMED.replace("setp.ne.u32", "setp.eq.u32").replace("ld.shared.u32 %r1, [%r4]", "mov.u32 %r1, 1")
    run(swapped, {"out": out}, block=(48, 1, 1), shared=192)


@pytest.mark.parametrize("count", [0, 40])
def test_a_thread_count_that_is_no_number_of_warps(count):
    with pytest.raises(InvalidOperand, match=f"{count} threads: a barrier counts in warps"):
        run(f"bar.sync 1, {count};")


def test_a_guard_that_splits_a_warp_at_a_barrier():
    with pytest.raises(DivergentWarp, match="barrier reached by 1 lanes of a warp"):
        run("setp.eq.u32 %p1, %r50, 3; @%p1 bar.sync 0;", block=(64, 1, 1))


def test_clocks_grow_and_sizes_are_known():
    out = np.zeros(6, np.uint32)
    body = """
        mov.u32 %r1, %clock; mov.u32 %r2, %clock; sub.u32 %r2, %r2, %r1; mov.u64 %rd5, %globaltimer;
        mov.u32 %r3, %aggr_smem_size; mov.u32 %r4, %total_smem_size; sub.u32 %r3, %r3, %r4; mov.u32 %r5, WARP_SZ;
        mov.u64 %rd6, %clock64; sub.u64 %rd6, %rd6, %rd5; cvt.u32.u64 %r6, %rd6; mov.u32 %r7, %nwarpid;
        st.global.v2.u32 [%rd0], {%r2, %r3}; st.global.v2.u32 [%rd0+8], {%r5, %r6}; st.global.u32 [%rd0+16], %r7;
    """
    run(body, {"out": out}, block=(40, 1, 1), shared=64)
    assert out[0] > 0 and out[1] == 1024 and out[2] == 32 and out[3] > 0 and out[4] == 2


@pytest.mark.parametrize(
    "text",
    [
        "fence.acq_rel.cluster",
        "fence.proxy.async.shared::cta",
        "fence.mbarrier_init.release.cluster",
        "fence.proxy.tensormap::generic.acquire.gpu [%rd0], 128",
        "membar.gl",
        "griddepcontrol.launch_dependents",
        "prefetch.global.L2::evict_last [%rd0]",
        "applypriority.global.L2::evict_normal [%rd0], 128",
        "createpolicy.fractional.L2::evict_first.b64 %rd5, 0f3F800000",
    ],
)
def test_fences_and_hints_change_nothing(text):
    run(f"{text};", {"out": np.zeros(32, np.uint32)})
    with pytest.raises(UnknownInstruction):
        run(f"{text.replace('.', '.odd.', 1)};", {"out": np.zeros(32, np.uint32)})


def test_size_of_dynamic_shared_memory():
    out = np.zeros(32, np.uint32)
    run(f"mov.u32 %r1, %dynamic_smem_size; {STORE}", {"out": out}, shared=128, declarations=".shared .b8 fixed[100];")
    assert (out == 128).all()
