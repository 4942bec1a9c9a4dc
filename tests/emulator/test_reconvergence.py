"""Lanes of one warp of which some wait for what happens elsewhere: the others meet them again behind it."""

from __future__ import annotations

import numpy as np
import pytest

from .harness import run
from .test_mbarrier import SEEDS, init, wait

SHAPES = {"waiting warp first": ("ge", 0, 32), "waiting warp last": ("lt", 32, 0)}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_lane_waits_for_an_mbarrier_before_the_warp_goes_to_the_ctas_barrier(shape: str, seed: int | None) -> None:
    compare, waiting, arriving = SHAPES[shape]
    out = np.zeros(64, np.uint32)
    body = f"""
    {init("0", 1)}
    setp.{compare}.u32 %p1, %r50, 32; @%p1 bra other;
    setp.ne.u32 %p2, %r50, {waiting}; @%p2 bra join;
    {wait("0", "0", "again")}
    bra join;
other:
    setp.ne.u32 %p2, %r50, {arriving + 7}; @%p2 bra join;
    st.shared.u32 [16], 5;
    mbarrier.arrive.shared::cta.b64 %rd5, [0];
join:
    bar.sync 0;
    ld.shared.u32 %r1, [16];
    mad.wide.u32 %rd1, %r50, 4, %rd0; st.global.u32 [%rd1], %r1;
    """
    run(body, {"out": out}, block=(64, 1, 1), shared=64, seed=seed)
    assert (out == 5).all()


# CTA n waits until the counter is at n, and moves it on: in thread 0, between barriers of the CTA.
TURNSTILE = """
    setp.ne.u32 %p1, %r50, 0; @%p1 bra entered;
again:
    ld.acquire.gpu.global.u32 %r1, [%rd0];
    setp.ne.u32 %p2, %r1, %r9; @%p2 bra again;
entered:
    bar.sync 0;
    ld.global.u32 %r2, [%rd1];
    bar.sync 0;
    @%p1 bra left;
    mad.lo.u32 %r2, %r2, 3, %r9; st.global.u32 [%rd1], %r2;
    add.u32 %r1, %r9, 1; st.release.gpu.global.u32 [%rd0], %r1;
left:
"""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("number", ["mov.u32 %r9, %ctaid.x;", "mov.u32 %r9, %ctaid.x; sub.u32 %r9, 5, %r9;"])
def test_ctas_take_turns_by_polling(number: str, seed: int | None) -> None:
    counter, total = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    run(number + TURNSTILE, {"counter": counter, "total": total}, grid=(6, 1, 1), block=(64, 1, 1), seed=seed)
    expected = 0
    for n in range(6):
        expected = 3 * expected + n
    assert (counter[0], total[0]) == (6, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cta_polls_for_many_others(seed: int | None) -> None:
    """More than usually run at a time, as on a GPU with as many multiprocessors: the first waits for all of them."""
    arrived, out, ctas = np.zeros(1, np.uint32), np.zeros(1, np.uint32), 150
    body = f"""
    setp.ne.u32 %p1, %r50, 0; @%p1 bra join;
    mov.u32 %r1, %ctaid.x; setp.eq.u32 %p2, %r1, 0; @%p2 bra again;
    red.release.gpu.global.add.u32 [%rd0], 1;
    bra join;
again:
    ld.acquire.gpu.global.u32 %r1, [%rd0];
    setp.ne.u32 %p2, %r1, {ctas - 1}; @%p2 bra again;
    st.global.u32 [%rd1], %r1;
join:
    bar.sync 0;
    """
    run(body, {"arrived": arrived, "out": out}, grid=(ctas, 1, 1), block=(128, 1, 1), seed=seed)
    assert out[0] == ctas - 1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lane_waits_for_another_of_its_warp(seed: int | None) -> None:
    """Threads make progress independently: lane 0 waits at an mbarrier, and lane 1 polls, for what lane 2 does."""
    out, flag = np.zeros(32, np.uint32), np.zeros(1, np.uint32)
    body = f"""
    {init("0", 1)}
    setp.eq.u32 %p1, %r50, 0; @%p1 bra waiter;
    setp.eq.u32 %p2, %r50, 1; @%p2 bra poller;
    setp.ne.u32 %p3, %r50, 2; @%p3 bra join;
    st.global.u32 [%rd1], 1;
    mbarrier.arrive.shared::cta.b64 %rd5, [0];
    bra join;
waiter:
    {wait("0", "0", "again")}
    bra join;
poller:
    ld.relaxed.gpu.global.u32 %r1, [%rd1];
    setp.eq.u32 %p4, %r1, 0; @%p4 bra poller;
join:
    bar.warp.sync 0xFFFFFFFF;
    mad.wide.u32 %rd2, %r50, 4, %rd0; st.global.u32 [%rd2], %r50;
    """
    run(body, {"out": out, "flag": flag}, shared=64, seed=seed)
    assert out.tolist() == list(range(32))
    run(
        body.replace("waiter:", "waiters:")
        .replace("bra waiter;", "bra waiters;")
        .replace("setp.ne.u32 %p3, %r50, 2", "setp.ne.u32 %p3, %r50, 31"),
        {"out": out, "flag": flag * 0},
        shared=64,
        seed=seed,
    )
