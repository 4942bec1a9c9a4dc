"""Loads and stores of all spaces, and the findings of a sanitizer, each with a clean twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cute_attn.emulator.device_view import present
from cute_attn.emulator.errors import (
    Deadlock,
    EmulatorError,
    InvalidOperand,
    Misaligned,
    OutOfBounds,
    UninitializedShared,
    UnknownInstruction,
)
from cute_attn.emulator.memory import GlobalMemory

from .harness import run


def u32(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.uint32)


@pytest.mark.parametrize("kind,dtype", [("s8", np.int8), ("u8", np.uint8), ("s16", np.int16), ("u16", np.uint16)])
def test_narrow_loads_extend(kind, dtype):
    source = np.random.default_rng(0).integers(np.iinfo(dtype).min, np.iinfo(dtype).max, 32, dtype)
    out = np.zeros(32, np.int32)
    body = f"""
        mad.wide.u32 %rd5, %r50, {source.itemsize}, %rd0; mad.wide.u32 %rd6, %r50, 4, %rd1;
        ld.global.{kind} %r1, [%rd5]; st.global.b32 [%rd6], %r1;
    """
    run(body, {"source": source, "out": out})
    assert (out == source).all()


def test_vectors_and_cache_hints():
    source, out = u32(128), np.zeros(128, np.uint32)
    body = """
        mad.wide.u32 %rd5, %r50, 16, %rd0; mad.wide.u32 %rd6, %r50, 16, %rd1;
        ld.global.nc.L1::evict_last.L2::128B.v4.b32 {%r1, %r2, %r3, _}, [%rd5];
        ld.global.v2.u64 {%rd7, %rd8}, [%rd5]; mov.b64 {_, %r4}, %rd8;
        st.global.L1::no_allocate.v2.b32 [%rd6], {%r4, %r3}; st.global.v2.b32 [%rd6+8], {%r2, %r1};
    """
    run(body, {"source": source, "out": out})
    assert (out.reshape(-1, 4) == source.reshape(-1, 4)[:, ::-1]).all()


def test_byte_vectors():
    source, out = np.arange(128, dtype=np.uint8), np.zeros(32, np.uint32)
    body = """
        mad.wide.u32 %rd5, %r50, 4, %rd0; mad.wide.u32 %rd6, %r50, 4, %rd1;
        ld.global.v4.u8 {%h1, %h2, %h3, %h4}, [%rd5]; cvt.u32.u16 %r1, %h1; cvt.u32.u16 %r4, %h4;
        mad.lo.u32 %r1, %r4, 256, %r1; st.global.b32 [%rd6], %r1;
    """
    run(body, {"source": source, "out": out})
    assert (out == source[::4] + 256 * source[3::4].astype(np.uint32)).all()


def test_parameters_at_offsets():
    out = np.zeros(2, np.uint32)
    run("ld.param.u32 %r5, [s0+4]; st.global.v2.u32 [%rd0], {%r0, %r5};", {"out": out}, scalars=(7, 9))
    assert out.tolist() == [7, 9]


def test_module_constants():
    out = np.zeros(4, np.uint32)
    body = """
        mov.u64 %rd5, table; mad.wide.u32 %rd5, %r50, 4, %rd5; ld.global.u32 %r1, [%rd5];
        mad.wide.u32 %rd6, %r50, 4, %rd0; setp.lt.u32 %p1, %r50, 4; @%p1 st.global.u32 [%rd6], %r1;
    """
    table = ".global .align 4 .b32 table[32] = {5, 6, 7, 8};"
    run(body, {"out": out}, module=table)
    assert out.tolist() == [5, 6, 7, 8]


LOCAL = ".local .align 8 .b8 __local_depot0[16];"


def test_local_memory_belongs_to_the_thread():
    out = np.zeros(64, np.uint32)
    body = """
        mov.b64 %rd5, __local_depot0; cvta.local.u64 %rd6, %rd5; add.u64 %rd7, %rd6, 8;
        st.local.u32 [%rd5+4], %r51; st.u32 [%rd7], %r50;
        ld.u32 %r1, [%rd6+4]; cvt.u32.u64 %r9, %rd5; ld.local.u32 %r2, [%r9+8]; add.u32 %r1, %r1, %r2;
        mad.wide.u32 %rd8, %r51, 4, %rd0; st.global.u32 [%rd8], %r1;
    """
    run(body, {"out": out}, declarations=LOCAL, grid=(2, 1, 1))
    assert (out == u32(64) + u32(64) % 32).all()


def test_local_memory_is_bounded():
    body = "mov.b64 %rd5, __local_depot0; cvt.u32.u64 %r9, %rd5; st.local.u32 [%r9+16], %r50;"
    with pytest.raises(OutOfBounds, match=r"local write of 4 bytes at offset 0x10.*16 bytes of local memory"):
        run(body, {"out": u32(1)}, declarations=LOCAL)


GENERIC = """
    mov.u32 %r1, dynamic; cvt.u64.u32 %rd5, %r1; cvta.shared.u64 %rd5, %rd5;
    mad.wide.u32 %rd6, %r50, 4, %rd5; st.u32 [%rd6], %r50;
    setp.lt.u32 %p1, %r50, 16; mad.wide.u32 %rd7, %r50, 4, %rd0;
    selp.b64 %rd8, %rd6, %rd7, %p1; ld.u32 %r2, [%rd8]; st.u32 [%rd7], %r2;
    cvta.to.shared.u64 %rd9, %rd6; cvt.u32.u64 %r3, %rd9; ld.shared.u32 %r4, [%r3]; st.u32 [%rd7+128], %r4;
    isspacep.shared %p2, %rd8; selp.u32 %r5, 1, 0, %p2; st.u32 [%rd7+256], %r5;
"""


def test_generic_addresses_are_resolved_by_window():
    data = np.concatenate([u32(32) + 100, np.zeros(64, np.uint32)])
    run(GENERIC, {"data": data}, shared=128)
    assert data[:16].tolist() == list(range(16)) and data[16:32].tolist() == list(range(116, 132))
    assert (data[32:64] == u32(32)).all()
    assert data[64:].tolist() == [1] * 16 + [0] * 16


def test_static_and_dynamic_shared_memory():
    out = np.zeros(32, np.uint32)
    body = """
        mov.u32 %r1, fixed; mov.u32 %r2, dynamic; mad.lo.u32 %r3, %r50, 4, %r1; mad.lo.u32 %r4, %r50, 4, %r2;
        st.shared.u32 [%r3], %r50; mul.lo.u32 %r5, %r50, 100; st.shared.u32 [%r4], %r5;
        ld.shared.u32 %r6, [%r3]; ld.shared.u32 %r7, [%r4]; add.u32 %r6, %r6, %r7;
        mad.wide.u32 %rd5, %r50, 4, %rd0; st.global.u32 [%rd5], %r6;
    """
    run(body, {"out": out}, shared=128, declarations=".shared .align 4 .b8 fixed[128];")
    assert (out == u32(32) * 101).all()


# ---- findings

COPY = """
    mad.wide.u32 %rd5, %r51, 4, %rd0; mad.wide.u32 %rd6, %r51, 4, %rd1;
    ld.global.u32 %r1, [%rd5]; st.global.u32 [%rd6], %r1;
"""


def test_write_past_the_end_names_everything():
    source, out = u32(64), np.zeros(60, np.uint32)
    with pytest.raises(OutOfBounds) as caught:
        run(COPY, {"source": source, "out": out}, grid=(2, 1, 1))
    text = str(caught.value)
    assert "global write of 4 bytes" in text and "0 bytes past the end of `out` (240 bytes)" in text
    assert "st.global.u32 [%rd6], %r1" in text and "kernel: kernel" in text
    assert caught.value.cta == (1, 0, 0) and caught.value.thread == (28, 0, 0)
    assert isinstance(caught.value, EmulatorError)
    whole = np.zeros(64, np.uint32)
    run(COPY, {"source": source, "out": whole}, grid=(2, 1, 1))
    assert (whole == source).all()


def test_read_before_the_start():
    buffer = u32(80)
    with pytest.raises(OutOfBounds, match=r"16 bytes before the start of `source`"):
        run("ld.global.u32 %r1, [%rd0+-16]; st.global.u32 [%rd0], %r1;", {"source": buffer[8:]})


def test_access_that_straddles_the_end():
    with pytest.raises(OutOfBounds, match=r"at byte 8 of `source` \(12 bytes\), reaching 4 bytes past its end"):
        run("ld.global.u64 %rd5, [%rd0+8]; st.global.u64 [%rd0], %rd5;", {"source": u32(4)[:3]})


def test_guarded_off_accesses_are_not_checked():
    body = "setp.lt.u32 %p1, %r50, 5; mad.wide.u32 %rd5, %r50, 4, %rd0; @%p1 st.global.u32 [%rd5], %r50;"
    out = np.zeros(5, np.uint32)
    run(body, {"out": out})
    assert out.tolist() == [0, 1, 2, 3, 4]


def test_source_lines_are_named():
    body = """.loc 1 42 3
        st.global.u32 [%rd0+4], %r50;"""
    with pytest.raises(OutOfBounds, match=r"\(kernel\.py:42\)"):
        run(body, {"out": u32(1)}, module='.file 1 "kernel.py"')


def test_misaligned_global_and_shared():
    with pytest.raises(Misaligned, match="not a multiple of 8"):
        run("ld.global.u64 %rd5, [%rd0+4]; st.global.u64 [%rd0], %rd5;", {"source": u32(8)})
    with pytest.raises(Misaligned, match="not a multiple of 16"):
        run("mov.u32 %r1, dynamic; st.shared.v4.u32 [%r1+8], {%r1, %r1, %r1, %r1};", shared=64)
    run("mov.u32 %r1, dynamic; st.shared.v4.u32 [%r1+16], {%r1, %r1, %r1, %r1};", shared=64)


def test_shared_bounds():
    body = "mov.u32 %r1, dynamic; mad.lo.u32 %r1, %r50, 8, %r1; st.shared.u64 [%r1], %rd1;"
    with pytest.raises(OutOfBounds, match=r"offset 0xf8.*248 bytes of shared memory") as caught:
        run(body, shared=248)
    assert caught.value.thread == (31, 0, 0)
    run(body, shared=256)


SHARED_READ = """
    mov.u32 %r1, dynamic; mad.lo.u32 %r2, %r50, 4, %r1;
    setp.lt.u32 %p1, %r50, %r0; @%p1 st.shared.u32 [%r2], %r50; bar.sync 0;
    ld.shared.u32 %r3, [%r2]; mad.wide.u32 %rd5, %r50, 4, %rd0; st.global.u32 [%rd5], %r3;
"""


def test_read_of_unwritten_shared_memory():
    out = np.zeros(32, np.uint32)
    with pytest.raises(UninitializedShared, match=r"offset 0x74 that nobody wrote \(3 accesses in all\)") as caught:
        run(SHARED_READ, {"out": out}, scalars=(29,), shared=128)
    assert caught.value.thread == (29, 0, 0)
    run(SHARED_READ, {"out": out}, scalars=(32,), shared=128)
    assert (out == u32(32)).all()
    run(SHARED_READ, {"out": out}, scalars=(29,), shared=128, uninitialized_shared="poison")
    assert out[28:].tolist() == [28] + [2**32 - 1] * 3


def test_unwritten_bytes_inside_a_wider_read():
    body = """
        mov.u32 %r1, dynamic; mov.b16 %h1, 1; st.shared.b8 [%r1], %h1; st.shared.b8 [%r1+1], %h1;
        st.shared.b8 [%r1+3], %h1; ld.shared.u32 %r3, [%r1]; st.global.u32 [%rd0], %r3;
    """
    with pytest.raises(UninitializedShared):
        run(body, {"out": u32(1)}, shared=16)
    run(body.replace("[%r1+3], %h1;", "[%r1+3], %h1; st.shared.b8 [%r1+2], %h1;"), {"out": u32(1)}, shared=16)


def test_spans_that_overlap_are_one_memory():
    from cute_attn.emulator.memory import GlobalMemory, Span

    memory = GlobalMemory([Span(1000, 100, "a"), Span(1050, 100, "b"), Span(1200, 50, "c")])
    at = np.array([1000, 1096, 1146, 1200], np.uint64)
    assert memory.outside(at, 4) is None
    assert memory.outside(np.array([1148, 1198, 1248], np.uint64), 4).tolist() == [True, True, True]
    # Neighbours that touch are still two tensors.
    touching = GlobalMemory([Span(1000, 8, "a"), Span(1008, 8, "b")])
    assert touching.outside(np.array([1004], np.uint64), 8).tolist() == [True]


def test_addresses_of_parameters():
    """`mov` gives an address in parameter space, which cvta makes generic."""
    out = np.zeros(32, np.uint32)
    body = """
        mov.b64 %rd8, s1; ld.param.u32 %r8, [%rd8]; cvta.param.u64 %rd9, %rd8; ld.u32 %r9, [%rd9];
        cvta.to.param.u64 %rd9, %rd9; ld.param.u32 %r10, [%rd9-4]; add.u32 %r8, %r8, %r9; add.u32 %r8, %r8, %r10;
        mad.wide.u32 %rd5, %r51, 4, %rd0; st.global.u32 [%rd5], %r8;
    """
    run(body, {"out": out}, scalars=(1, 20))
    assert (out == 41).all()


def test_gaps_between_rows_of_a_strided_view_belong_to_its_span():
    """A span goes from the lowest to the highest byte of a view: the gap is no finding, what lies beyond it is."""
    storage = torch.zeros(4, 16, dtype=torch.int32)
    view = present([storage[1:3, :8]], ["x"]).spans[0]
    assert (view.start, view.nbytes) == (storage[1].data_ptr(), 4 * (16 + 8))
    memory = GlobalMemory([view])
    addresses = np.array([view.start + 4 * 12, view.end - 4], np.uint64)
    assert memory.outside(addresses, 4) is None
    assert memory.outside(addresses + np.uint64(4), 4).tolist() == [False, True]


@pytest.mark.parametrize("form,size", [("v8.b32", 4), ("v4.b64", 8)])
def test_accesses_of_32_bytes(form, size):
    count = 32 // size
    registers = [f"%{'r' if size == 4 else 'rd'}{n}" for n in range(10, 10 + count)]
    body = f"""
        mad.wide.u32 %rd5, %r50, 32, %rd0; mad.wide.u32 %rd6, %r50, 32, %rd1; setp.ne.u32 %p1, %r50, 3;
        ld.global.L2::evict_last.{form} {{{", ".join(registers)}}}, [%rd5];
        @%p1 st.global.{form} [%rd6], {{{", ".join(registers[::-1])}}};
    """
    memory = [np.zeros(300, np.uint32) for _ in range(2)]
    source, out = (a[(-a.ctypes.data % 32) // 4 :] for a in memory)
    source[:] = u32(len(source))
    source, whole, out = source[:256], source, out[:256]
    run(body, {"source": source, "out": out})
    expected = source.view(f"u{size}").reshape(32, count)[:, ::-1].copy()
    expected[3] = 0
    assert (out.view(f"u{size}").reshape(32, count) == expected).all()
    with pytest.raises(Misaligned, match="not a multiple of 32"):
        run(body, {"source": whole[4:], "out": out})
    with pytest.raises(UnknownInstruction):
        run("ld.shared.v8.b32 {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8}, [%r0];", shared=64)


def test_registers_of_16_bytes():
    source = np.arange(64, dtype=np.uint64) * 3
    out = np.zeros(64, np.uint64)
    body = """
        mad.wide.u32 %rd5, %r50, 16, %rd0; mad.wide.u32 %rd6, %r50, 16, %rd1; mov.u32 %r1, dynamic;
        mad.lo.u32 %r1, %r50, 16, %r1; ld.global.b128 %q0, [%rd5]; st.shared.b128 [%r1], %q0;
        ld.shared.b128 %q1, [%r1]; mov.b128 {%rd7, %rd8}, %q1; setp.lt.u32 %p1, %r50, 5;
        @%p1 mov.b128 %q1, {%rd8, %rd7}; mov.b128 %q2, %q1; st.global.b128 [%rd6], %q2;
    """
    run(body, {"source": source, "out": out}, shared=512, declarations=".reg .b128 %q<3>;")
    pairs = source.reshape(32, 2).copy()
    pairs[:5] = pairs[:5, ::-1]
    assert (out.reshape(32, 2) == pairs).all()


FLAG = """
    setp.ge.u32 %p1, %r51, 32; @%p1 bra WAITS;
    st.global.u32 [%rd0], 5; {release} bra END;
WAITS:
    ld.{load}.u32 %r1, [%rd0+4]; setp.eq.u32 %p2, %r1, 0; @%p2 bra WAITS;
    ld.global.u32 %r2, [%rd0]; mad.wide.u32 %rd5, %r50, 4, %rd0; st.global.u32 [%rd5+8], %r2;
END:
"""


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("load", ["acquire.gpu.global", "volatile", "relaxed.sys"])
@pytest.mark.parametrize("swap", [False, True])
def test_polling_a_flag(load, seed, swap):
    """Whoever polls lets the others run, in whichever of two CTAs they are."""
    memory = np.zeros(34, np.uint32)
    body = FLAG.format(load=load, release="st.release.gpu.global.u32 [%rd0+4], 1;")
    if swap:
        body = body.replace("setp.ge", "setp.lt")
    run(body, {"memory": memory}, grid=(2, 1, 1), seed=seed)
    assert memory.tolist() == [5, 1] + [5] * 32


def test_polling_a_flag_that_nobody_sets():
    with pytest.raises(Deadlock, match="polls for what nobody does"):
        run(FLAG.format(load="acquire.gpu.global", release=""), {"memory": np.zeros(34, np.uint32)}, grid=(2, 1, 1))


def test_a_long_loop_over_volatile_loads_is_no_deadlock():
    memory = u32(64)
    body = """
        mov.u32 %r1, 0; mov.u32 %r3, 0;
    LOOP: and.b32 %r2, %r1, 1; mad.wide.u32 %rd5, %r2, 4, %rd0; ld.volatile.global.u32 %r4, [%rd5];
        add.u32 %r3, %r3, %r4; add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 21000; @%p1 bra LOOP;
        st.global.u32 [%rd0+4], %r3;
    """
    run(body, {"memory": memory}, block=(1, 1, 1))
    assert memory[1] == 10500


def test_sleepers_let_the_others_run():
    memory = np.zeros(2, np.uint32)
    body = """
        setp.ge.u32 %p1, %r50, 32; @%p1 bra SETS;
    WAITS: nanosleep.u32 100; ld.global.u32 %r1, [%rd0]; setp.eq.u32 %p2, %r1, 0; @%p2 bra WAITS;
        st.global.u32 [%rd0+4], 9; bra END;
    SETS: st.global.u32 [%rd0], 1;
    END:
    """
    run(body, {"memory": memory}, block=(64, 1, 1))
    assert memory.tolist() == [1, 9]


def test_which_space_a_generic_address_is_in():
    out = np.zeros(8, np.uint32)
    body = """
        mov.u32 %r1, dynamic; cvt.u64.u32 %rd5, %r1; cvta.shared::cluster.u64 %rd5, %rd5; add.u64 %rd6, %rd5, 0x1000000;
        add.u64 %rd7, %rd5, 0x2000000; mov.b64 %rd8, __local_depot0; cvta.local.u64 %rd8, %rd8; mov.u32 %r9, 0;
    """
    tests = ["shared::cta %rd5", "shared::cta %rd6", "shared::cta %rd7", "shared::cluster %rd7", "local %rd8"]
    tests += ["global %rd0", "global %rd5", "shared %rd8"]
    for n, test in enumerate(tests):
        space, register = test.split()
        body += f"isspacep.{space} %p1, {register}; selp.u32 %r1, 1, 0, %p1; st.global.u32 [%rd0+{4 * n}], %r1;"
    run(body, {"out": out}, declarations=LOCAL, shared=16, block=(1, 1, 1))
    assert out.tolist() == [1, 1, 0, 1, 1, 1, 0, 0]


def test_bulk_zeros():
    out = np.zeros((32, 4), np.uint32)
    body = """
        mov.u32 %r1, dynamic; mad.lo.u32 %r2, %r50, 32, %r1; add.u32 %r3, %r50, 1; and.b32 %r4, %r50, 1;
        mul.wide.u32 %rd5, %r4, 8; add.u64 %rd5, %rd5, 8; setp.lt.u32 %p1, %r50, 30;
        st.shared.v4.u32 [%r2], {%r3, %r3, %r3, %r3}; @%p1 st.bulk.weak.shared::cta [%r2], %rd5, 0;
        ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r2]; mad.wide.u32 %rd6, %r50, 16, %rd0;
        st.global.v4.u32 [%rd6], {%r5, %r6, %r7, %r8};
    """
    run(body, {"out": out}, shared=1024)
    for t in range(32):
        zeros = 0 if t >= 30 else 4 if t % 2 else 2
        assert out[t].tolist() == [0] * zeros + [t + 1] * (4 - zeros)
    with pytest.raises(InvalidOperand, match="12 bytes"):
        run("mov.u32 %r1, dynamic; mov.b64 %rd5, 12; st.bulk.shared::cta [%r1], %rd5, 0;", shared=64)
    with pytest.raises(OutOfBounds):
        run("mov.u32 %r1, dynamic; mov.b64 %rd5, 72; st.bulk.shared::cta [%r1], %rd5, 0;", shared=64)
