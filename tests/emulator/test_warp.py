"""shfl, vote, redux, match, activemask and elect against definitions lane by lane."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cute_attn.emulator.errors import Deadlock, DivergentWarp

from .harness import run

IN_OUT = "mad.wide.u32 %rd5, %r51, 4, %rd0; ld.global.b32 %r1, [%rd5];"
STORE = "mad.wide.u32 %rd6, %r51, 4, %rd1; st.global.b32 [%rd6], %r9;"


def lanes(code: str, data: np.ndarray, dtype=np.uint32, **options) -> np.ndarray:
    out = np.zeros(data.size, dtype)
    run(IN_OUT + code + STORE, {"data": data, "out": out}, block=(data.size, 1, 1), **options)
    return out


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The ISA's pseudo code of shfl: (source lane, in range)."""
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    top = (lane & segment) | (clamp & ~segment)
    bottom = lane & segment
    j, valid = {
        "up": (lane - b, lane - b >= top),
        "down": (lane + b, lane + b <= top),
        "bfly": (lane ^ b, (lane ^ b) <= top),
        "idx": (bottom | (b & ~segment), (bottom | (b & ~segment)) <= top),
    }[mode]
    return (j if valid else lane), valid


@settings(max_examples=30, deadline=None)
@given(
    mode=st.sampled_from(["up", "down", "bfly", "idx"]),
    b=st.integers(0, 31),
    width=st.sampled_from([32, 16, 8, 4]),
    register=st.booleans(),
)
def test_shfl(mode, b, width, register):
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    data = np.random.default_rng(0).integers(0, 2**32, 64, np.uint32)
    amount = "%r3" if register else str(b)
    varying = [(b + (k if register else 0)) for k in range(64)]
    code = f"add.u32 %r3, %r50, {b}; shfl.sync.{mode}.b32 %r9|%p1, %r1, {amount}, {c}, -1;"
    got = lanes(code, data)
    valid = lanes(code + "selp.u32 %r9, 1, 0, %p1;", data)
    for k in range(64):
        source, inside = shuffled(mode, k % 32, varying[k], c)
        assert got[k] == data[k // 32 * 32 + source] and valid[k] == inside


def test_shfl_among_the_members_of_a_diverged_warp():
    data = np.arange(32, dtype=np.uint32)
    code = """
        mov.u32 %r9, 1000; setp.ge.u32 %p1, %r50, 16; @%p1 bra SKIP;
        shfl.sync.bfly.b32 %r9, %r1, 3, 31, 0x0000ffff; SKIP:
    """
    assert lanes(code, data).tolist() == [k ^ 3 for k in range(16)] + [1000] * 16
    with pytest.raises(DivergentWarp, match=r"names lanes \[16, 17, .*31\]"):
        lanes(code.replace("0x0000ffff", "-1"), data)


def test_vote():
    data = np.random.default_rng(1).integers(0, 4, 96, np.uint32)
    data[32:64] = 0
    data[64:] = 1
    warps = (data == 1).reshape(3, 32)
    test = "setp.eq.u32 %p1, %r1, 1;"
    ballot = lanes(test + "vote.sync.ballot.b32 %r9, %p1, -1;", data)
    assert ballot.tolist() == [sum(int(v) << k for k, v in enumerate(w)) for w in warps for _ in range(32)]
    for mode, function in {"any": np.any, "all": np.all, "uni": lambda w: w.all() or not w.any()}.items():
        got = lanes(test + f"vote.sync.{mode}.pred %p2, %p1, -1; selp.u32 %r9, 1, 0, %p2;", data)
        assert got.tolist() == [int(function(w)) for w in warps for _ in range(32)]
    flipped = lanes(test + "vote.sync.ballot.b32 %r9, !%p1, 0xff;", data)
    assert (flipped == (~ballot & 0xFF)).all()


def test_redux():
    data = np.random.default_rng(2).integers(0, 2**32, 64, np.uint32)
    warps = data.reshape(2, 32)
    for op, function in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
        got = lanes(f"redux.sync.{op}.b32 %r9, %r1, -1;", data)
        assert (got.reshape(2, 32) == function.reduce(warps, axis=1)[:, None]).all()
    signed = warps.view(np.int32)
    for op, expected in {"min": signed.min(1), "max": signed.max(1), "add": signed.sum(1, dtype=np.int32)}.items():
        assert (lanes(f"redux.sync.{op}.s32 %r9, %r1, -1;", data, np.int32).reshape(2, 32) == expected[:, None]).all()
    low = lanes("redux.sync.max.u32 %r9, %r1, 0xf;", data).reshape(2, 32)
    assert (low == warps[:, :4].max(1)[:, None]).all()


def test_match():
    data = np.random.default_rng(3).integers(0, 5, 32, np.uint32)
    got = lanes("match.any.sync.b32 %r9, %r1, -1;", data)
    assert got.tolist() == [sum(1 << k for k in range(32) if data[k] == v) for v in data]
    same = np.full(32, 7, np.uint32)
    code = "match.all.sync.b32 %r9|%p1, %r1, -1; selp.u32 %r2, 1, 2, %p1; xor.b32 %r9, %r9, %r2;"
    assert (lanes(code, same) == 0xFFFFFFFE).all()
    assert (lanes(code, data) == 2).all()


def test_activemask_and_elect():
    data = np.zeros(32, np.uint32)
    code = "mov.u32 %r9, 0; setp.lt.u32 %p1, %r50, 5; @%p1 bra SKIP; activemask.b32 %r9; SKIP:"
    assert lanes(code, data).tolist() == [0] * 5 + [0xFFFFFFE0] * 27
    code = "elect.sync %r9|%p1, 0xfffffff0; selp.u32 %r2, 100, 0, %p1; add.u32 %r9, %r9, %r2;"
    assert lanes(code, data).tolist() == [104 if k == 4 else 4 for k in range(32)]


def test_a_warp_that_the_guard_holds_back_is_not_divergent():
    data = np.arange(64, dtype=np.uint32)
    got = lanes("mov.u32 %r9, 99; setp.lt.u32 %p1, %r50, 32; @%p1 shfl.sync.idx.b32 %r9, %r1, 5, 31, -1;", data)
    assert got.tolist() == [5] * 32 + [99] * 32


OUT_OF_LINE = """
    mov.u32 %r2, dynamic; setp.eq.u32 %p1, %r50, 3; @%p1 bra COLD;
JOIN:
    bar.warp.sync -1; ld.shared.u32 %r9, [%r2]; bra END;
COLD:
    mov.u32 %r3, 9; st.shared.u32 [%r2], %r3; bra JOIN;
END:
"""


@pytest.mark.parametrize("size", [32, 48])
def test_bar_warp_sync_waits_for_lanes_that_took_another_way(size):
    code = OUT_OF_LINE.replace("%r50, 3;", "%r10, 3;").replace("mov.u32 %r2,", "and.b32 %r10, %r50, 31; mov.u32 %r2,")
    code = code.replace("dynamic;", "dynamic; shr.u32 %r11, %r50, 5; mad.lo.u32 %r2, %r11, 4, %r2;")
    assert lanes(code, np.zeros(size, np.uint32), shared=16).tolist() == [9] * size


def test_deadlock_at_a_bar_warp_sync():
    with pytest.raises(Deadlock, match=r"lanes \[0, 1, 2, 4, .*\] of warp 0 wait at `bar.warp.sync -1`"):
        lanes(OUT_OF_LINE.replace("bra JOIN;", "barrier.sync 1, 64;"), np.zeros(32, np.uint32), shared=16)
