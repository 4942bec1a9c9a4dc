"""clusterlaunchcontrol: persistent CTAs take over work that has not started."""

from __future__ import annotations

import numpy as np
import pytest

from cute_attn.emulator.errors import OutOfBounds

from .harness import run
from .test_cluster import BARRIER
from .test_mbarrier import SEEDS, wait

# Each CTA counts itself in, then takes over other CTAs' work until there is none: out[i] += 1, who[i] = own number.
PERSISTENT = """
    .reg .b128 %answer;
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mad.lo.u32 %r3, %r2, 6, %r1;
    mov.u32 %r10, 0;
    mov.u32 %r9, %r3;
    mbarrier.init.shared::cta.b64 [16], 1;
work:
    mad.wide.u32 %rd2, %r3, 4, %rd0;
    ld.global.u32 %r4, [%rd2]; add.u32 %r4, %r4, 1; st.global.u32 [%rd2], %r4;
    mad.wide.u32 %rd3, %r3, 4, %rd1; st.global.u32 [%rd3], %r9;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [16], 16;
    clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [0], [16];
    {wait}
    xor.b32 %r10, %r10, 1;
    ld.shared.b128 %answer, [0];
    clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p1, %answer;
    @!%p1 bra done;
    {get}
    mad.lo.u32 %r3, %r6, 6, %r5;
    bra work;
done:
"""
VECTOR = "clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {%r5, %r6, %r7, _}, %answer;"
SCALARS = "\n".join(
    f"clusterlaunchcontrol.query_cancel.get_first_ctaid::{axis}.b32.b128 %r{5 + n}, %answer;"
    for n, axis in enumerate("xyz")
)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("get", [VECTOR, SCALARS])
def test_every_tile_is_done_once_whoever_does_it(seed, get) -> None:
    out, who = np.zeros((8, 6), np.uint32), np.zeros((8, 6), np.uint32)
    body = PERSISTENT.format(wait=wait("16", "%r10", "again"), get=get)
    run(body, {"out": out, "who": who}, grid=(6, 8, 1), block=(1, 1, 1), shared=32, seed=seed)
    assert (out == 1).all()
    assert len(np.unique(who)) < who.size  # some CTAs never started: their work was taken


@pytest.mark.parametrize("get", [VECTOR, SCALARS])
def test_the_first_cta_of_a_failed_cancellation_is_nobody(get) -> None:
    """Programs may ask for it, and must not use it: here it is the number of the tile that is worked on next."""
    body = PERSISTENT.format(wait=wait("16", "%r10", "again"), get=get).replace("@!%p1 bra done;", "")
    arrays = {"out": np.zeros((8, 6), np.uint32), "who": np.zeros((8, 6), np.uint32)}
    with pytest.raises(OutOfBounds):
        run(body, arrays, grid=(6, 8, 1), block=(1, 1, 1), shared=32)
    asked_first = body.replace("bra work;", "@%p1 bra work;")
    run(
        asked_first,
        arrays := {name: np.zeros((8, 6), np.uint32) for name in arrays},
        grid=(6, 8, 1),
        block=(1, 1, 1),
        shared=32,
    )
    assert (arrays["out"] == 1).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_answer_reaches_every_cta_of_the_cluster(seed) -> None:
    """Rank 0 asks; both CTAs wait at their own mbarrier and go on with their part of the cluster they took over."""
    ask = "clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes"
    body = PERSISTENT.format(wait=wait("16", "%r10", "again"), get=VECTOR)
    body = body.replace(f"{ask}.b128", f"@%p2 {ask}.multicast::cluster::all.b128")
    body = body.replace("work:", f"mov.u32 %r20, %cluster_ctarank; setp.eq.u32 %p2, %r20, 0;\n{BARRIER}\nwork:", 1)
    body = body.replace("bra work;", f"add.u32 %r3, %r3, %r20;\n{BARRIER}\nbra work;").replace(
        "@!%p1 bra done", "@!%p1 bra over"
    )
    body = body.replace("done:", f"over: {BARRIER}\ndone:")
    out, who = np.zeros((8, 6), np.uint32), np.zeros((8, 6), np.uint32)
    options = {"grid": (6, 8, 1), "cluster": (2, 1, 1), "block": (1, 1, 1), "shared": 32, "seed": seed}
    run(body.replace(".aligned", ""), {"out": out, "who": who}, **options)
    assert (out == 1).all()
    assert len(np.unique(who)) < who.size
    assert (who[:, 0::2] + 1 == who[:, 1::2]).all()
