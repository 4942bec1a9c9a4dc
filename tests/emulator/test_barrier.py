"""Named barriers: reductions, reuse, and what does not add up."""

from __future__ import annotations

import numpy as np
import pytest

from cute_attn.emulator.errors import BarrierMismatch, Deadlock, DivergentWarp, InvalidOperand, UnknownInstruction

from .harness import run

STORE = "mad.wide.u32 %rd5, %r51, 4, %rd0; st.global.u32 [%rd5], %r1;"


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("opcode", ["bar.red", "barrier.cta.red", "barrier.red.aligned"])
def test_reductions(opcode, seed):
    """popc, and, or over the threads of each CTA; the predicate may be the destination, and may be negated."""
    head, end = opcode.removesuffix(".aligned"), ".aligned" if opcode.endswith("aligned") else ""
    out = np.zeros(3 * 96, np.uint32)
    body = f"""
        mad.lo.u32 %r2, %r51, 7, 1; and.b32 %r3, %r2, 5; setp.eq.u32 %p1, %r3, 1; setp.lt.u32 %p2, %r50, 200;
        {head}.popc{end}.u32 %r1, 0, %p1; {head}.and{end}.pred %p2, 0, %p2; {head}.or{end}.pred %p3, 1, 96, !%p2;
        @%p2 add.u32 %r1, %r1, 1000; @%p3 add.u32 %r1, %r1, 2000; {STORE}
    """
    run(body, {"out": out}, grid=(3, 1, 1), block=(96, 1, 1), seed=seed)
    n = np.arange(288)
    votes = (((n * 7 + 1) & 5) == 1).reshape(3, 96).sum(1)
    assert (out.reshape(3, 96) == votes[:, None] + 1000).all()


def test_reduction_over_some_warps_and_under_a_guard():
    out = np.zeros(128, np.uint32)
    body = f"""
        mov.u32 %r1, 500; shr.u32 %r2, %r50, 5; setp.lt.u32 %p1, %r2, 2; setp.lt.u32 %p2, %r50, 40;
        @%p1 bar.red.popc.u32 %r1, 3, 64, %p2; {STORE}
    """
    run(body, {"out": out}, block=(128, 1, 1))
    assert out.tolist() == [40] * 64 + [500] * 64


def test_a_reduction_that_misses_a_warp():
    body = "setp.lt.u32 %p1, %r50, 32; @%p1 bra END; bar.red.popc.u32 %r1, 0, 64, %p1; END: mov.u32 %r2, 1;"
    with pytest.raises(Deadlock, match="barrier 0 has 32 of 64 threads"):
        run(body, block=(64, 1, 1))
    with pytest.raises(DivergentWarp):
        run("setp.lt.u32 %p1, %r50, 7; @%p1 bar.red.popc.u32 %r1, 0, %p1;")
    with pytest.raises(UnknownInstruction):
        run("bar.red.xor.pred %p1, 0, %p1;")


PRODUCE = "bar.arrive 1, 96;"
# Warps 0 and 1 arrive, warp 2 waits, again and again; barrier 2 keeps the producers from running ahead.
ROUNDS = f"""
    mov.u32 %r9, 0; shr.u32 %r3, %r50, 5; setp.eq.u32 %p1, %r3, 2; mov.u32 %r1, 0; @%p1 bra CONSUMER;
PRODUCER:
    {PRODUCE} bar.sync 2, 96; add.u32 %r9, %r9, 1; setp.lt.u32 %p2, %r9, 3; @%p2 bra PRODUCER; bra END;
CONSUMER:
    bar.sync 1, 96; bar.arrive 2, 96; add.u32 %r9, %r9, 1; setp.lt.u32 %p2, %r9, 3; @%p2 bra CONSUMER;
END:
    {STORE.replace("%r1;", "%r9;")}
"""


@pytest.mark.parametrize("seed", [None, 3, 4, 5])
def test_rounds_of_arrive_and_sync(seed):
    out = np.zeros(192, np.uint32)
    run(ROUNDS, {"out": out}, grid=(2, 1, 1), block=(96, 1, 1), seed=seed)
    assert (out == 3).all()


@pytest.mark.parametrize("seed", [None, 3, 4])
def test_arrivals_alone_complete_a_barrier_and_start_it_anew(seed):
    """Both warps arrive: the barrier is complete, so that the next round needs both again."""
    out = np.zeros(64, np.uint32)
    body = f"""
        bar.arrive 4, 64; bar.sync 0; shr.u32 %r3, %r50, 5; setp.eq.u32 %p1, %r3, 0; @%p1 bra FIRST;
        bar.sync 4, 64; bra END;
    FIRST: {{first}}
    END: mov.u32 %r1, 1; {STORE}
    """
    run(body.format(first="bar.arrive 4, 64;"), {"out": out}, block=(64, 1, 1), seed=seed)
    assert (out == 1).all()
    with pytest.raises(Deadlock, match="barrier 4 has 32 of 64 threads"):
        run(body.format(first=""), {"out": out}, block=(64, 1, 1), seed=seed)


@pytest.mark.parametrize("seed", [None, 3, 4])
def test_a_warp_that_arrives_twice(seed):
    ahead = ROUNDS.replace(PRODUCE, PRODUCE * 2)
    with pytest.raises(BarrierMismatch, match=r"barrier 1 is reached twice by this warp.*warps \[(0|1|0, 1)\]"):
        run(ahead, {"out": np.zeros(96, np.uint32)}, block=(96, 1, 1), seed=seed)


@pytest.mark.parametrize("first,second,reason", [
    ("bar.sync 1, 64", "bar.sync 1, 96", "barrier 1 is used with (64|96) threads, and with (96|64) threads"),
    ("bar.arrive 1, 64", "bar.sync 1", "barrier 1 is used with (64|all) threads, and with (all|64) threads"),
    ("bar.sync 1, 96", "bar.red.popc.u32 %r1, 1, 96, %p1", r"is used as a (sync|red\.popc), and as a (red\.popc|sync)"),
    ("bar.red.or.pred %p2, 1, 96, %p1", "bar.red.popc.u32 %r1, 1, 96, %p1", r"is used as a red\.\w+, and as a red"),
])  # fmt: skip
@pytest.mark.parametrize("seed", [None, 6, 7])
def test_users_that_do_not_agree(first, second, reason, seed):
    body = """
        setp.lt.u32 %p1, %r50, 32; @%p1 bra FIRST; {second}; bra END; FIRST: {first}; END: mov.u32 %r3, 1;
    """
    with pytest.raises(BarrierMismatch, match=reason):
        run(body.format(first=first, second=second), block=(96, 1, 1), seed=seed)
    for both in (first, second):
        if "arrive" not in both and "64" not in both:
            run(body.format(first=both, second=both), block=(96, 1, 1), seed=seed)


def test_all_threads_may_be_counted_or_not():
    body = "setp.lt.u32 %p1, %r50, 32; @%p1 bra FIRST; bar.sync 1; bra END; FIRST: bar.sync 1, 96; END: mov.u32 %r3, 1;"
    run(body, block=(96, 1, 1))


def test_more_warps_than_the_count():
    with pytest.raises(BarrierMismatch, match=r"barrier 5 counts 64 threads, and 96 have come") as caught:
        run("mov.u32 %r1, 5; bar.sync %r1, 64;", block=(96, 1, 1), grid=(2, 1, 1))
    assert "warps [0, 1, 2]" in str(caught.value) and caught.value.cta == (0, 0, 0)
    run("shr.u32 %r1, %r50, 6; bar.sync %r1, 64;", block=(128, 1, 1), grid=(2, 1, 1))


@pytest.mark.parametrize("seed", [None, 8])
def test_arrivals_that_nobody_takes_up(seed):
    """Turns that nobody is left to take are no mistake, before the first round or after the last."""
    body = "setp.lt.u32 %p1, %r50, 32; @%p1 bra END; bar.arrive 6, 96; END: mov.u32 %r1, 1;"
    run(body, block=(96, 1, 1), grid=(2, 1, 1), seed=seed)
    credit = ROUNDS.replace("END:", "@!%p1 bar.arrive 1, 96; END:", 1).replace(
        "bra END; CONSUMER", "bra LAST; CONSUMER"
    )
    run(credit, {"out": np.zeros(96, np.uint32)}, block=(96, 1, 1), seed=seed)


def test_unaligned_barriers_take_lanes_as_they_come():
    out = np.zeros(32, np.uint32)
    body = f"""
        setp.lt.u32 %p1, %r50, 9; mov.u32 %r1, 1; @%p1 bra SOME; barrier.sync 0; bra END;
    SOME: barrier.sync 0; mov.u32 %r1, 2;
    END: {STORE}
    """
    run(body, {"out": out})
    assert out.tolist() == [2] * 9 + [1] * 23
    with pytest.raises(InvalidOperand):
        run("bar.arrive 1, 40;")
