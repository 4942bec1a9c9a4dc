"""cp.async with zero fill, partial sources and its findings."""

from __future__ import annotations

import numpy as np
import pytest

from cute_attn.emulator.errors import InvalidOperand, Misaligned, OutOfBounds, UninitializedShared

from .harness import run

# Lane l copies 16 bytes with a source size from `sizes`, then writes them out.
COPY = """
    mov.u32 %r1, dynamic; mad.lo.u32 %r2, %r50, 16, %r1; mad.wide.u32 %rd5, %r50, 16, %rd0;
    mad.wide.u32 %rd6, %r50, 4, %rd1; ld.global.u32 %r3, [%rd6];
    cp.async.cg.shared.global.L2::128B [%r2], [%rd5], 16, %r3;
    cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
    ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r2]; mad.wide.u32 %rd7, %r50, 16, %rd2;
    st.global.v4.u32 [%rd7], {%r4, %r5, %r6, %r7};
"""


def copy(sizes: np.ndarray, source: np.ndarray, body: str = COPY) -> np.ndarray:
    out = np.full((32, 16), 0xAA, np.uint8)
    run(body, {"source": source, "sizes": sizes.astype(np.uint32), "out": out}, shared=512)
    return out


def test_zero_fill_and_partial_sources():
    source = np.random.default_rng(0).integers(1, 255, (32, 16), np.uint8)
    sizes = np.arange(32) % 17
    out = copy(sizes, source)
    for lane in range(32):
        assert (out[lane, : sizes[lane]] == source[lane, : sizes[lane]]).all()
        assert (out[lane, sizes[lane] :] == 0).all()


def test_bytes_beyond_the_source_size_are_not_read():
    source = np.random.default_rng(0).integers(1, 255, 20 * 16 + 6, np.uint8)
    sizes = np.clip(source.size - 16 * np.arange(32), 0, 16)
    out = copy(sizes, source)
    assert (out.reshape(-1)[: source.size] == source).all() and (out.reshape(-1)[source.size :] == 0).all()
    with pytest.raises(OutOfBounds, match=r"global read of 7 bytes.*reaching 1 bytes past its end"):
        copy(np.where(np.arange(32) == 20, 7, sizes), source)


def test_source_size_above_the_copy_size():
    source = np.zeros((64, 16), np.uint8)
    with pytest.raises(InvalidOperand, match="source size of 20"):
        copy(np.where(np.arange(32) == 3, 20, 16), source)


def test_ignored_source_and_guard():
    source = np.random.default_rng(1).integers(1, 255, (32, 16), np.uint8)
    body = COPY.replace("[%rd5], 16, %r3;", "[%rd5], 16, %p1;")
    body = body.replace("cp.async.cg", "setp.lt.u32 %p1, %r3, 8; cp.async.cg", 1)
    out = copy(np.arange(32), source, body)
    assert (out[:8] == 0).all() and (out[8:] == source[8:]).all()
    guarded = COPY.replace("cp.async.cg", "setp.lt.u32 %p1, %r3, 8; @%p1 cp.async.cg", 1)
    with pytest.raises(UninitializedShared) as caught:
        copy(np.minimum(np.arange(32), 16), source, guarded)
    assert caught.value.thread == (8, 0, 0)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_sizes(size):
    source = np.arange(32 * size, dtype=np.uint8)
    out = np.zeros_like(source)
    body = f"""
        mov.u32 %r1, dynamic; mad.lo.u32 %r2, %r50, {size}, %r1; mad.wide.u32 %rd5, %r50, {size}, %rd0;
        cp.async.ca.shared.global [%r2], [%rd5], {size}; cp.async.wait_all; bar.sync 0;
        mad.wide.u32 %rd6, %r50, {size}, %rd1; mov.u32 %r3, 0;
    LOOP:
        add.u32 %r4, %r2, %r3; ld.shared.b32 %r5, [%r4]; cvt.u64.u32 %rd8, %r3; add.u64 %rd7, %rd6, %rd8;
        st.global.b32 [%rd7], %r5; add.u32 %r3, %r3, 4; setp.lt.u32 %p1, %r3, {size}; @%p1 bra LOOP;
    """
    run(body, {"source": source, "out": out}, shared=512)
    assert (out == source).all()


def test_misaligned_source_and_destination():
    source = np.zeros(600, np.uint8)
    shifted_source = COPY.replace("[%rd5], 16", "[%rd5+8], 16")
    shifted_dest = COPY.replace("[%r2], [%rd5]", "[%r2+4], [%rd5]")
    for body in (shifted_source, shifted_dest):
        out = np.zeros((32, 16), np.uint8)
        arrays = {"source": source, "sizes": np.full(32, 16, np.uint32), "out": out}
        with pytest.raises(Misaligned, match="not a multiple of 16"):
            run(body, arrays, shared=1024)


# Each lane copies its 4 bytes of two rows in two groups, waits for all but `newest` of them, and reads the first row.
TWO_GROUPS = """
    shl.b32 %r1, %r50, 2; mad.wide.u32 %rd5, %r50, 4, %rd0; mad.wide.u32 %rd6, %r50, 4, %rd1;
    cp.async.ca.shared.global [%r1], [%rd5], 4; cp.async.commit_group;
    cp.async.ca.shared.global [%r1+128], [%rd5+128], 4; cp.async.commit_group;
    {wait}
    ld.shared.u32 %r2, [%r1]; st.global.u32 [%rd6], %r2;
"""


@pytest.mark.parametrize("wait", ["cp.async.wait_group 1;", "cp.async.wait_group 0;", "cp.async.wait_all;"])
def test_a_wait_completes_the_older_groups(wait):
    source, out = np.arange(64, dtype=np.uint32), np.zeros(32, np.uint32)
    run(TWO_GROUPS.format(wait=wait), {"source": source, "out": out}, shared=256)
    assert (out == source[:32]).all()


@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 2;"])
def test_a_copy_lands_only_when_it_is_waited_for(wait):
    source, out = np.arange(64, dtype=np.uint32), np.zeros(32, np.uint32)
    with pytest.raises(UninitializedShared):
        run(TWO_GROUPS.format(wait=wait), {"source": source, "out": out}, shared=256, races=False)


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("count, form", [(32, ".noinc"), (1, "")])
def test_an_mbarrier_waits_for_the_copies_of_its_threads(count, form, seed):
    """Warp 0 copies; warp 1 waits at the mbarrier for what warp 0 never waits for itself."""
    source, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    extra = "" if form else "@%p11 mbarrier.arrive.shared::cta.b64 _, [256];"
    body = f"""
    setp.eq.u32 %p11, %r50, 0;
    @%p11 mbarrier.init.shared::cta.b64 [256], {count};
    bar.sync 0;
    and.b32 %r3, %r50, 31; shl.b32 %r1, %r3, 2; mad.wide.u32 %rd5, %r3, 4, %rd0; mad.wide.u32 %rd6, %r3, 4, %rd1;
    setp.ge.u32 %p1, %r50, 32;
    @%p1 bra consumer;
    cp.async.ca.shared.global [%r1], [%rd5], 4;
    cp.async.mbarrier.arrive{form}.shared::cta.b64 [256];
    {extra}
    bra done;
consumer:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [256], 0;
    @!%p2 bra consumer;
    ld.shared.u32 %r2, [%r1]; st.global.u32 [%rd6], %r2;
done:
"""
    run(body, {"source": source, "out": out}, block=(64, 1, 1), shared=272, seed=seed)
    assert (out == source).all()
