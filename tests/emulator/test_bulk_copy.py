"""cp.async.bulk and cp.reduce.async.bulk: contiguous blocks in every direction, their groups, masks and findings."""

from __future__ import annotations

import numpy as np
import pytest

from cute_attn.emulator.errors import (
    BarrierMismatch,
    DataRace,
    Deadlock,
    ExitedCta,
    InvalidOperand,
    Misaligned,
    OutOfBounds,
    UninitializedShared,
    UnknownInstruction,
)

from .harness import run
from .tma_programs import BARRIER, DUMP, FILL, SHARED, WAIT, aligned

BARRIERS = f"""
    mov.u32 %r53, %ctaid.x; mov.u32 %r2, dynamic; add.u32 %r2, %r2, {BARRIER}; setp.eq.u32 %p1, %r50, 0;
    @%p1 mbarrier.init.shared.b64 [%r2], 1; fence.mbarrier_init.release.cluster;
    bar.sync 0;
"""
LOAD = f"""
    {BARRIERS}
    mul.wide.u32 %rd10, %r53, 4096; add.u64 %rd10, %rd10, %rd0;
    mul.wide.u32 %rd11, %r53, 4; add.u64 %rd11, %rd11, %rd1; ld.global.u32 %r4, [%rd11]; mov.u32 %r3, 64;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], %r4;
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd10], %r4, [%r2];
    {WAIT} {DUMP}
"""


def blocks(count: int, seed: int = 0) -> np.ndarray:
    return aligned(np.random.default_rng(seed).integers(0, 255, (count, 4096), np.uint8))


def load(source, sizes, body=LOAD, **options) -> np.ndarray:
    out = np.zeros((len(sizes), BARRIER), np.uint8)
    arrays = {"source": source, "sizes": np.array(sizes, np.uint32), "out": out}
    options = {"uninitialized_shared": "poison"} | options
    run(body, arrays, shared=SHARED, grid=(len(sizes), 1, 1), **options)
    return out


@pytest.mark.parametrize("sizes", [[16], [0], [4096, 4096], [4096, 16, 512, 0, 2000]])
@pytest.mark.parametrize("space", ["shared::cluster", "shared::cta"])
def test_loads(sizes, space):
    source = blocks(len(sizes))
    out = load(source, sizes, LOAD.replace("shared::cluster", space))
    expected = np.full_like(out, 0xFF)
    for row, block, size in zip(expected, source, sizes, strict=True):
        row[64 : 64 + size] = block[:size]
    assert (out == expected).all()


def test_multicast():
    """Of each two CTAs the first sends one block to both and the second one to itself."""
    body = LOAD.replace("@%p1 cp.async", "barrier.cluster.arrive; barrier.cluster.wait; @%p1 cp.async").replace(
        "@%p1 mbarrier.arrive", "add.u32 %r5, %r4, 256; selp.u32 %r5, %r5, %r4, %p2; @%p1 mbarrier.arrive"
    )
    body = body.replace("_, [%r2], %r4", "_, [%r2], %r5").replace(
        "mov.u32 %r3, 64;",
        "mov.u32 %r20, %cluster_ctarank; setp.eq.u32 %p2, %r20, 1; selp.b32 %r21, 2, 3, %p2; cvt.u16.u32 %h1, %r21;"
        "selp.u32 %r3, 1024, 64, %p2;",
    )
    body = body.replace("bytes [%r3]", "bytes.multicast::cluster.L2::cache_hint [%r3]").replace(
        "%r4, [%r2];\n    \nWAIT", "%r4, [%r2], %h1, %rd11;\nWAIT"
    )
    source = blocks(4)
    out = load(source, [256, 128, 256, 512], body, cluster=(2, 1, 1))
    expected = np.full_like(out, 0xFF)
    for cta in range(4):
        expected[cta, 64:320] = source[cta // 2 * 2, :256]
    for cta, size in ((1, 128), (3, 512)):
        expected[cta, 1024 : 1024 + size] = source[cta, :size]
    assert (out == expected).all()


STORE = f"""
    {BARRIERS} {FILL}
    mul.wide.u32 %rd10, %r53, 4096; add.u64 %rd10, %rd10, %rd0; mov.u32 %r3, 128;
    mul.wide.u32 %rd11, %r53, 4; add.u64 %rd11, %rd11, %rd1; ld.global.u32 %r4, [%rd11];
    @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd10], [%r3], %r4;
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
"""


def store(target, sizes, shared, body=STORE, **options) -> None:
    arrays = {"target": target, "sizes": np.asarray(sizes, np.uint32), "from": shared}
    run(body, arrays, shared=SHARED, grid=(len(sizes), 1, 1), **options)


def shared_bytes(count: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 255, (count, BARRIER), np.uint8)


def test_stores():
    sizes, shared, target = [64, 4096, 0, 1600], shared_bytes(4), blocks(4)
    expected = target.copy()
    for row, source, size in zip(expected, shared, sizes, strict=True):
        row[:size] = source[128 : 128 + size]
    store(target, sizes, shared)
    assert (target == expected).all()


@pytest.mark.parametrize("hint", ["", ".L2::cache_hint"])
def test_byte_masks(hint):
    mask = 0b0110_0000_1000_1101
    body = STORE.replace("bulk_group [", f"bulk_group{hint}.cp_mask [").replace(
        "[%r3], %r4;", f"[%r3], %r4, {'%rd11, ' if hint else ''}%h1;"
    )
    body = body.replace("mov.u32 %r3, 128;", f"mov.u32 %r3, 128; mov.b16 %h1, {mask};")
    sizes, shared = [64, 32], shared_bytes(2)
    # The target has the lowest addresses: what is written elsewhere by mistake is written there.
    pieces = blocks(2), shared, np.array(sizes, np.uint32).view(np.uint8)
    memory = aligned(np.concatenate([piece.reshape(-1) for piece in pieces]))
    target, shared = memory[:8192].reshape(2, 4096), memory[8192:-8].reshape(2, BARRIER)
    expected = target.copy()
    for row, source, size in zip(expected, shared, sizes, strict=True):
        kept = [k for k in range(size) if mask >> k % 16 & 1]
        row[kept] = source[128:][kept]
    store(target, memory[-8:].view(np.uint32), shared, body)
    assert (target == expected).all()


def test_groups_complete_when_the_thread_waits_for_them():
    """Sources are overwritten after two groups: with wait_group 1 in between, only the second has the new bytes."""
    store_one = "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd10], [%r3], 32; cp.async.bulk.commit_group;"
    body = f"""
        {BARRIERS} {FILL} mov.u32 %r3, 0; mov.b64 %rd10, %rd0;
        {store_one} add.u64 %rd10, %rd0, 32; {store_one}
        cp.async.bulk.wait_group.read WAITED;
        mov.b64 %rd12, 0; mul.lo.u32 %r5, %r50, 8; st.shared.b64 [%r5], %rd12;
        cp.async.bulk.wait_group 0;
    """
    for waited, expected in ((0, [9, 9]), (1, [9, 0]), (2, [0, 0])):
        target = blocks(1)
        store(target, [0], np.full((1, BARRIER), 9, np.uint8), body.replace("WAITED", str(waited)), races=False)
        assert target[0, :64].reshape(2, 32).tolist() == [[value] * 32 for value in expected]


SEND = f"""
    {BARRIERS} {FILL}
    mov.u32 %r20, %cluster_ctarank; xor.b32 %r20, %r20, 1; mov.u32 %r3, 1024; mov.u32 %r4, 4096;
    mapa.shared::cluster.u32 %r5, %r4, %r20; mapa.shared::cluster.u32 %r6, %r2, %r20;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 512;
    barrier.cluster.arrive; barrier.cluster.wait;
    @%p1 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r5], [%r3], 512, [%r6];
    {WAIT} {DUMP}
    barrier.cluster.arrive; barrier.cluster.wait;
"""


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_blocks_between_the_ctas_of_a_cluster(seed):
    shared = shared_bytes(4)
    expected = shared.copy()
    for cta in range(4):
        expected[cta, 4096:4608] = shared[cta ^ 1, 1024:1536]
    store(shared, [0] * 4, shared, SEND, cluster=(2, 1, 1), seed=seed)
    assert (shared == expected).all()


REDUCTIONS = [
    ("add", "s32", np.int32, lambda a, b: a + b),
    ("add", "u64", np.uint64, lambda a, b: a + b),
    ("min", "u32", np.uint32, np.minimum),
    ("max", "s32", np.int32, np.maximum),
    ("inc", "u32", np.uint32, lambda a, b: np.where(a >= b, 0, a + 1)),
    ("xor", "b32", np.uint32, lambda a, b: a ^ b),
]


@pytest.mark.parametrize("name,kind,dtype,combine", REDUCTIONS, ids=lambda x: x if isinstance(x, str) else "")
def test_reductions_between_ctas(name, kind, dtype, combine):
    body = SEND.replace("cp.async.bulk", "cp.reduce.async.bulk").replace("::bytes [", f"::bytes.{name}.{kind} [")
    shared = shared_bytes(2)
    expected = shared.copy()
    for cta in range(2):
        old, new = expected[cta, 4096:4608].view(dtype), shared[cta ^ 1, 1024:1536].view(dtype)
        old[:] = combine(old, new)
    store(shared, [0] * 2, shared, body, cluster=(2, 1, 1))
    assert (shared == expected).all()


GLOBAL_REDUCTIONS = [
    ("add.u32", np.uint32, lambda a, b: a + b),
    ("add.f32", np.float32, lambda a, b: a + b),
    ("add.f64", np.float64, lambda a, b: a + b),
    ("add.noftz.f16", np.float16, lambda a, b: a + b),
    ("min.s64", np.int64, np.minimum),
    ("max.f16", np.float16, np.fmax),
    ("and.b64", np.uint64, lambda a, b: a & b),
    ("or.b32", np.uint32, lambda a, b: a | b),
    ("dec.u32", np.uint32, lambda a, b: np.where((a == 0) | (a > b), b, a - 1)),
]


@pytest.mark.parametrize("operation,dtype,combine", GLOBAL_REDUCTIONS, ids=lambda x: x if isinstance(x, str) else "")
def test_reductions_in_global_memory(operation, dtype, combine):
    """Three CTAs reduce into one block."""
    body = STORE.replace("add.u64 %rd10, %rd10, %rd0", "mov.u64 %rd10, %rd0").replace(
        "cp.async.bulk.global.shared::cta.bulk_group", f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{operation}"
    )
    rng = np.random.default_rng(3)
    floating = np.issubdtype(dtype, np.floating)
    numbers = rng.standard_normal((4, 64)) if floating else rng.integers(0, 2**31, (4, 64))
    values = numbers.astype(dtype)
    shared = np.zeros((3, BARRIER), np.uint8)
    shared[:, 128 : 128 + values[0].nbytes] = values[:3].view(np.uint8)
    target = aligned(values[3])
    expected = values[3]
    for row in values[:3]:
        expected = combine(expected, row).astype(dtype)
    store(target, [values[0].nbytes] * 3, shared, body)
    assert (target == expected).all()


@pytest.mark.parametrize("operation", ["min.f32", "add.f16", "add.s64", "inc.u64", "and.u32", "add.b32"])
def test_reductions_that_do_not_exist(operation):
    body = STORE.replace(
        "cp.async.bulk.global.shared::cta.bulk_group", f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{operation}"
    )
    with pytest.raises(UnknownInstruction):
        store(blocks(1), [64], shared_bytes(1), body)


# ---- findings


def test_sizes_and_addresses():
    source = blocks(1)
    load(source, [64])
    with pytest.raises(InvalidOperand, match="a bulk copy of 40 bytes"):
        load(source, [40])
    with pytest.raises(Misaligned, match="not a multiple of 16"):
        load(source, [64], LOAD.replace("[%rd10]", "[%rd10+8]"))
    with pytest.raises(Misaligned, match="not a multiple of 16"):
        load(source, [64], LOAD.replace("%r3, 64;", "%r3, 72;"))
    with pytest.raises(OutOfBounds, match="0 bytes past the end of `source`.*16 bytes in all"):
        load(source, [4096], LOAD.replace("[%rd10]", "[%rd10+16]"))
    with pytest.raises(OutOfBounds, match="out of bounds: the CTA has 8256 bytes of shared memory"):
        load(source, [4096], LOAD.replace("%r3, 64;", "%r3, 4176;"))


def test_counts_of_bytes():
    with pytest.raises(Deadlock, match="64 bytes announced by expect_tx are not being copied"):
        load(blocks(1), [128], LOAD.replace("[%rd10], %r4", "[%rd10], 64"))
    with pytest.raises(BarrierMismatch, match="expect_tx announced"):
        load(blocks(1), [128], LOAD.replace("[%rd10], %r4", "[%rd10], 256"))


def test_missing_wait():
    late = LOAD.replace(WAIT, "")
    with pytest.raises((UninitializedShared, BarrierMismatch)):
        load(blocks(1), [4096], late, uninitialized_shared="error", races=False)
    fits = LOAD.replace(DUMP, "ld.shared.u32 %r5, [%r3]; st.global.u32 [%rd2], %r5;")
    source = blocks(1)
    assert load(source, [4096], fits, uninitialized_shared="error")[0, :4].tolist() == source[0, :4].tolist()
    with pytest.raises(UninitializedShared):
        load(source, [4096], fits.replace(WAIT, ""), uninitialized_shared="error", races=False)
    with pytest.raises(DataRace):
        load(source, [4096], fits.replace(WAIT, ""))


def test_store_of_bytes_that_nobody_wrote():
    with pytest.raises(UninitializedShared, match="at offset 0x80"):
        store(blocks(1), [64], shared_bytes(1), STORE.replace(FILL, ""))


def test_send_to_a_cta_that_has_left():
    body = SEND.replace("barrier.cluster.arrive; barrier.cluster.wait;", "")
    body = body.replace("@%p1 cp.async", "setp.eq.u32 %p5, %r20, 0; @%p5 exit; @%p1 cp.async")
    with pytest.raises(ExitedCta):
        store(shared_bytes(2), [0] * 2, shared_bytes(2), body, cluster=(2, 1, 1))
