"""Clusters: ranks, shared memory of other CTAs, remote arrivals, the cluster's barrier."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from cute_attn.emulator.errors import BarrierMismatch, Deadlock, DivergentWarp, ExitedCta, InvalidLaunch, OutOfBounds

from .harness import run
from .test_mbarrier import SEEDS, wait

BARRIER = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"


def test_ranks_and_ids() -> None:
    """Grid (4, 4, 1), clusters of (2, 2, 1)."""
    out = np.zeros((4, 4, 8), np.uint32)
    names = ["ctarank", "nctarank", "ctaid.x", "ctaid.y", "nctaid.x"]
    body = """
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mad.lo.u32 %r3, %r2, 4, %r1;
    mad.wide.u32 %rd1, %r3, 32, %rd0;
"""
    for n, name in enumerate(names):
        body += f"mov.u32 %r4, %cluster_{name}; st.global.u32 [%rd1+{4 * n}], %r4;\n"
    body += "mov.u32 %r4, %clusterid.x; st.global.u32 [%rd1+20], %r4;\n"
    body += "mov.u32 %r4, %nclusterid.y; st.global.u32 [%rd1+24], %r4;\n"
    body += "mov.u32 %r4, %is_explicit_cluster; st.global.u32 [%rd1+28], %r4;\n"
    run(body, {"out": out}, grid=(4, 4, 1), cluster=(2, 2, 1), seed=5)
    y, x = np.mgrid[:4, :4]
    columns = [x % 2 + 2 * (y % 2), 4 + 0 * x, x % 2, y % 2, 2 + 0 * x, x // 2, 2 + 0 * x, 1 + 0 * x]
    assert (out == np.stack(columns, -1)).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("generic", [False, True])
def test_every_cta_reads_its_neighbour_and_is_kept_alive_by_the_barrier(seed, generic) -> None:
    out = np.zeros((6, 32), np.uint32)
    space, address = ("", "%rd3") if generic else (".shared::cluster", "%r8")
    mapped = (
        "cvt.u64.u32 %rd1, %r2; cvta.shared.u64 %rd2, %rd1; mapa.u64 %rd3, %rd2, %r6;"
        if generic
        else "mapa.shared::cluster.u32 %r8, %r2, %r6;"
    )
    body = f"""
    mov.u32 %r1, %cluster_ctarank;
    mov.u32 %r9, %ctaid.x;
    shl.b32 %r2, %r50, 2;
    mad.lo.u32 %r3, %r9, 1000, %r50;
    st.shared.u32 [%r2], %r3;
    {BARRIER}
    add.u32 %r5, %r1, 1;
    rem.u32 %r6, %r5, 3;
    {mapped}
    ld{space}.u32 %r4, [{address}];
    mad.wide.u32 %rd5, %r51, 4, %rd0;
    st.global.u32 [%rd5], %r4;
    {BARRIER}
"""
    run(body, {"out": out}, grid=(6, 1, 1), cluster=(3, 1, 1), shared=128, seed=seed)
    cta = np.arange(6)
    neighbour = cta // 3 * 3 + (cta + 1) % 3
    assert (out == 1000 * neighbour[:, None] + np.arange(32)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_remote_stores_and_arrivals(seed) -> None:
    """Each CTA stores into CTA 0 of its cluster and arrives at its mbarrier; CTA 0 waits and copies out."""
    out = np.zeros((2, 2, 32), np.uint32)
    body = f"""
    mov.u32 %r1, %cluster_ctarank;
    mov.u32 %r9, %clusterid.x;
    setp.eq.u32 %p11, %r50, 0;
    @%p11 mbarrier.init.shared::cta.b64 [0], 64;
    {BARRIER}
    shl.b32 %r2, %r50, 2;
    mad.lo.u32 %r3, %r1, 128, %r2;
    mapa.shared::cluster.u32 %r4, %r3, 0;
    mad.lo.u32 %r5, %r1, 100, %r50;
    st.shared::cluster.u32 [%r4+64], %r5;
    mov.u32 %r6, 0;
    mapa.shared::cluster.u32 %r7, %r6, 0;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r7];
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra done;
    {wait("0", "0", "again")}
    ld.shared.u32 %r10, [%r2+64];
    ld.shared.u32 %r11, [%r2+192];
    mad.lo.u32 %r12, %r9, 64, %r50;
    mad.wide.u32 %rd1, %r12, 4, %rd0;
    st.global.u32 [%rd1], %r10;
    st.global.u32 [%rd1+128], %r11;
done:
"""
    run(body, {"out": out}, grid=(4, 1, 1), cluster=(2, 1, 1), shared=320, seed=seed)
    assert (out == 100 * np.arange(2)[:, None] + np.arange(32)).all()


def test_a_rank_outside_the_cluster() -> None:
    """Its address may be computed (programs do so in all lanes), and not be used."""
    body = "mapa.shared::cluster.u32 %r1, 0, %r50; {guard} st.shared::cluster.u32 [%r1], %r50;" + BARRIER
    options = {"arrays": {"out": np.zeros(1)}, "grid": (2, 1, 1), "cluster": (2, 1, 1), "shared": 16}
    run(body.format(guard="setp.lt.u32 %p1, %r50, 2; @%p1"), **options)
    with pytest.raises(OutOfBounds, match="rank 2: the cluster has 2"):
        run(body.format(guard="setp.lt.u32 %p1, %r50, 3; @%p1"), **options)


@pytest.mark.parametrize("barrier, finds", [(BARRIER, False), ("", True)])
def test_shared_memory_of_a_cta_that_has_exited(barrier, finds) -> None:
    """CTA 0 leaves while CTA 1 still reads its memory, unless it waits for CTA 1 first."""
    body = f"""
    mov.u32 %r1, %cluster_ctarank;
    shl.b32 %r2, %r50, 2;
    st.shared.u32 [%r2], %r50;
    {BARRIER}
    setp.eq.u32 %p1, %r1, 1;
    @%p1 bra read;
    {barrier}
    ret;
read:
    mapa.shared::cluster.u32 %r4, %r2, 0;
    ld.shared::cluster.u32 %r5, [%r4];
    {barrier}
"""
    options = {"grid": (2, 1, 1), "cluster": (2, 1, 1), "shared": 128}
    if not finds:
        run(body, {"out": np.zeros(1)}, **options)
        return
    with pytest.raises(ExitedCta, match="rank 0"):
        run(body, {"out": np.zeros(1)}, **options)


@pytest.mark.parametrize(
    "before, block, finds",
    [
        ("", 48, False),
        ("and.b32 %r1, %r50, 1; setp.eq.u32 %p1, %r1, 1; @%p1 exit;", 64, False),
        ("and.b32 %r1, %r50, 1; setp.eq.u32 %p1, %r1, 1; @%p1", 64, True),
    ],
)
def test_an_aligned_barrier_needs_the_threads_of_a_warp_that_are_left(before: str, block: int, finds: bool) -> None:
    """Threads that never were and those that have exited are not missed; those that the guard leaves out are."""
    context = pytest.raises(DivergentWarp, match="16 lanes of a warp") if finds else contextlib.nullcontext()
    with context:
        run(f"{before} {BARRIER}", {"out": np.zeros(1)}, grid=(2, 1, 1), cluster=(2, 1, 1), block=(block, 1, 1))


def test_a_wait_without_an_arrival_and_a_second_arrival() -> None:
    options = {"grid": (2, 1, 1), "cluster": (2, 1, 1), "shared": 16}
    with pytest.raises(BarrierMismatch, match="without having arrived"):
        run("barrier.cluster.wait.aligned;", {"out": np.zeros(1)}, **options)
    with pytest.raises(BarrierMismatch, match="twice"):
        run("barrier.cluster.arrive.aligned; barrier.cluster.arrive.aligned;", {"out": np.zeros(1)}, **options)


def test_a_cta_that_does_not_come_to_the_clusters_barrier() -> None:
    """CTA 1 waits at a bar.sync that its own second half of threads never reaches."""
    body = """
    mov.u32 %r1, %cluster_ctarank;
    setp.eq.u32 %p1, %r1, 1;
    @%p1 bra other;
    barrier.cluster.arrive; barrier.cluster.wait;
    bra done;
other:
    bar.sync 1, 64;
done:
"""
    with pytest.raises(
        Deadlock, match=r"CTA \(0, 0, 0\): the cluster's barrier at .* has not seen CTA \(1, 0, 0\) warp 0"
    ):
        run(body, {"out": np.zeros(1)}, grid=(2, 1, 1), cluster=(2, 1, 1), shared=16)


@pytest.mark.parametrize("cluster", [(3, 1, 1), (0, 1, 1), (32, 1, 1)])
def test_impossible_clusters(cluster) -> None:
    with pytest.raises(InvalidLaunch, match="cluster"):
        run("", {"out": np.zeros(1)}, grid=(32, 1, 1), cluster=cluster, shared=16)
