"""Pieces of PTX programs that move boxes: what comes before and after the bulk copy."""

from __future__ import annotations

import numpy as np

BARRIER = 8192
SHARED = BARRIER + 64
DUMP = f"""
    mul.lo.u32 %r30, %r50, 16; mad.lo.u32 %r31, %r53, {BARRIER}, %r30;
    cvt.u64.u32 %rd30, %r31; add.u64 %rd30, %rd30, %rd2;
DUMP:
    ld.shared.v4.b32 {{%r32, %r33, %r34, %r35}}, [%r30]; st.global.v4.b32 [%rd30], {{%r32, %r33, %r34, %r35}};
    add.u32 %r30, %r30, 512; add.u64 %rd30, %rd30, 512; setp.lt.u32 %p9, %r30, {BARRIER}; @%p9 bra DUMP;
"""
"""Shared memory of CTA %r53, up to the barrier, to the array in %rd2."""
FILL = f"""
    mul.lo.u32 %r30, %r50, 16; mad.lo.u32 %r31, %r53, {BARRIER}, %r30;
    cvt.u64.u32 %rd30, %r31; add.u64 %rd30, %rd30, %rd2;
FILL:
    ld.global.v4.b32 {{%r32, %r33, %r34, %r35}}, [%rd30]; st.shared.v4.b32 [%r30], {{%r32, %r33, %r34, %r35}};
    add.u32 %r30, %r30, 512; add.u64 %rd30, %rd30, 512; setp.lt.u32 %p9, %r30, {BARRIER}; @%p9 bra FILL;
    fence.proxy.async.shared::cta; bar.sync 0;
"""
"""The opposite of DUMP."""
WAIT = """
WAIT:
    mbarrier.try_wait.parity.shared.b64 %p8, [%r2], 0; @!%p8 bra WAIT;
"""


def aligned(content: np.ndarray, alignment: int = 128) -> np.ndarray:
    """A copy whose memory starts at a multiple of `alignment`."""
    raw = np.empty(content.nbytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    copy = raw[start : start + content.nbytes].view(content.dtype).reshape(content.shape)
    copy[...] = content
    return copy


def coordinates(rank: int, first: int = 10) -> str:
    return "{" + ", ".join(f"%r{first + n}" for n in range(rank)) + "}"


def start(rank: int) -> str:
    """%r53: the CTA; %r2: its mbarrier, of one arrival; %r10, ...: coordinates, from %rd1; %p1: thread 0."""
    loads = " ".join(f"ld.global.s32 %r{10 + n}, [%rd10+{4 * n}];" for n in range(rank))
    return f"""
        mov.u32 %r53, %ctaid.x; mov.u32 %r2, dynamic; add.u32 %r2, %r2, {BARRIER}; setp.eq.u32 %p1, %r50, 0;
        mul.wide.u32 %rd10, %r53, {4 * rank}; add.u64 %rd10, %rd10, %rd1; {loads}
        @%p1 mbarrier.init.shared.b64 [%r2], 1; fence.mbarrier_init.release.cluster;
        bar.sync 0;
    """


def random_tensor(shape, dtype, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return aligned(rng.integers(1, 255, count, np.uint8)).view(dtype).reshape(shape)
