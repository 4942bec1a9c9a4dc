"""mbarrier: phases, byte counts, tokens, waits that park and time out, findings."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from cute_attn.emulator import scheduler
from cute_attn.emulator.errors import BarrierMismatch, Deadlock, Misaligned

from .harness import run

SEEDS = [None, 1, 2, 3]
WAIT = """
{label}:
    mbarrier.try_wait.parity.shared::cta.b64 %p10, [{address}], {parity};
    @!%p10 bra {label};
"""


def wait(address: str, parity: str, label: str) -> str:
    return WAIT.format(address=address, parity=parity, label=label)


def init(address: str, count: int) -> str:
    return f"""
    setp.eq.u32 %p11, %r50, 0;
    @%p11 mbarrier.init.shared::cta.b64 [{address}], {count};
    bar.sync 0;
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_a_consumer_waits_for_all_producers(seed) -> None:
    """Warps 0..2 store and arrive, warp 3 waits for their 96 arrivals and adds up what they stored."""
    out = np.zeros(32, np.uint32)
    body = f"""
    {init("0", 96)}
    setp.ge.u32 %p1, %r50, 96;
    @%p1 bra consumer;
    shl.b32 %r1, %r50, 2;
    mul.lo.u32 %r2, %r50, 10;
    st.shared.u32 [%r1+64], %r2;
    mbarrier.arrive.shared::cta.b64 %rd5, [0];
    bra done;
consumer:
    {wait("0", "0", "again")}
    sub.u32 %r3, %r50, 96;
    shl.b32 %r1, %r3, 2;
    ld.shared.u32 %r4, [%r1+64];
    ld.shared.u32 %r5, [%r1+192];
    ld.shared.u32 %r6, [%r1+320];
    add.u32 %r4, %r4, %r5;
    add.u32 %r4, %r4, %r6;
    mad.wide.u32 %rd1, %r3, 4, %rd0;
    st.global.u32 [%rd1], %r4;
done:
"""
    run(body, {"out": out}, block=(128, 1, 1), shared=64 + 96 * 4, seed=seed)
    n = np.arange(32)
    assert (out == 10 * (n + (n + 32) + (n + 64))).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_ring_of_two_barriers_keeps_producer_and_consumer_in_step(seed) -> None:
    """One slot: warp 0 fills it when empty, warp 1 empties it when full, five times over, with tx bytes as counts."""
    out = np.zeros((5, 32), np.uint32)
    body = f"""
    setp.eq.u32 %p11, %r50, 0;
    @%p11 mbarrier.init.shared::cta.b64 [0], 32;
    @%p11 mbarrier.init.shared::cta.b64 [8], 32;
    bar.sync 0;
    and.b32 %r1, %r50, 31;
    shl.b32 %r2, %r1, 2;
    mov.u32 %r10, 0;
    setp.ge.u32 %p1, %r50, 32;
    @%p1 bra consumer;
produce:
    and.b32 %r11, %r10, 1;
    xor.b32 %r12, %r11, 1;
    {wait("8", "%r12", "empty")}
    mad.lo.u32 %r3, %r10, 100, %r1;
    st.shared.u32 [%r2+64], %r3;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [0], 4;
    mbarrier.complete_tx.shared::cta.b64 [0], 4;
    add.u32 %r10, %r10, 1;
    setp.lt.u32 %p2, %r10, 5;
    @%p2 bra produce;
    bra done;
consumer:
    and.b32 %r11, %r10, 1;
    {wait("0", "%r11", "full")}
    ld.shared.u32 %r3, [%r2+64];
    mbarrier.arrive.shared::cta.b64 _, [8];
    mad.lo.u32 %r4, %r10, 32, %r1;
    mad.wide.u32 %rd1, %r4, 4, %rd0;
    st.global.u32 [%rd1], %r3;
    add.u32 %r10, %r10, 1;
    setp.lt.u32 %p2, %r10, 5;
    @%p2 bra consumer;
done:
"""
    run(body, {"out": out}, block=(64, 1, 1), shared=64 + 128, seed=seed)
    assert (out == 100 * np.arange(5)[:, None] + np.arange(32)).all()


def test_tokens_tests_and_pending_counts() -> None:
    out = np.zeros(4, np.uint32)
    body = f"""
    {init("0", 3)}
    @!%p11 bra done;
    mbarrier.arrive.shared::cta.b64 %rd5, [0];
    mbarrier.arrive.shared::cta.b64 %rd6, [0];
    mbarrier.pending_count.b64 %r1, %rd6;
    st.global.u32 [%rd0], %r1;
    mbarrier.test_wait.shared::cta.b64 %p1, [0], %rd5;
    selp.u32 %r2, 1, 0, %p1;
    st.global.u32 [%rd0+4], %r2;
    mbarrier.arrive.shared::cta.b64 %rd7, [0], 1;
    mbarrier.test_wait.shared::cta.b64 %p1, [0], %rd5;
    selp.u32 %r2, 1, 0, %p1;
    st.global.u32 [%rd0+8], %r2;
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [0], 0, 1000;
    selp.u32 %r2, 1, 0, %p2;
    st.global.u32 [%rd0+12], %r2;
done:
"""
    run(body, {"out": out}, shared=8)
    assert out.tolist() == [2, 0, 1, 1]


def test_a_try_wait_may_time_out() -> None:
    """A thread peeks at a phase that only its own later arrival completes."""
    out = np.zeros(2, np.uint32)
    body = f"""
    {init("0", 1)}
    @!%p11 bra done;
    mbarrier.try_wait.parity.shared::cta.b64 %p1, [0], 0;
    selp.u32 %r1, 1, 0, %p1;
    st.global.u32 [%rd0], %r1;
    mbarrier.arrive.shared::cta.b64 _, [0];
    {wait("0", "0", "again")}
    mov.u32 %r1, 7;
    st.global.u32 [%rd0+4], %r1;
done:
"""
    run(body, {"out": out}, shared=8)
    assert out.tolist() == [0, 7]


def test_generic_addresses_and_arrive_drop() -> None:
    out = np.zeros(1, np.uint32)
    body = f"""
    {init("16", 2)}
    @!%p11 bra done;
    mov.u64 %rd1, 16;
    cvta.shared.u64 %rd2, %rd1;
    mbarrier.arrive_drop.b64 _, [%rd2];
    mbarrier.arrive.b64 _, [%rd2];
    {wait("16", "0", "first")}
    mbarrier.arrive.b64 _, [%rd2];
    {wait("16", "1", "second")}
    mov.u32 %r1, 1;
    st.global.u32 [%rd0], %r1;
done:
"""
    run(body, {"out": out}, shared=32)
    assert out[0] == 1


@pytest.mark.parametrize("arrivals, finds", [(2, False), (1, True)])
def test_a_missing_arrival_is_a_deadlock_that_says_what_is_missing(arrivals, finds) -> None:
    out = np.zeros(1, np.uint32)
    body = f"""
    {init("0", 2)}
    @!%p11 bra done;
    {"mbarrier.arrive.shared::cta.b64 _, [0];" * arrivals}
    {wait("0", "0", "again")}
done:
"""
    if not finds:
        run(body, {"out": out}, shared=8)
        return
    with pytest.raises(Deadlock, match=r"offset 0x0 of CTA \(0, 0, 0\), phase 0: 1 of 2 arrivals have not come"):
        run(body, {"out": out}, shared=8)


@pytest.mark.parametrize(
    "expected, reported, message", [(16, 16, None), (32, 16, "16 bytes announced"), (8, 16, "8 bytes")]
)
def test_bytes_that_do_not_add_up(expected, reported, message) -> None:
    body = f"""
    {init("0", 1)}
    @!%p11 bra done;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [0], {expected};
    mbarrier.complete_tx.shared::cta.b64 [0], {reported};
    {wait("0", "0", "again")}
done:
"""
    if message is None:
        run(body, {"out": np.zeros(1)}, shared=8)
        return
    with pytest.raises((Deadlock, BarrierMismatch), match=message):
        run(body, {"out": np.zeros(1)}, shared=8)


def test_more_arrivals_than_the_count() -> None:
    body = f"""
    {init("0", 1)}
    @!%p11 bra done;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [0], 16;
    mbarrier.arrive.shared::cta.b64 _, [0];
done:
"""
    with pytest.raises(BarrierMismatch, match="more arrivals than expected") as caught:
        run(body, {"out": np.zeros(1)}, shared=8)
    assert caught.value.instruction.startswith("mbarrier.arrive.shared")


def test_a_barrier_that_nobody_initialised() -> None:
    with pytest.raises(BarrierMismatch, match="nobody has initialised"):
        run("mbarrier.arrive.shared::cta.b64 _, [0];", {"out": np.zeros(1)}, shared=8)


def test_a_misaligned_barrier() -> None:
    with pytest.raises(Misaligned):
        run("mbarrier.init.shared::cta.b64 [4], 1;", {"out": np.zeros(1)}, shared=16)


def test_polling_memory_that_nobody_writes_is_found(monkeypatch) -> None:
    """test_wait never parks: a loop around it that nobody ends is a finding, not a hang."""
    monkeypatch.setattr(scheduler, "POLLING_ROUNDS", 1000)
    body = f"""
    {init("0", 2)}
again:
    mbarrier.test_wait.parity.shared::cta.b64 %p10, [0], 0;
    @!%p10 bra again;
"""
    with pytest.raises(Deadlock, match="polls") as caught:
        run(body, {"out": np.zeros(1)}, shared=8)
    assert "2 of 2 arrivals have not come; CTA (0, 0, 0) warps [0] poll at `mbarrier.test_wait" in str(caught.value)


# Warp 1 asks once whether warp 0 has arrived, and goes on in any case.
ASK = f"""
    {init("0", 32)}
    setp.lt.u32 %p1, %r50, 32;
    cvta.shared.u64 %rd2, 0;
    @%p1 bra arrive;
    mbarrier.try_wait.parity.shared::cta.b64 %p10, [0], 0;
    {{after}}
    selp.u32 %r1, 1, 0, %p10;
    st.global.u32 [%rd0], %r1;
    bra done;
arrive:
    nanosleep.u32 100;
    mbarrier.arrive.shared::cta.b64 _, [0];
done:
"""


@pytest.mark.parametrize(
    "after, complete",
    [
        ("", False),
        ("@%p10 bra on; mov.u32 %r2, 0; on:", False),
        ("LOOP: @%p10 bra on; mbarrier.try_wait.parity.shared::cta.b64 %p10, [0], 0; bra LOOP; on:", True),
        ("@%p10 bra on; L: mov.u32 %r2, 0; mbarrier.try_wait.parity.b64 %p10, [%rd2], %r2; @!%p10 bra L; on:", True),
        ("@%p10 bra on; LOOP: mbarrier.try_wait.parity.shared::cta.b64 %p10, [0], 0; @!%p10 bra.uni LOOP; on:", True),
        (
            "LOOP: mov.u32 %r2, 0; @%p10 bra on; mbarrier.test_wait.parity.shared.b64 %p10, [0], %r2; bra LOOP; on:",
            True,
        ),
    ],
)
def test_only_a_loop_waits(after: str, complete: bool) -> None:
    """A try_wait may tell that the phase is not complete yet, at once."""
    out = np.full(1, 9, np.uint32)
    run(ASK.format(after=after), {"out": out}, block=(64, 1, 1), shared=8)
    assert out[0] == complete


@pytest.mark.parametrize(("count", "finds"), [(3, False), (2, True)])
def test_an_arrival_that_must_not_complete(count: int, finds: bool) -> None:
    body = f"""
    {init("0", count)}
    @%p11 mbarrier.arrive.noComplete.shared::cta.b64 %rd5, [0], 2;
"""
    context = pytest.raises(BarrierMismatch, match=".noComplete, and the arrival completes phase 0")
    with context if finds else contextlib.nullcontext():
        run(body, {}, shared=8)


def test_an_arrival_that_drops_out_and_announces_bytes() -> None:
    """The phase needs the bytes, and later phases one arrival less."""
    out = np.zeros(3, np.uint32)
    peek = (
        "mbarrier.test_wait.parity.shared::cta.b64 %p1, [0], {}; selp.u32 %r2, 1, 0, %p1; st.global.u32 [%rd0+{}], %r2;"
    )
    body = f"""
    {init("0", 2)}
    @!%p11 bra done;
    mbarrier.arrive_drop.expect_tx.shared::cta.b64 _, [0], 16;
    mbarrier.arrive.shared::cta.b64 _, [0];
    {peek.format(0, 0)}
    mbarrier.complete_tx.shared::cta.relaxed.cta.b64 [0], 16;
    {peek.format(0, 4)}
    mbarrier.arrive.shared::cta.b64 _, [0];
    {peek.format(1, 8)}
done:
"""
    run(body, {"out": out}, shared=8)
    assert out.tolist() == [0, 1, 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_patience_that_ends_is_no_deadlock(seed) -> None:
    """A poll that gives up after a while, however often it asks, goes on."""
    out = np.zeros(1, np.uint32)
    body = f"""
    {init("0", 2)}
    mov.u32 %r1, 0;
again:
    add.u32 %r1, %r1, 1; setp.eq.u32 %p2, %r1, 700; @%p2 bra tired;
    mbarrier.test_wait.parity.shared::cta.b64 %p10, [0], 0;
    @!%p10 bra again;
tired:
    st.global.u32 [%rd0], %r1;
"""
    run(body, {"out": out}, shared=8, seed=seed)
    assert out[0] == 700
