"""Registers that nobody wrote: harmless until one decides something. Each mistake has a twin that only lacks it."""

from __future__ import annotations

import numpy as np
import pytest

from cute_attn.emulator.errors import UninitializedRegister
from cute_attn.emulator.parser import parse
from cute_attn.emulator.program import compile_kernel

from .harness import run

SOME = "setp.lt.u32 %p1, %r50, 9;"
ADDRESS = "mad.wide.u32 %rd5, %r51, 4, %rd0;"


def check(body: str, culprit: str, *, first: int = 0, role: str = "", **options) -> None:
    """`body` decides by an undefined value; lane `first` is the first to do so. The twin writes %r20 and %p9 before."""
    out = np.zeros(64, np.uint32)
    with pytest.raises(UninitializedRegister, match=rf"{role}.*never wrote: {culprit}") as caught:
        run(f"{ADDRESS} {body}", {"out": out}, **options)
    assert caught.value.thread == (first, 0, 0)
    run(f"mov.u32 %r20, 0; mov.b64 %rd20, %rd0; setp.ne.u32 %p9, %r50, %r50; {ADDRESS} {body}", {"out": out}, **options)


def test_a_stored_value():
    check("add.u32 %r1, %r20, 1; st.global.u32 [%rd5], %r1;", "%r20", role="the value stored")
    check(f"{SOME} @%p1 mov.u32 %r20, 5; st.global.u32 [%rd5], %r20;", "%r20", first=9, role="the value stored")


def test_an_address():
    check("add.u64 %rd6, %rd20, 4; ld.global.u32 %r1, [%rd6]; st.global.u32 [%rd5], %r1;", "%rd20", role="the address")
    check("mad.wide.u32 %rd6, %r20, 4, %rd0; st.global.u32 [%rd6], %r50;", "%r20", role="the address")
    check("mov.u32 %r1, dynamic; add.u32 %r1, %r1, %r20; st.shared.u32 [%r1], 3;", "%r20", shared=64)


def test_the_address_of_matrices_and_barriers():
    store = "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {%r2};"
    base = "mov.u32 %r1, dynamic; add.u32 %r1, %r1, %r20; mov.u32 %r2, 0;"
    check(f"{base} {store}", "%r20", role="the address", shared=64)
    check(f"{base} mbarrier.init.shared.b64 [%r1], 1;", "%r20", role="the address", shared=64)
    # Only the warps that the guard lets through need an address.
    some = f"setp.lt.u32 %p1, %r50, 32; @%p1 mov.u32 %r20, 0; {base} {ADDRESS}"
    options = {"block": (64, 1, 1), "shared": 64}
    run(f"{some} @%p1 {store} st.global.u32 [%rd5], 1;", {"out": np.zeros(64, np.uint32)}, **options)
    with pytest.raises(UninitializedRegister, match="the address") as caught:
        run(f"{some} {store} st.global.u32 [%rd5], 1;", {"out": np.zeros(64, np.uint32)}, **options)
    assert caught.value.thread == (32, 0, 0)


def test_a_branch_and_a_guard():
    check("@%p9 bra END; mov.u32 %r1, 3; END: st.global.u32 [%rd5], 1;", "%p9", role="the condition")
    check("setp.eq.u32 %p2, %r20, 4; not.pred %p2, %p2; @%p2 bra END; mov.u32 %r1, 1; END: mov.u32 %r1, 2;", "%r20")
    check("@%p9 st.global.u32 [%rd5], 1;", "%p9", role="the guard")


def test_a_barrier_and_a_vote():
    check("and.b32 %r1, %r20, 3; bar.sync %r1;", "%r20")
    check("vote.sync.ballot.b32 %r1, %p9, 0xffffffff; st.global.u32 [%rd5], %r1;", "%p9")


def test_an_operand_of_mma():
    body = """
        mov.b32 %r1, 0; mov.b32 %r2, 0;
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r10, %r11, %r12, %r13}, {%r1, %r1, %r1, %r20}, {%r1, %r2},
            {%r2, %r2, %r2, %r2};
    """
    check(body, "%r20", role="an operand")


def test_a_register_written_on_one_path_only():
    """The value is wrong in the lanes that came the other way, and only if they use it."""
    body = f"{SOME} @%p1 bra SKIP; mov.u32 %r20, 7; SKIP: add.u32 %r2, %r20, 1; {{}} st.global.u32 [%rd5], %r2; END:"
    check(body.format("").replace("END:", ""), "%r20", first=0)
    out = np.zeros(32, np.uint32)
    run(ADDRESS + body.format("@%p1 bra END;") + "mov.u32 %r3, 1;", {"out": out})
    assert out.tolist() == [0] * 9 + [8] * 23


def test_undefined_values_may_be_moved_and_selected_away():
    out = np.zeros(32, np.uint32)
    body = f"""
        {ADDRESS} {SOME} mov.u32 %r1, %r20; add.u32 %r1, %r1, 5; selp.u32 %r2, %r50, %r1, %p1;
        @!%p1 mov.u32 %r2, 77; st.global.u32 [%rd5], %r2; @%p9 add.u32 %r3, %r20, 1;
    """
    run(body, {"out": out})
    assert out.tolist() == [*range(9), *[77] * 23]


def test_predicates_that_decide_without_the_undefined_one():
    out = np.zeros(32, np.uint32)
    body = f"""
        {ADDRESS} {SOME} @!%p1 setp.eq.u32 %p9, %r50, 20; not.pred %p2, %p1; and.pred %p3, %p2, %p9;
        selp.u32 %r1, 1, 0, %p3; st.global.u32 [%rd5], %r1;
    """
    run(body, {"out": out})
    assert out.tolist() == [int(t == 20) for t in range(32)]
    with pytest.raises(UninitializedRegister) as caught:
        run(body.replace("and.pred %p3, %p2", "and.pred %p3, %p1"), {"out": out})
    assert caught.value.thread == (0, 0, 0)
    run(body.replace("and.pred %p3, %p2", "or.pred %p3, %p1"), {"out": out})


def test_packing_half_a_register():
    out = np.zeros(32, np.uint32)
    body = f"{ADDRESS} cvt.u16.u32 %h1, %r50; mov.b32 %r1, {{%h1, %h2}}; st.global.b16 [%rd5], %r1;"
    body = body.replace("st.global.b16 [%rd5], %r1;", "mov.b32 {%h3, %h4}, %r1; st.global.b16 [%rd5], %h3;")
    run(body, {"out": out})
    assert out.tolist() == list(range(32))
    with pytest.raises(UninitializedRegister, match="%h1"):
        run(body.replace("cvt.u16.u32 %h1, %r50;", ""), {"out": out})


def test_shuffles_carry_what_is_undefined_to_other_lanes():
    out = np.zeros(32, np.uint32)
    body = f"""
        {ADDRESS} {SOME} @%p1 mov.u32 %r20, %r50; shfl.sync.idx.b32 %r1, %r20, LANE, 31, 0xffffffff;
        st.global.u32 [%rd5], %r1;
    """
    run(body.replace("LANE", "8"), {"out": out})
    assert (out == 8).all()
    with pytest.raises(UninitializedRegister, match="%r20"):
        run(body.replace("LANE", "9"), {"out": out})


@pytest.mark.parametrize("seed", [None, 1])
def test_a_loop_whose_first_round_does_not_read(seed):
    """The register is written in every round and read from the second one on."""
    out = np.zeros(64, np.uint32)
    loop = f"""
        {ADDRESS} mov.u32 %r2, 0; mov.u32 %r1, 0;
    LOOP: setp.eq.u32 %p1, %r2, FIRST; @%p1 bra FIRST;
        add.u32 %r1, %r1, %r20;
    FIRST: add.u32 %r20, %r2, %r50; add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, 4; @%p2 bra LOOP;
        st.global.u32 [%rd5], %r1;
    """
    run(loop.replace(", FIRST;", ", 0;", 1), {"out": out}, block=(64, 1, 1), seed=seed)
    assert out.tolist() == [0 + 1 + 2 + 3 * t for t in range(64)]
    with pytest.raises(UninitializedRegister, match="the value stored.*%r20"):
        run(loop.replace(", FIRST;", ", 1;", 1), {"out": out}, block=(64, 1, 1), seed=seed)


WGMMA = """
    mov.u32 %r1, dynamic; mad.lo.u32 %r2, %r50, 16, %r1; mov.u32 %r3, 0;
    st.shared.v4.u32 [%r2], {%r3, %r3, %r3, %r3}; st.shared.v4.u32 [%r2+2048], {%r3, %r3, %r3, %r3};
    fence.proxy.async; bar.sync 0; bfe.u32 %r4, %r1, 4, 14; cvt.u64.u32 %rd5, %r4;
    or.b64 %rd5, %rd5, 0x0000000800010000;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r20, %r21, %r22, %r23}, %rd5, %rd5, SCALE, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    mad.wide.u32 %rd6, %r51, 4, %rd0; st.global.u32 [%rd6], %r23;
"""


def test_accumulators_that_wgmma_does_not_read():
    out = np.ones(128, np.float32)
    options = {"block": (128, 1, 1), "shared": 4096}
    run(WGMMA.replace("SCALE", "0"), {"out": out}, **options)
    assert (out == 0).all()
    with pytest.raises(UninitializedRegister, match="the accumulator"):
        run(WGMMA.replace("SCALE", "1"), {"out": out}, **options)
    zeros = " ".join(f"mov.b32 %r{n}, 0;" for n in range(20, 24))
    run(zeros + WGMMA.replace("SCALE", "1"), {"out": out}, **options)
    predicate = "setp.ne.u32 %p1, %r0, 0;" + WGMMA.replace("SCALE", "%p1")
    run(predicate, {"out": out}, scalars=(0,), **options)
    with pytest.raises(UninitializedRegister, match="the accumulator"):
        run(predicate, {"out": out}, scalars=(1,), **options)


def test_kernels_that_write_first_are_left_alone():
    text = """
    .version 8.8
    .target sm_89
    .visible .entry kernel(.param .u64 p) { .reg .b32 %r<4>; .reg .b64 %rd<2>; .reg .pred %p<2>;
        ld.param.u64 %rd0, [p]; mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, 5; mov.u32 %r1, 3; @%p0 mov.u32 %r1, %r0;
        @%p0 bra END; mov.u32 %r2, 4; st.global.u32 [%rd0], %r2; END: st.global.u32 [%rd0], %r1; ret; }
    """
    kernel = parse(text)["kernel"]
    before = len(kernel.register_bits)
    program = compile_kernel(kernel)
    assert len(kernel.register_bits) == before
    assert not any("require_defined" in program.source(block) for block in range(len(program.blocks)))


def test_what_a_barrier_writes_is_defined():
    out = np.zeros(32, np.uint32)
    for guard in ("", "@%p2 "):
        body = f"""
            {ADDRESS} setp.lt.u32 %p1, %r50, 12; setp.lt.u32 %p2, %r50, 40; {guard}bar.red.popc.u32 %r20, 0, %p1;
            st.global.u32 [%rd5], %r20;
        """
        run(body, {"out": out})
        assert (out == 12).all()


DEPOT = ".local .align 8 .b8 depot[32];"
LOCAL = f"""
    {ADDRESS} mov.b64 %rd6, depot; cvt.u32.u64 %r2, %rd6; st.local.v2.u32 [%rd6], {{%r50, %r50}};
    st.local.u16 [%rd6+8], 7; {SOME} @%p1 st.local.u16 [%rd6+10], 0;
    ld.local.u32 %r1, [%rd6+OFFSET]; ld.local.v2.u32 {{%r3, %r4}}, [%rd6+16]; add.u32 %r4, %r3, %r4;
"""


def test_local_memory():
    """Loading bytes that nobody wrote is no mistake, using them is."""
    out = np.zeros(32, np.uint32)
    run(LOCAL.replace("OFFSET", "4") + "st.global.u32 [%rd5], %r1;", {"out": out}, declarations=DEPOT)
    assert out.tolist() == list(range(32))
    for use in (
        "st.global.u32 [%rd5], %r1;",
        "setp.eq.u32 %p2, %r1, 7; @%p2 bra END; mov.u32 %r1, 1; END: bar.sync 0;",
    ):
        with pytest.raises(UninitializedRegister, match="never wrote: local memory") as caught:
            run(LOCAL.replace("OFFSET", "8") + use, {"out": out}, declarations=DEPOT)
        assert caught.value.thread == (9, 0, 0)
        whole = LOCAL.replace("OFFSET", "8").replace("@%p1 ", "")
        run(whole + use, {"out": out}, declarations=DEPOT)
    with pytest.raises(UninitializedRegister, match="local memory"):
        run(LOCAL.replace("OFFSET", "0") + "st.global.u32 [%rd5], %r4;", {"out": out}, declarations=DEPOT)


def test_local_memory_filled_in_a_loop():
    out = np.zeros(32, np.uint32)
    body = f"""
        {ADDRESS} mov.b64 %rd6, depot; mov.u32 %r2, 0; mov.u32 %r1, 0;
    FILL: mad.wide.u32 %rd7, %r2, 4, %rd6; st.local.u32 [%rd7], %r2; add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, COUNT;
        @%p1 bra FILL;
        mov.u32 %r2, 0;
    SUM: mad.wide.u32 %rd7, %r2, 4, %rd6; ld.local.u32 %r3, [%rd7]; add.u32 %r1, %r1, %r3; add.u32 %r2, %r2, 1;
        setp.lt.u32 %p1, %r2, 8; @%p1 bra SUM;
        st.global.u32 [%rd5], %r1;
    """
    run(body.replace("COUNT", "8"), {"out": out}, declarations=DEPOT)
    assert (out == 28).all()
    with pytest.raises(UninitializedRegister, match="the value stored.*local memory"):
        run(body.replace("COUNT", "7"), {"out": out}, declarations=DEPOT)
