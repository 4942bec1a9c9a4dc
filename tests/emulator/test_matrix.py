"""ldmatrix, stmatrix, movmatrix and mma.sync: fragments laid out element by element as the PTX ISA defines them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cute_attn.emulator.errors import DivergentWarp, Misaligned, OutOfBounds, UninitializedShared

from .harness import run

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
HALF = {"f16": torch.float16, "bf16": torch.bfloat16}


# ---- fragments (PTX ISA, "Matrix Fragments for mma.m16n8k8 / k16 / k32")


def a_element(lane: int, i: int, per_register: int) -> tuple[int, int]:
    """(row, k) of element i of lane's A fragment, `per_register` elements to a 32-bit register."""
    group, in_group = lane >> 2, lane & 3
    register, within = divmod(i, per_register)
    row = group + (8 if register & 1 else 0)
    return row, in_group * per_register + within + (4 * per_register if register >= 2 else 0)


def b_element(lane: int, i: int, per_register: int) -> tuple[int, int]:
    """(k, column) of element i of lane's B fragment."""
    register, within = divmod(i, per_register)
    return (lane & 3) * per_register + within + 4 * per_register * register, lane >> 2


def c_element(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (8 if i >= 2 else 0), (lane & 3) * 2 + (i & 1)


def random_matrix(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(float64 values, the elements' bit patterns)."""
    if kind in ("s8", "u8"):
        bits = rng.integers(0, 256, shape, np.uint8)
        return bits.view(np.int8 if kind == "s8" else np.uint8).astype(np.float64), bits
    if kind == "tf32":
        bits = rng.standard_normal(shape).astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
        return bits.view(np.float32).astype(np.float64), bits
    tensor = torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to({**HALF, **FP8}[kind])
    width = tensor.element_size()
    bits = tensor.view({1: torch.uint8, 2: torch.int16}[width]).numpy().view(f"uint{8 * width}")
    return tensor.double().numpy(), bits


def fragments(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> list[np.ndarray]:
    """Per lane the registers' bytes of A, B and C, [32, bytes] each."""
    per_register = 4 // a.itemsize
    fa = np.stack([[a[a_element(n, i, per_register)] for i in range(a.size // 32)] for n in range(32)])
    fb = np.stack([[b[b_element(n, i, per_register)] for i in range(b.size // 32)] for n in range(32)])
    fc = np.stack([[c[c_element(n, i)] for i in range(4)] for n in range(32)])
    return [np.ascontiguousarray(f).view(np.uint8) for f in (fa, fb, fc)]


def run_mma(opcode: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """One mma by one warp; a, b as bit patterns, c in the accumulator's dtype; D as [16, 8] of that dtype."""
    parts = fragments(a, b, c)
    data = np.zeros((32, 64), np.uint8)
    for start, part in zip((0, 16, 32), parts, strict=True):
        data[:, start : start + part.shape[1]] = part
    counts = [part.shape[1] // 4 for part in parts]
    names = iter(f"%r{n}" for n in range(1, 40))
    regs = [[next(names) for _ in range(n)] for n in (*counts, counts[2])]
    loads = "".join(
        f"ld.global.b32 {r}, [%rd5+{start + 4 * n}];"
        for start, group in zip((0, 16, 32), regs[:3], strict=True)
        for n, r in enumerate(group)
    )
    stores = "".join(f"st.global.b32 [%rd5+{48 + 4 * n}], {r};" for n, r in enumerate(regs[3]))
    operands = ", ".join("{" + ", ".join(g) + "}" for g in (regs[3], *regs[:3]))
    run(f"mad.wide.u32 %rd5, %r50, 64, %rd0; {loads} {opcode} {operands}; {stores}", {"data": data})
    result = np.zeros((16, 8), c.dtype)
    out = np.ascontiguousarray(data[:, 48 : 48 + 4 * c.itemsize]).view(c.dtype)
    for lane, i in itertools.product(range(32), range(4)):
        result[c_element(lane, i)] = out[lane, i]
    return result


@pytest.mark.parametrize(
    "kind,k", [("f16", 8), ("f16", 16), ("bf16", 8), ("bf16", 16), ("e4m3", 32), ("e5m2", 32), ("tf32", 4), ("tf32", 8)]
)
def test_floating_mma(kind, k):
    rng = np.random.default_rng(k)
    a, a_bits = random_matrix(kind, (16, k), rng)
    b, b_bits = random_matrix(kind, (k, 8), rng)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    got = run_mma(f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32", a_bits, b_bits, c)
    assert np.allclose(got, a @ b + c, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kinds", ["s8.s8", "u8.u8", "s8.u8", "u8.s8"])
@pytest.mark.parametrize("k", [16, 32])
def test_integer_mma_is_exact_and_wraps(kinds, k):
    rng = np.random.default_rng(k)
    first, second = kinds.split(".")
    a, a_bits = random_matrix(first, (16, k), rng)
    b, b_bits = random_matrix(second, (k, 8), rng)
    c = rng.integers(-(2**31), 2**31 - 1, (16, 8), np.int32)
    exact = a.astype(np.int64) @ b.astype(np.int64) + c
    got = run_mma(f"mma.sync.aligned.m16n8k{k}.row.col.s32.{kinds}.s32", a_bits, b_bits, c)
    assert (got == exact.astype(np.int32)).all()
    clamped = run_mma(f"mma.sync.aligned.m16n8k{k}.row.col.satfinite.s32.{kinds}.s32", a_bits, b_bits, c)
    assert (clamped == np.clip(exact, -(2**31), 2**31 - 1)).all()


def test_integer_mma_at_its_extremes():
    for first, second, x, y in (("u8", "u8", 255, 255), ("s8", "s8", -128, -128), ("u8", "s8", 255, -128)):
        a = np.full((16, 32), x % 256, np.uint8)
        b = np.full((32, 8), y % 256, np.uint8)
        c = np.zeros((16, 8), np.int32)
        got = run_mma(f"mma.sync.aligned.m16n8k32.row.col.s32.{first}.{second}.s32", a, b, c)
        assert (got == 32 * x * y).all()


def test_f16_accumulator_rounds():
    rng = np.random.default_rng(0)
    a, a_bits = random_matrix("f16", (16, 16), rng)
    b, b_bits = random_matrix("f16", (16, 8), rng)
    c = rng.standard_normal((16, 8)).astype(np.float16)
    got = run_mma("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16", a_bits, b_bits, c)
    assert np.allclose(got.astype(np.float64), a @ b + c, rtol=1e-3, atol=2e-3)
    assert got.dtype == np.float16


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_infinity_nan_and_subnormals_pass_through(kind):
    dtype = HALF[kind]
    values = torch.zeros(16, 16, dtype=dtype)
    values[0, 0], values[1, 3], values[2, 5] = float("inf"), float("nan"), -float("inf")
    values[3, 7] = torch.finfo(dtype).smallest_normal / 4
    values[4, 9], values[5, 1] = torch.finfo(dtype).max, -0.0
    one = torch.ones(16, 8, dtype=dtype)
    bits = [x.view(torch.int16).numpy().view(np.uint16) for x in (values, one)]
    got = run_mma(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32", *bits, np.zeros((16, 8), np.float32))
    assert np.array_equal(got[:, 0], values.double().sum(1).float().numpy(), equal_nan=True)


CHAIN = """
    mad.wide.u32 %rd5, %r50, 16, %rd0; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd5];
    mad.wide.u32 %rd6, %r50, 16, %rd1; ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd6];
    mov.b32 %r9, 0;
    MMA {%r10, %r11, %r12, %r13}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r9, %r9, %r9, %r9};
    MMA {%r20, %r21, %r22, %r23}, {%r1, %r2, %r3, %r4}, {%r7, %r8}, {%r9, %r9, %r9, %r9};
    MMA {%r30, %r31, %r32, %r33}, {%r2, %r1, %r4, %r3}, {%r7, %r8}, {%r10, %r11, %r12, %r13};
    MMA {%r20, %r21, %r22, %r23}, {%r3, %r4, %r1, %r2}, {%r5, %r6}, {%r20, %r21, %r22, %r23};
    EXTRA
    MMA {%r40, %r41, %r42, %r43}, {%r30, %r31, %r32, %r33}, {%r5, %r6}, {%r20, %r21, %r22, %r23};
    st.global.v4.b32 [%rd7], {%r30, %r31, %r32, %r33};
    st.global.v4.b32 [%rd7+16], {%r40, %r41, %r42, %r43};
"""


def test_fused_chains_equal_single_instructions():
    """Chains along k, shared fragments, a result used as an operand, and an accumulator that is also read elsewhere."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (32, 16), np.uint8) for _ in range(2))
    read_twice = "xor.b32 %r50, %r20, %r10; mad.wide.u32 %rd8, %r51, 4, %rd3; st.global.b32 [%rd8], %r50;"
    # A barrier before each mma makes it a block of its own: nothing can be fused there.
    for extra in ("", read_twice):
        results = []
        for separator in ("", "bar.sync 0;"):
            out, second = np.zeros((32, 8), np.int32), np.zeros(32, np.int32)
            mma = f"{separator} mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"
            body = "mad.wide.u32 %rd7, %r50, 32, %rd2;" + CHAIN.replace("EXTRA", extra).replace("MMA", mma)
            run(body, {"a": a, "b": b, "out": out, "second": second})
            results.append((out, second))
        (fused, fused_second), (single, single_second) = results
        assert (fused == single).all() and fused.any()
        assert (fused_second == single_second).all() and fused_second.any() == bool(extra)


@pytest.mark.parametrize("b_step", [0, 512])
def test_ldmatrix_into_mma_with_operands_shared_by_warps_or_not(b_step):
    """Two warps multiply their own A with one B, or each with its own; both operands come by ldmatrix."""
    rng = np.random.default_rng(0)
    (a, a_bits), (b, b_bits) = (random_matrix("f16", (32, 16), rng) for _ in range(2))
    source = np.concatenate([a_bits.reshape(-1), b_bits.reshape(-1)])
    out = np.zeros((2, 16, 16), np.float32)
    body = f"""
        mov.u32 %r1, dynamic; mad.wide.u32 %rd5, %r50, 32, %rd0; mad.lo.u32 %r2, %r50, 32, %r1;
        cp.async.cg.shared.global [%r2], [%rd5], 16; cp.async.cg.shared.global [%r2+16], [%rd5+16], 16;
        cp.async.wait_all; bar.sync 0;
        shr.u32 %r3, %r50, 5; and.b32 %r4, %r50, 15; shr.u32 %r5, %r50, 4; and.b32 %r5, %r5, 1;
        mad.lo.u32 %r6, %r3, 512, %r1; mad.lo.u32 %r6, %r4, 32, %r6; mad.lo.u32 %r6, %r5, 16, %r6;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r6];
        mad.lo.u32 %r7, %r3, {b_step}, %r1; mad.lo.u32 %r7, %r4, 32, %r7; mad.lo.u32 %r7, %r5, 16, %r7;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r14, %r15, %r16, %r17}}, [%r7+1024];
        mov.b32 %r9, 0;
        MMA {{%r20, %r21, %r22, %r23}}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r16}}, {{%r9, %r9, %r9, %r9}};
        MMA {{%r24, %r25, %r26, %r27}}, {{%r10, %r11, %r12, %r13}}, {{%r15, %r17}}, {{%r9, %r9, %r9, %r9}};
        and.b32 %r30, %r50, 31; shr.u32 %r31, %r30, 2; and.b32 %r32, %r30, 3;
        mad.wide.u32 %rd6, %r3, 1024, %rd1; mad.wide.u32 %rd6, %r31, 64, %rd6; mad.wide.u32 %rd6, %r32, 8, %rd6;
        st.global.v2.b32 [%rd6], {{%r20, %r21}}; st.global.v2.b32 [%rd6+512], {{%r22, %r23}};
        st.global.v2.b32 [%rd6+32], {{%r24, %r25}}; st.global.v2.b32 [%rd6+544], {{%r26, %r27}};
    """.replace("MMA", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
    run(body, {"source": source, "out": out}, block=(64, 1, 1), shared=2048)
    for warp in range(2):
        second = b[16 * warp : 16 * warp + 16] if b_step else b[:16]
        assert np.allclose(out[warp], a[16 * warp : 16 * warp + 16] @ second.T, rtol=1e-5, atol=1e-5)


def test_long_integer_chains_stay_exact():
    """17 products of 32 · 255 · 255 pass 2^24, where float32 would begin to round."""
    mma = "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%r10, %r11, %r12, %r13}, {%r1, %r1, %r1, %r1}, {%r1, %r1},"
    body = "mov.b32 %r1, 0xffffffff; mov.b32 %r9, 1;" + mma + "{%r9, %r9, %r9, %r9};"
    body += (mma + "{%r10, %r11, %r12, %r13};") * 16
    body += "mad.wide.u32 %rd5, %r50, 4, %rd0; st.global.b32 [%rd5], %r12;"
    out = np.zeros(32, np.int32)
    run(body, {"out": out})
    assert (out == 17 * 32 * 255 * 255 + 1).all()


# ---- ldmatrix, stmatrix, movmatrix


def fill_shared(words: int) -> str:
    """Copies `words` 32-bit words per lane from the first array to shared memory."""
    return "mov.u32 %r1, dynamic;" + "".join(
        f"mad.wide.u32 %rd5, %r50, {4 * words}, %rd0; ld.global.b32 %r2, [%rd5+{4 * n}];"
        f"mad.lo.u32 %r3, %r50, {4 * words}, %r1; st.shared.b32 [%r3+{4 * n}], %r2;"
        for n in range(words)
    )


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(count, trans):
    source = np.random.default_rng(0).integers(0, 2**16, (4, 8, 8), np.uint16)
    rows = np.random.default_rng(1).permutation(32)
    out = np.zeros((32, count), np.uint32)
    regs = ", ".join(f"%r{20 + n}" for n in range(count))
    body = (
        fill_shared(4)
        + f"""
        bar.sync 0; mad.wide.u32 %rd6, %r50, 4, %rd1; ld.global.b32 %r4, [%rd6]; mad.lo.u32 %r4, %r4, 16, %r1;
        ldmatrix.sync.aligned.m8n8.x{count}{".trans" if trans else ""}.shared::cta.b16 {{{regs}}}, [%r4];
        mad.wide.u32 %rd7, %r50, {4 * count}, %rd2;
    """
        + "".join(f"st.global.b32 [%rd7+{4 * n}], %r{20 + n};" for n in range(count))
    )
    run(body, {"source": source, "rows": rows.astype(np.uint32), "out": out}, shared=512)
    flat = source.reshape(32, 8)
    for j in range(count):
        matrix = np.stack([flat[rows[8 * j + r]] for r in range(8)])
        matrix = matrix.T if trans else matrix
        for lane in range(32):
            low, high = matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]
            assert out[lane, j] == int(low) | int(high) << 16


@pytest.mark.parametrize("trans", [False, True])
def test_stmatrix_is_the_inverse(trans):
    source = np.random.default_rng(0).integers(0, 2**32, (32, 4), np.uint32)
    out = np.zeros_like(source)
    t = ".trans" if trans else ""
    body = f"""
        mov.u32 %r1, dynamic; mad.lo.u32 %r2, %r50, 16, %r1; mad.wide.u32 %rd5, %r50, 16, %rd0;
        ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%rd5];
        stmatrix.sync.aligned.m8n8.x4{t}.shared.b16 [%r2], {{%r3, %r4, %r5, %r6}}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{t}.shared.b16 {{%r7, %r8, %r9, %r10}}, [%r2];
        mad.wide.u32 %rd6, %r50, 16, %rd1; st.global.v4.b32 [%rd6], {{%r7, %r8, %r9, %r10}};
    """
    run(body, {"source": source, "out": out}, shared=512)
    assert (out == source).all()


def test_movmatrix_transposes():
    source = np.random.default_rng(0).integers(0, 2**16, (8, 8), np.uint16)
    out = np.zeros_like(source)
    body = """
        mad.wide.u32 %rd5, %r50, 4, %rd0; mad.wide.u32 %rd6, %r50, 4, %rd1; ld.global.b32 %r1, [%rd5];
        movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1; st.global.b32 [%rd6], %r2;
    """
    run(body, {"source": source, "out": out})
    assert (out == source.T).all()


LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r3];"
PLACE = "mov.u32 %r1, dynamic; mad.lo.u32 %r3, %r50, 16, %r1;"


def test_ldmatrix_findings():
    source = np.zeros((32, 4), np.uint32)
    clean = fill_shared(4) + "bar.sync 0;" + LDMATRIX
    run(clean, {"source": source}, shared=512)
    with pytest.raises(UninitializedShared) as caught:
        run(
            PLACE + "setp.lt.u32 %p1, %r50, 19; @%p1 st.shared.v4.b32 [%r3], {%r1, %r1, %r1, %r1};" + LDMATRIX,
            shared=512,
        )
    assert caught.value.thread == (19, 0, 0)
    with pytest.raises(OutOfBounds, match="496 bytes of shared memory") as caught:
        run(clean, {"source": source}, shared=496)
    with pytest.raises(Misaligned):
        run(clean.replace("[%r3];", "[%r3+8];"), {"source": source}, shared=1024)


@pytest.mark.parametrize(
    "instruction",
    [
        LDMATRIX,
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r20, %r21, %r22, %r23}, {%r4, %r4, %r4, %r4}, {%r4, %r4},"
        " {%r4, %r4, %r4, %r4};",
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r3], {%r4, %r4, %r4, %r4};",
    ],
)
def test_warp_wide_instruction_under_divergence(instruction):
    prepare = PLACE + "mov.b32 %r4, 0; st.shared.v4.b32 [%r3], {%r4, %r4, %r4, %r4}; bar.sync 0;"
    body = prepare + f"setp.ge.u32 %p1, %r50, LIMIT; @%p1 bra SKIP; {instruction} SKIP: mov.b32 %r5, 0;"
    with pytest.raises(DivergentWarp, match="executed by 30 of the 32 lanes"):
        run(body.replace("LIMIT", "62"), block=(64, 1, 1), shared=1024)
    run(body.replace("LIMIT", "32"), block=(64, 1, 1), shared=1024)


def test_uniform_fragments_in_groups_of_changing_size():
    """Warps leave the loop one after another while both operands stay the same scalars in registers."""
    out = np.zeros(128, np.float32)
    body = """
        mov.b32 %r10, 0x3c003c00; mov.b32 %r21, 0; shr.u32 %r30, %r50, 5; bar.sync 0;
    LOOP:
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
            {%r21, %r22, %r23, %r24}, {%r10, %r10, %r10, %r10}, {%r10, %r10}, {%r21, %r21, %r21, %r21};
        setp.ne.u32 %p1, %r30, 0; sub.u32 %r30, %r30, 1; @%p1 bra LOOP;
        mad.wide.u32 %rd5, %r50, 4, %rd0; st.global.b32 [%rd5], %r21;
    """
    run(body, {"out": out}, block=(128, 1, 1))
    assert out.tolist() == [16.0 * (warp + 1) for warp in range(4) for _ in range(32)]
