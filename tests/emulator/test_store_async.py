"""st.async: remote stores that report to an mbarrier; setmaxnreg, which warp-specialised programs send along."""

from __future__ import annotations

import numpy as np
import pytest

from cute_attn.emulator.errors import BarrierMismatch, DivergentWarp, InvalidOperand, Misaligned

from .harness import run
from .test_cluster import BARRIER
from .test_mbarrier import SEEDS, wait

# Every thread of a cluster's two CTAs sends 16 bytes to its twin in the other CTA; at [0] lies the mbarrier.
EXCHANGE = f"""
    setp.eq.u32 %p1, %r50, 0;
    @%p1 mbarrier.init.shared::cta.b64 [0], 1;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [0], {{announced}};
    {BARRIER}
    mov.u32 %r1, %cluster_ctarank; xor.b32 %r1, %r1, 1;
    shl.b32 %r2, %r50, 4; add.u32 %r2, %r2, 64;
    mapa.shared::cluster.u32 %r3, %r2, %r1;
    mov.u32 %r4, 0; mapa.shared::cluster.u32 %r4, %r4, %r1;
    mul.lo.u32 %r5, %r51, 10; add.u32 %r6, %r5, 1; add.u32 %r7, %r5, 2; add.u32 %r8, %r5, 3;
    {{send}}
    mov.u32 %r5, 0; mov.u32 %r6, 0;
    {{wait}}
    ld.shared.v4.u32 {{{{%r10, %r11, %r12, %r13}}}}, [%r2];
    mad.wide.u32 %rd1, %r51, 16, %rd0;
    st.global.v4.u32 [%rd1], {{{{%r10, %r11, %r12, %r13}}}};
    {BARRIER}
"""
VECTOR = "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%r3], {%r5, %r6, %r7, %r8}, [%r4];"
PAIRS = """
    mov.b64 %rd5, {%r5, %r6}; mov.b64 %rd6, {%r7, %r8};
    st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%r3], %rd5, [%r4];
    st.async.shared::cluster.mbarrier::complete_tx::bytes.s64 [%r3+8], %rd6, [%r4];
"""
WORDS = "\n".join(
    f"st.async.shared::cluster.mbarrier::complete_tx::bytes.{kind} [%r3+{4 * n}], %r{5 + n}, [%r4];"
    for n, kind in enumerate(("u32", "s32", "b32", "f32"))
)


def exchange(send: str, announced: int = 32 * 16, waiting: str = wait("0", "0", "again"), seed: int | None = None):
    out = np.zeros((4, 32, 4), np.uint32)
    body = EXCHANGE.format(send=send, announced=announced, wait=waiting)
    run(body, {"out": out}, grid=(4, 1, 1), cluster=(2, 1, 1), shared=80 + 32 * 16, seed=seed)
    return out


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("send", [VECTOR, PAIRS, WORDS], ids=["v4", "b64", "b32"])
def test_what_the_other_cta_sent_is_there_after_the_wait(send: str, seed: int | None) -> None:
    sender = np.arange(4)[:, None, None] ^ 1
    numbers = 10 * (32 * sender + np.arange(32)[:, None]) + np.arange(4)
    assert (exchange(send, seed=seed) == numbers).all()


def test_a_guard_keeps_lanes_from_sending() -> None:
    out = exchange(
        f"setp.lt.u32 %p2, %r50, 8; @%p2 {VECTOR} @!%p2 st.shared.v4.u32 [%r2], {{%r51, %r51, %r51, %r51}};", 8 * 16
    )
    assert (out[:, 8:, 0] == np.arange(128).reshape(4, 32)[:, 8:]).all()
    assert (out[:, :8, 3] == 10 * (np.arange(4)[:, None] ^ 1) * 32 + 10 * np.arange(8) + 3).all()


def test_findings() -> None:
    with pytest.raises(BarrierMismatch, match="while a copy that reports to it is in flight|more than expect_tx"):
        exchange(VECTOR, announced=31 * 16)
    with pytest.raises(Misaligned):
        exchange(VECTOR.replace("[%r3]", "[%r3+8]"))
    with pytest.raises(BarrierMismatch, match="nobody has initialised"):
        exchange(VECTOR.replace("[%r4]", "[%r4+8]"))


def test_without_the_wait_the_bytes_are_not_there() -> None:
    """They land as late as they may: what is read is what was there before."""
    own = "st.shared.v4.u32 [%r2], {%r51, %r51, %r51, %r51};"
    late = wait("0", "0", "late")
    out = np.zeros((2, 32, 4), np.uint32)
    body = EXCHANGE.format(send=own + BARRIER + VECTOR, announced=32 * 16, wait="")
    body = body.replace("st.global", late + "st.global")
    run(body, {"out": out}, grid=(2, 1, 1), cluster=(2, 1, 1), shared=64 + 32 * 16, races=False)
    assert (out == np.arange(64).reshape(2, 32, 1)).all()


def test_register_counts() -> None:
    run("setmaxnreg.inc.sync.aligned.u32 240; setmaxnreg.dec.sync.aligned.u32 24;", block=(160, 1, 1))
    with pytest.raises(InvalidOperand, match="24 to 256 in steps of 8"):
        run("setmaxnreg.inc.sync.aligned.u32 100;")
    with pytest.raises(DivergentWarp):
        run("setp.lt.u32 %p1, %r50, 8; @!%p1 bra over; setmaxnreg.inc.sync.aligned.u32 64; over:")
