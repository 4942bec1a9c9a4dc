"""The race detector: each bug it is for, planted in a kernel, and the same kernel without it, in every order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cute_attn.emulator.errors import DataRace, EmulatorError, ExitedCta, MissingProxyFence

from . import harness

SEEDS = (None, 1, 2)


def run(body: str, *, shared: int = 4096, block: int = 64, **options: Any) -> np.ndarray:
    """Runs on one array of 4096 words, %rd0."""
    out = np.zeros(4096, np.uint32)
    harness.run(body, {"out": out}, shared=shared, block=(block, 1, 1), **{"races": True, **options})
    return out


def clean(body: str, **options: Any) -> None:
    """No finding in any order, and always the same results."""
    results = [run(body, seed=seed, **options) for seed in SEEDS]
    assert all((result == results[0]).all() for result in results)


def finds(
    body: str, later: str, earlier: str, missing: str = "", error: type[EmulatorError] = DataRace, **options: Any
) -> None:
    """The finding names both instructions, whatever the order; in another order the two may change places."""
    for seed in SEEDS:
        with pytest.raises(error, match=missing or None if seed is None else None) as caught:
            run(body, seed=seed, **{"uninitialized_shared": "poison", **options})
        names = {caught.value.instruction, caught.value.other}
        assert all(any(wanted in str(name) for name in names) for wanted in (later, earlier)), caught.value
        if seed is None:
            assert later in str(caught.value.instruction) and earlier in str(caught.value.other)


def remove(body: str, line: str) -> str:
    assert body.count(line) == 1
    return body.replace(line, "")


# ---- warps of a CTA

# Every thread stores its number and reads the number that thread 63 - t has stored.
REVERSE = """
    shl.b32 %r1, %r50, 2;
    sub.u32 %r2, 252, %r1;
    st.shared.u32 [%r1], %r51;
    bar.sync 0;
    ld.shared.u32 %r3, [%r2];
    mul.wide.u32 %rd1, %r51, 4;
    add.u64 %rd1, %rd0, %rd1;
    st.global.u32 [%rd1], %r3;
    bar.sync 1;
    st.shared.u32 [%r1], %r3;
"""


def test_read_after_write() -> None:
    clean(REVERSE, grid=(3, 1, 1))
    finds(remove(REVERSE, "bar.sync 0;"), "ld.shared", "st.shared", "no barrier orders them", grid=(3, 1, 1))


def test_write_after_read() -> None:
    finds(remove(REVERSE, "bar.sync 1;"), "st.shared.u32 [%r1], %r3", "ld.shared", "no barrier orders them")


def test_the_finding_says_where() -> None:
    with pytest.raises(DataRace) as caught:
        run(remove(REVERSE, "bar.sync 0;"), grid=(2, 1, 1))
    message = str(caught.value)
    assert "read of shared memory at offset 0xfc of CTA (0, 0, 0), 4 bytes" in message
    assert "its write by warp 1 of CTA (0, 0, 0), `st.shared.u32 [%r1], %r51`" in message
    assert caught.value.thread == (0, 0, 0)


@pytest.mark.parametrize("value, racy", [("%r51", True), ("%r4", False)], ids=["different", "the same"])
def test_write_after_write(value: str, racy: bool) -> None:
    """Both warps store to the same words, in one instruction; the same value is no race."""
    body = f"and.b32 %r4, %r50, 31; shl.b32 %r1, %r4, 2; st.shared.u32 [%r1], {value};"
    if racy:
        finds(body, "st.shared", "st.shared", "no barrier orders them")
    else:
        clean(body)


def test_write_after_write_of_different_instructions() -> None:
    body = """
    and.b32 %r4, %r50, 31; shl.b32 %r1, %r4, 2; setp.lt.u32 %p1, %r50, 32;
    @%p1 st.shared.u32 [%r1], %r50;
    bar.sync 0;
    @!%p1 st.shared.u32 [%r1], %r50;
    """
    clean(body)
    finds(remove(body, "bar.sync 0;"), "@!%p1 st.shared", "@%p1 st.shared")


def test_lanes_of_a_warp_are_not_told_apart() -> None:
    clean(remove(remove(REVERSE, "bar.sync 0;"), "bar.sync 1;").replace("252", "124"), block=32)


@pytest.mark.parametrize("kind, size", [("u8", 1), ("b16", 2), ("b32", 4), ("b64", 8)])
def test_neighbouring_words_of_other_warps_are_no_race(kind: str, size: int) -> None:
    """Odd elements belong to warp 1, even ones to warp 0."""
    body = f"""
    shl.b32 %r1, %r50, 1; shr.u32 %r2, %r50, 5; and.b32 %r3, %r1, 63; add.u32 %r3, %r3, %r2;
    mul.lo.u32 %r4, %r3, {size};
    cvt.u16.u32 %h1, %r50; cvt.u64.u32 %rd1, %r50; mov.b32 %r5, %r50;
    st.shared.{kind} [%r4], {"%h1" if size < 4 else "%rd1" if size == 8 else "%r5"};
    ld.shared.{kind} {"%h2" if size < 4 else "%rd2" if size == 8 else "%r6"}, [%r4];
    """
    clean(body)
    finds(body.replace("add.u32 %r3, %r3, %r2;", ""), "st.shared", "st.shared")


def test_a_wide_read_of_narrow_writes() -> None:
    body = """
    shl.b32 %r1, %r50, 1; cvt.u16.u32 %h1, %r50; st.shared.u16 [%r1], %h1;
    bar.sync 0;
    and.b32 %r2, %r50, 7; shl.b32 %r2, %r2, 4;
    ld.shared.v4.u32 {%r3, %r4, %r5, %r6}, [%r2];
    """
    clean(body)
    finds(remove(body, "bar.sync 0;"), "ld.shared.v4", "st.shared.u16")


MATRICES = """
    shl.b32 %r1, %r50, 4; and.b32 %r2, %r1, 511; mov.u32 %r3, 1;
    st.shared.v4.u32 [%r1], {%r50, %r50, %r3, %r3};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r2];
    bar.sync 1;
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%r4, %r5, %r6, %r7};
"""


def test_matrices() -> None:
    clean(MATRICES)
    finds(remove(MATRICES, "bar.sync 0;"), "ldmatrix", "st.shared")
    finds(remove(MATRICES, "bar.sync 1;"), "stmatrix", "ldmatrix")


def test_matrices_that_all_warps_load_for_mma() -> None:
    """Such loads are done once for all warps of a CTA; every warp is still a reader, the last one too."""
    body = MATRICES.replace("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%r4, %r5, %r6, %r7};", "").replace(
        "bar.sync 1;",
        """
    mov.u32 %r10, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r10, %r11, %r12, %r13}, {%r4, %r5, %r6, %r7}, {%r4, %r5},
        {%r14, %r15, %r16, %r17};
    setp.ge.u32 %p1, %r50, 32; @%p1 bra end;
    bar.sync 1, 32;
    st.shared.u32 [0], %r3;
end:
    """,
    )
    for n in range(14, 18):
        body = f"mov.u32 %r{n}, 0;" + body
    finds(body, "st.shared.u32 [0]", "ldmatrix", "its read by warp 1", block=96)
    clean(body.replace("bar.sync 1, 32;", "").replace("setp.ge", "bar.sync 1; setp.ge"), block=96)


# ---- named barriers

# Warp 0 fills a buffer, warp 1 reads it, round after round.
PRODUCER_CONSUMER = """
    and.b32 %r1, %r50, 31; shl.b32 %r1, %r1, 2; mov.u32 %r2, 0; setp.ge.u32 %p1, %r50, 32;
    @%p1 bra CONSUMER;
PRODUCER:
    {wait_empty}
    st.shared.u32 [%r1], %r2;
    {signal_full}
    add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, 4; @%p2 bra PRODUCER;
    bra DONE;
CONSUMER:
    bar.arrive 2, 64;
LOOP:
    bar.sync 1, 64;
    ld.shared.u32 %r3, [%r1];
    add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, 4; @!%p2 bra DONE;
    {signal_empty}
    bra LOOP;
DONE:
"""
NAMED = {"wait_empty": "bar.sync 2, 64;", "signal_full": "bar.arrive 1, 64;", "signal_empty": "bar.arrive 2, 64;"}


def test_producer_and_consumer_at_named_barriers() -> None:
    clean(PRODUCER_CONSUMER.format(**NAMED))


def test_an_arrival_before_the_read_lets_the_producer_write_too_early() -> None:
    body = PRODUCER_CONSUMER.format(**NAMED)
    early = body.replace("    ld.shared.u32 %r3, [%r1];\n", "").replace(
        "bra LOOP;", "ld.shared.u32 %r3, [%r1];\n bra LOOP;"
    )
    for seed in SEEDS:
        with pytest.raises(DataRace) as caught:
            run(early, seed=seed)
        assert {"st.shared", "ld.shared"} == {str(s)[:9] for s in (caught.value.instruction, caught.value.other)}


# ---- cp.async

COPY = """
    shl.b32 %r1, %r50, 4; xor.b32 %r2, %r1, 512; mul.wide.u32 %rd1, %r50, 16; add.u64 %rd1, %rd1, %rd0;
    cp.async.cg.shared.global [%r1], [%rd1], 16;
    cp.async.commit_group;
    cp.async.cg.shared.global [%r1+1024], [%rd1], 16;
    cp.async.commit_group;
    cp.async.wait_group 1;
    bar.sync 0;
    ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r2];
    cp.async.wait_group 0;
    ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r1+1024];
"""


def test_copies_of_the_thread() -> None:
    clean(COPY)
    finds(
        remove(COPY, "cp.async.wait_group 1;"),
        "[%r2]",
        "cp.async.cg.shared.global [%r1], ",
        "cp.async.wait_group by the issuing warp, followed by a barrier, is missing",
    )
    finds(remove(COPY, "bar.sync 0;"), "[%r2]", "cp.async.cg.shared.global [%r1], ", "no barrier orders this after its")
    finds(
        COPY.replace("wait_group 0", "wait_group 1"),
        "[%r1+1024]",
        "cp.async.cg.shared.global [%r1+1024], ",
        "cp.async.wait_group is missing, or lets too many groups be in flight",
    )


def test_a_copy_after_the_last_commit_is_in_no_group() -> None:
    body = COPY.replace("cp.async.commit_group;\n    cp.async.wait_group 1;", "cp.async.wait_group 0;")
    finds(body, "[%r1+1024]", "cp.async.cg.shared.global [%r1+1024]")
    clean(body.replace("wait_group 0;\n    ld", "wait_all;\n    ld"))


def test_a_copy_over_what_is_still_read() -> None:
    again = """
    bar.sync 1;
    cp.async.cg.shared.global [%r1], [%rd1], 16;
    """
    clean(COPY + again)
    finds(COPY + remove(again, "bar.sync 1;"), "cp.async", "ld.shared")


# ---- mbarriers

# Warp 0 fills two stages in turn, warps 1 and 2 read them; mbarriers at [0], [8] full and [16], [24] empty.
RING = """
    setp.eq.u32 %p1, %r50, 0;
    @%p1 mbarrier.init.shared.b64 [0], {producers};
    @%p1 mbarrier.init.shared.b64 [8], {producers};
    @%p1 mbarrier.init.shared.b64 [16], 2;
    @%p1 mbarrier.init.shared.b64 [24], 2;
    @%p1 fence.mbarrier_init.release.cluster;
    bar.sync 0;
    and.b32 %r1, %r50, 31; shl.b32 %r2, %r1, 4; add.u32 %r2, %r2, 64;
    mov.u32 %r3, 0; setp.lt.u32 %p2, %r50, 32; setp.eq.u32 %p3, %r1, 0;
    @!%p2 bra CONSUMER;
PRODUCER:
    shr.u32 %r4, %r3, 1; and.b32 %r4, %r4, 1; xor.b32 %r5, %r4, 1;
    and.b32 %r6, %r3, 1; shl.b32 %r7, %r6, 3; mad.lo.u32 %r8, %r6, 512, %r2;
EMPTY:
    mbarrier.try_wait.parity.shared.b64 %p4, [%r7+16], %r5;
    @!%p4 bra EMPTY;
    {fill}
    add.u32 %r3, %r3, 1; setp.lt.u32 %p5, %r3, 6; @%p5 bra PRODUCER;
    bra DONE;
CONSUMER:
    shr.u32 %r4, %r3, 1; and.b32 %r4, %r4, 1;
    and.b32 %r6, %r3, 1; shl.b32 %r7, %r6, 3; mad.lo.u32 %r8, %r6, 512, %r2;
FULL:
    mbarrier.try_wait.parity.shared.b64 %p4, [%r7], %r4;
    @!%p4 bra FULL;
    ld.shared.u32 %r9, [%r8];
    @%p3 mbarrier.arrive.shared.b64 _, [%r7+16];
    add.u32 %r3, %r3, 1; setp.lt.u32 %p5, %r3, 6; @%p5 bra CONSUMER;
DONE:
"""
STORE = "st.shared.v4.u32 [%r8], {%r3, %r3, %r3, %r3}; mbarrier.arrive.shared.b64 _, [%r7];"
COPY_LATER = """
    cp.async.cg.shared.global [%r8], [%rd0], 16;
    cp.async.mbarrier.arrive.noinc.shared.b64 [%r7];
"""
BULK = """
    @%p3 mbarrier.arrive.expect_tx.shared.b64 _, [%r7], 512;
    @%p3 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r8], [%rd0], 512, [%r7];
"""
FILLS = {"stores": (STORE, 32), "cp.async": (COPY_LATER, 32), "bulk": (BULK, 1)}


@pytest.mark.parametrize("fill", FILLS)
def test_a_ring_of_stages(fill: str) -> None:
    """Consumers wait for full stages, the producer for empty ones: both waits are needed."""
    code, producers = FILLS[fill]
    body = RING.format(fill=code, producers=producers)
    options = {"block": 96, "shared": 2048, "grid": (2, 1, 1)}
    clean(body, **options)
    write = code.split()[0] if fill == "stores" else "cp.async"
    # Without the wait the consumers may be too early, or find the fill of one round not ordered after the last.
    too_early = body.replace("@!%p4 bra FULL;", "").replace("mbarrier.try_wait.parity.shared.b64 %p4, [%r7], %r4;", "")
    for seed in SEEDS:
        with pytest.raises(DataRace) as caught:
            run(too_early, seed=seed, uninitialized_shared="poison", **options)
        assert write in f"{caught.value.instruction} {caught.value.other}"
    wait = "mbarrier.try_wait.parity.shared.b64 %p4, [%r7+16], %r5;\n    @!%p4 bra EMPTY;"
    for seed in SEEDS:
        with pytest.raises(EmulatorError) as found:
            run(remove(body, wait), seed=seed, **options)
        if seed is None:
            assert isinstance(found.value, DataRace) or "arrivals" in str(found.value) or "bytes" in str(found.value)


def test_release_before_the_read() -> None:
    """The consumer gives the stage back, and then reads it."""
    lines = "    ld.shared.u32 %r9, [%r8];\n    @%p3 mbarrier.arrive.shared.b64 _, [%r7+16];\n"
    swapped = "\n".join(reversed(lines.splitlines())) + "\n"
    for code, producers in FILLS.values():
        body = RING.format(fill=code, producers=producers)
        for seed in SEEDS:
            with pytest.raises(DataRace):
                run(body.replace(lines, swapped), seed=seed, block=96, shared=2048)


# Warps 0 and 1 write and arrive, warp 2 waits and reads; {also} is done by warp 1 after its write.
ARRIVALS = """
    setp.eq.u32 %p1, %r50, 0; shl.b32 %r1, %r50, 2; shr.u32 %r2, %r50, 5; mov.u32 %r3, 8;
    @%p1 mbarrier.init.shared.b64 [0], {count};
    bar.sync 0;
    setp.ge.u32 %p2, %r50, 64; @%p2 bra READ; setp.ge.u32 %p3, %r50, 32; setp.eq.u32 %p4, %r50, 32;
    setp.le.u32 %p6, %r50, 32;
    st.shared.u32 [%r1+64], %r50;
    {arrive}
    bra DONE;
READ:
    mbarrier.try_wait.parity.shared.b64 %p5, [0], 0; @!%p5 bra READ;
    ld.shared.u32 %r4, [%r1+{read}];
DONE:
"""


def test_an_arrival_that_is_not_counted_passes_nothing_on() -> None:
    """The phase is complete when one of the warps has come; the other may have to write yet."""
    options = {"block": 96}
    arrive = "mbarrier.arrive.shared.b64 _, [0];"
    for offset in (-256 + 64, -128 + 64):
        clean(ARRIVALS.format(count=64, arrive=arrive, read=offset), **options)
    early = ARRIVALS.format(count=32, arrive="@%p6 mbarrier.arrive.shared.b64 _, [0];", read=-128 + 64)
    with pytest.raises(DataRace, match="its write by warp 1"):
        run(early, **options)


def test_announced_bytes_pass_nothing_on() -> None:
    """mbarrier.expect_tx is relaxed: what warp 1 has written before it is not there when warp 0's arrival is."""
    options = {"block": 96}
    arrive = """
    @%p4 mbarrier.expect_tx.relaxed.cta.shared.b64 [0], 16; @%p4 mbarrier.complete_tx.shared.b64 [0], 16;
    @!%p3 mbarrier.arrive.shared.b64 _, [0];
    """
    clean(ARRIVALS.format(count=32, arrive=arrive, read=-256 + 64), **options)
    finds(ARRIVALS.format(count=32, arrive=arrive, read=-128 + 64), "ld.shared", "st.shared", **options)


def test_a_relaxed_arrival_passes_nothing_on() -> None:
    body = RING.format(fill=STORE.replace("arrive.shared", "arrive.relaxed.cta.shared"), producers=32)
    finds(body, "ld.shared", "st.shared", block=96, shared=2048)
    clean(body.replace("mbarrier.arrive.relaxed", "fence.acq_rel.cta; mbarrier.arrive.relaxed"), block=96, shared=2048)


INIT = """
    setp.eq.u32 %p1, %r50, 0; setp.eq.u32 %p2, %r50, 32;
    @%p1 mbarrier.init.shared.b64 [0], 1;
    fence.mbarrier_init.release.cluster;
    bar.sync 0;
    @%p2 mbarrier.arrive.expect_tx.shared.b64 _, [0], 64;
    @%p2 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [64], [%rd0], 64, [0];
WAIT:
    mbarrier.try_wait.parity.shared.b64 %p3, [0], 0;
    @!%p3 bra WAIT;
"""


def test_initialisation_of_an_mbarrier() -> None:
    clean(INIT)
    with pytest.raises(DataRace, match="operation on the mbarrier.* races with its init"):
        run(remove(INIT, "bar.sync 0;"))
    finds(
        remove(INIT, "fence.mbarrier_init.release.cluster;"),
        "cp.async.bulk",
        "mbarrier.init",
        "no fence.mbarrier_init",
        MissingProxyFence,
    )
    clean(INIT.replace("fence.mbarrier_init.release.cluster;", "fence.proxy.async.shared::cta;"))


def test_a_bulk_load_that_nobody_waits_for() -> None:
    body = INIT + "ld.shared.u32 %r1, [64];"
    clean(body)
    without = body.replace("@!%p3 bra WAIT;", "").replace("mbarrier.try_wait.parity.shared.b64 %p3, [0], 0;", "")
    finds(
        without,
        "ld.shared",
        "cp.async.bulk",
        "a copy that reports to the mbarrier at 0x0 .* no wait for that phase",
    )


# ---- the async proxy

BULK_STORE = """
    shl.b32 %r1, %r50, 2; setp.eq.u32 %p1, %r50, 0;
    st.shared.u32 [%r1], %r50;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd0], [0], 256;
    @%p1 cp.async.bulk.commit_group;
    @%p1 cp.async.bulk.wait_group.read 0;
    bar.sync 1;
    st.shared.u32 [%r1], %r1;
"""


def test_bulk_store() -> None:
    clean(BULK_STORE)
    finds(
        remove(BULK_STORE, "fence.proxy.async.shared::cta;"),
        "cp.async.bulk",
        "st.shared",
        "no fence.proxy.async lies between",
        MissingProxyFence,
    )
    finds(
        BULK_STORE.replace("fence.proxy.async.shared::cta;", "fence.proxy.async.global;"),
        "cp.async.bulk",
        "st.shared",
        error=MissingProxyFence,
    )
    finds(remove(BULK_STORE, "bar.sync 0;"), "cp.async.bulk", "st.shared", "no barrier orders them")
    finds(
        remove(BULK_STORE, "@%p1 cp.async.bulk.wait_group.read 0;"),
        "st.shared.u32 [%r1], %r1",
        "cp.async.bulk.global",
        "cp.async.bulk.wait_group is missing",
    )
    finds(
        remove(BULK_STORE, "bar.sync 1;"),
        "st.shared.u32 [%r1], %r1",
        "cp.async.bulk.global",
        "no barrier orders this after its cp.async.bulk.wait_group",
    )


def test_the_fence_may_come_later_on_the_path() -> None:
    """By the thread that issues the copy, after the barrier; but not before the write."""
    late = remove(BULK_STORE, "fence.proxy.async.shared::cta;").replace("bar.sync 0;", "bar.sync 0; fence.proxy.async;")
    clean(late)
    early = "fence.proxy.async;" + remove(BULK_STORE, "fence.proxy.async.shared::cta;")
    finds(early, "cp.async.bulk", "st.shared", error=MissingProxyFence)


# ---- wgmma

# 64x16 times 16x8, unswizzled: A at 0, B at 2048. Warps 0 to 3 multiply, warp 4 refills B.
WGMMA = """
    .reg .f32 %f<4>; .reg .b64 %a; .reg .b64 %b;
    mov.b32 %f0, 0; mov.b32 %f1, 0; mov.b32 %f2, 0; mov.b32 %f3, 0;
    mov.u32 %r2, 0; setp.ge.u32 %p1, %r50, 128;
    shl.b32 %r1, %r50, 4; and.b32 %r3, %r50, 15; shl.b32 %r3, %r3, 4;
    @!%p1 st.shared.v4.u32 [%r1], {%r2, %r2, %r2, %r2};
    @%p1 st.shared.v4.u32 [%r3+2048], {%r2, %r2, %r2, %r2};
    fence.proxy.async;
    bar.sync 0;
    @%p1 bra PRODUCER;
    mov.b64 %a, 0x0000001000080000; mov.b64 %b, 0x0000000800080080;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, %a, %b, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    st.shared.v4.u32 [%r1], {%r2, %r2, %r2, %r2};
    bar.arrive 1, 160;
    bra DONE;
PRODUCER:
    bar.sync 1, 160;
    st.shared.v4.u32 [%r3+2048], {%r2, %r2, %r2, %r2};
DONE:
"""


def test_wgmma() -> None:
    clean(WGMMA, block=160)
    finds(
        remove(WGMMA, "fence.proxy.async;"),
        "wgmma.mma_async",
        "st.shared",
        "no fence.proxy.async lies between",
        MissingProxyFence,
        block=160,
    )
    finds(remove(WGMMA, "bar.sync 0;"), "wgmma.mma_async", "st.shared", block=160)


# How the warps of a warpgroup wait for what they have copied; an mbarrier at [2560].
COPY_WAITS = {
    "wait_group": "cp.async.commit_group; cp.async.wait_group 0;",
    "wait_all": "cp.async.wait_all;",
    "mbarrier": """
    @%p1 bra WAITED;
    cp.async.mbarrier.arrive.noinc.shared.b64 [2560];
WAIT:
    mbarrier.try_wait.parity.shared.b64 %p3, [2560], 0;
    @!%p3 bra WAIT;
WAITED:
    """,
}


@pytest.mark.parametrize("wait", COPY_WAITS)
def test_wgmma_of_what_cp_async_has_copied(wait: str) -> None:
    """cp.async writes through the generic proxy: to have waited for it is not enough, nor is a fence before the wait.

    As WGMMA, but A is copied; warp 4 has a fence of its own for B.
    """
    fence, store = "fence.proxy.async;", "@!%p1 st.shared.v4.u32 [%r1], {%r2, %r2, %r2, %r2};\n"
    copy = """
    @%p1 fence.proxy.async;
    setp.eq.u32 %p2, %r50, 0; @%p2 mbarrier.init.shared.b64 [2560], 128; bar.sync 3;
    mul.wide.u32 %rd1, %r50, 16; add.u64 %rd1, %rd1, %rd0;
    @!%p1 cp.async.cg.shared.global [%r1], [%rd1], 16;
    """

    def body(after: str = "", before: str = "", barrier: str = "bar.sync 0;") -> str:
        copied = remove(WGMMA, store).replace(fence, f"{copy} {before} {COPY_WAITS[wait]} {after}")
        return copied.replace("bar.sync 0;", barrier)

    clean(body(after=fence), block=160)
    clean(body(barrier=f"bar.sync 0; {fence}"), block=160)
    for unfenced in (body(), body(before=fence)):
        finds(
            unfenced,
            "wgmma.mma_async",
            "cp.async.cg",
            "a copy of warp 0 .*no fence.proxy.async lies between",
            MissingProxyFence,
            block=160,
        )


def test_operands_of_a_wgmma_that_nobody_has_waited_for() -> None:
    wait, overwrite = (
        "wgmma.wait_group.sync.aligned 0;",
        "st.shared.v4.u32 [%r1], {%r2, %r2, %r2, %r2};\n    bar.arrive",
    )
    finds(
        remove(WGMMA, wait).replace("bra DONE;", wait + "bra DONE;"),
        "st.shared.v4.u32 [%r1]",
        "wgmma.mma_async",
        "wgmma.wait_group is missing",
        block=160,
    )
    # The stage is given back before the wait: the producer's write races, in whatever order they are stepped.
    early = remove(WGMMA, wait).replace(overwrite, "bar.arrive").replace("bra DONE;", wait + "bra DONE;")
    finds(
        early,
        "st.shared.v4.u32 [%r3+2048]",
        "wgmma.mma_async",
        "no barrier orders this after its wgmma.wait_group|wgmma.wait_group by the issuing warp",
        block=160,
    )


def test_each_warp_may_write_its_own_rows_of_a() -> None:
    """Warp w reads rows 16w to 16w + 15 of A only: no barrier among the warps is needed for them, but for B."""
    # Thread t writes 16 bytes of row t % 8 of core matrix t / 8; those of rows 16w to 16w + 15 are warp w's.
    store = "st.shared.v4.u32 [%r1], {%r2, %r2, %r2, %r50}; fence.proxy.async; wgmma.fence"
    clean(WGMMA.replace("wgmma.fence", store), block=160)
    others = store.replace("[%r1]", "[%r1+128]")
    finds(WGMMA.replace("wgmma.fence", others), "wgmma.mma_async", "st.shared", "no barrier", block=160)


# ---- clusters

EXCHANGE = """
    mov.u32 %r9, %cluster_ctarank; xor.b32 %r9, %r9, 1;
    shl.b32 %r1, %r50, 2; mapa.shared::cluster.u32 %r2, %r1, %r9;
    st.shared.u32 [%r1], %r51;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    ld.shared::cluster.u32 %r3, [%r2];
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
    st.shared.u32 [%r1], %r3;
"""
CLUSTER = {"grid": (4, 1, 1), "cluster": (2, 1, 1)}


def test_distributed_shared_memory() -> None:
    clean(EXCHANGE, **CLUSTER)
    arrive = "barrier.cluster.arrive.aligned;\n    barrier.cluster.wait.aligned;"
    finds(remove(EXCHANGE, arrive), "ld.shared::cluster", "st.shared", **CLUSTER)
    finds(EXCHANGE.replace(arrive, "bar.sync 0;"), "ld.shared::cluster", "st.shared", **CLUSTER)
    late = "barrier.cluster.arrive.release.aligned;\n    barrier.cluster.wait.acquire.aligned;"
    body = EXCHANGE.replace(late, "bar.sync 0;") + "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    finds(body, "st.shared.u32 [%r1], %r3", "ld.shared::cluster", **CLUSTER)


def test_a_relaxed_arrival_at_the_clusters_barrier() -> None:
    relaxed = EXCHANGE.replace("arrive.aligned", "arrive.relaxed.aligned")
    finds(relaxed, "ld.shared::cluster", "st.shared", **CLUSTER)
    clean(
        relaxed.replace("barrier.cluster.arrive.relaxed", "fence.acq_rel.cluster; barrier.cluster.arrive.relaxed"),
        **CLUSTER,
    )


# ---- exits


def test_a_cta_that_may_exit_before_others_are_done_with_its_memory() -> None:
    """Whatever the order; a barrier of the cluster at the end is what it takes, or a wait for the last arrival."""
    start = """
    setp.eq.u32 %p1, %r50, 0; mov.u32 %r1, %cluster_ctarank; xor.b32 %r1, %r1, 1; mapa.shared::cluster.u32 %r2, 0, %r1;
    @%p1 mbarrier.init.shared.b64 [0], 1; @%p1 st.shared.u32 [8], %r50;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    """
    wait = "WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [0], 0; @!%p2 bra WAIT;"
    both = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    arrive = "@%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2];"
    for visit in (
        "@%p1 ld.shared::cluster.u32 %r3, [%r2+8];",
        "@%p1 red.shared::cluster.add.u32 [%r2+8], %r50;",
        arrive,
    ):
        clean(start + visit + both, **CLUSTER)
        if visit != arrive:
            clean(start + visit + arrive + wait, **CLUSTER)
        for seed in SEEDS:
            with pytest.raises(ExitedCta) as caught:
                run(start + visit, seed=seed, **CLUSTER)
            assert caught.value.instruction == visit.rstrip(";")
    clean(start + arrive + wait, **CLUSTER)


# Each CTA sends 256 bytes to the other one, whose mbarrier at [0] counts them, and reads what it has got.
SEND = """
    mov.u32 %r9, %cluster_ctarank; xor.b32 %r9, %r9, 1; setp.eq.u32 %p1, %r50, 0; mov.u32 %r8, 0;
    @%p1 mbarrier.init.shared.b64 [0], 1;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [0], 256;
    shl.b32 %r1, %r50, 2; add.u32 %r2, %r1, 512; add.u32 %r1, %r1, 64;
    st.shared.u32 [%r1], %r51;
    fence.proxy.async;
    mapa.shared::cluster.u32 %r3, %r2, %r9; mapa.shared::cluster.u32 %r4, %r8, %r9;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    {send}
WAIT:
    mbarrier.try_wait.parity.shared.b64 %p2, [0], 0;
    @!%p2 bra WAIT;
    ld.shared.u32 %r5, [%r2];
    {before_reuse}
    st.shared.u32 [%r1], %r5;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
"""
SENDS = {
    "st.async": "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r3], %r51, [%r4];",
    "cp.async.bulk": """
    @%p1 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r3], [%r1], 256, [%r4];
    """,
}
BARRIER = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"


@pytest.mark.parametrize("send", SENDS)
def test_blocks_sent_to_another_cta(send: str) -> None:
    """The source of a bulk copy may be written again when its receiver knows that it has arrived, and says so."""
    body = SEND.format(send=SENDS[send], before_reuse=BARRIER)
    clean(body, **CLUSTER)
    read = "ld.shared.u32 %r5, [%r2];"
    early = remove(body, read).replace("WAIT:", f"{read} WAIT:")
    finds(
        early,
        "ld.shared",
        send,
        "a copy that reports to the mbarrier at 0x0 .*no wait for that phase",
        **CLUSTER,
    )
    careless = SEND.format(send=SENDS[send], before_reuse="")
    if send == "st.async":
        clean(careless, **CLUSTER)  # its source are registers
    else:
        finds(careless, "st.shared.u32 [%r1], %r5", "cp.async.bulk", "no wait for that phase", **CLUSTER)


def test_more_mbarriers_than_instructions_that_initialise_them() -> None:
    """24 barriers, by a loop; the thread that arrives is of another warp."""
    body = """
    setp.ne.u32 %p1, %r50, 0; setp.ne.u32 %p2, %r50, 32; mov.u32 %r1, 0; mov.u32 %r2, 0;
    @%p1 bra INITIALISED;
INIT:
    mbarrier.init.shared.b64 [%r1], 1;
    add.u32 %r1, %r1, 8; setp.lt.u32 %p3, %r1, 192; @%p3 bra INIT;
INITIALISED:
    bar.sync 0;
    @%p2 bra WAIT;
    st.shared.u32 [192], %r50;
ARRIVE:
    mbarrier.arrive.shared.b64 _, [%r2];
    add.u32 %r2, %r2, 8; setp.lt.u32 %p3, %r2, 192; @%p3 bra ARRIVE;
WAIT:
    mbarrier.try_wait.parity.shared.b64 %p4, [184], 0;
    @!%p4 bra WAIT;
    ld.shared.u32 %r3, [192];
    """
    clean(body)
    finds(
        body.replace("mbarrier.try_wait.parity.shared.b64 %p4, [184], 0;\n    @!%p4 bra WAIT;", ""),
        "ld.shared",
        "st.shared",
    )


def test_a_tensor_map_that_another_warp_changes() -> None:
    body = """
    setp.lt.u32 %p1, %r50, 32; setp.eq.u32 %p3, %r50, 0; mov.u32 %r2, 0;
    add.u64 %rd1, %rd0, 127; and.b64 %rd1, %rd1, -128;
    shl.b32 %r1, %r50, 2; @%p1 st.shared.u32 [%r1], %r2;
    bar.sync 1;
    @%p3 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [0], 0, 64;
    bar.sync 0;
    @%p1 bra DONE;
    tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%rd1], [0], 128;
DONE:
    """
    for seed in SEEDS:
        run(body, seed=seed, target="sm_90a")  # where the map goes depends on where the array lies
    finds(remove(body, "bar.sync 0;"), "tensormap.cp_fenceproxy", "tensormap.replace", target="sm_90a")


# ---- atomics and flags


def test_atomics_race_with_other_accesses_only() -> None:
    body = """
    mov.u32 %r1, 0; and.b32 %r2, %r50, 15; shl.b32 %r2, %r2, 2; setp.lt.u32 %p1, %r50, 16;
    @%p1 st.shared.u32 [%r2], %r1;
    bar.sync 0;
    red.shared.add.u32 [%r2], 1;
    bar.sync 1;
    ld.shared.u32 %r3, [%r2];
    """
    clean(body)
    finds(remove(body, "bar.sync 1;"), "ld.shared", "red.shared")
    finds(remove(body, "bar.sync 0;"), "red.shared", "st.shared")


# Warp 1 polls a flag that warp 0 sets after it has written the data.
FLAG = """
    mov.u32 %r1, 1; mov.u32 %r2, 0; setp.eq.u32 %p1, %r50, 0; setp.ge.u32 %p2, %r50, 32;
    @%p1 st.shared.u32 [0], %r2;
    bar.sync 0;
    @%p2 bra POLL;
    @%p1 st.shared.u32 [16], %r1;
    @%p1 st.release.cta.shared.u32 [0], %r1;
    bra DONE;
POLL:
    ld.acquire.cta.shared.u32 %r3, [0];
    setp.eq.u32 %p3, %r3, 0; @%p3 bra POLL;
    ld.shared.u32 %r4, [16];
DONE:
"""


def test_release_and_acquire_of_a_flag() -> None:
    clean(FLAG)
    relaxed = FLAG.replace("st.release", "st.relaxed").replace("ld.acquire", "ld.relaxed")
    for body in (FLAG.replace("st.release", "st.relaxed"), FLAG.replace("ld.acquire", "ld.relaxed"), relaxed):
        finds(body, "ld.shared.u32 %r4", "st.shared.u32 [16]")
    fenced = relaxed.replace("@%p1 st.relaxed", "fence.acq_rel.cta; @%p1 st.relaxed").replace(
        "ld.shared.u32 %r4", "fence.acq_rel.cta; ld.shared.u32 %r4"
    )
    clean(fenced)


def test_off() -> None:
    run(remove(REVERSE, "bar.sync 0;"), races=False)
