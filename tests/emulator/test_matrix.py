"""ldmatrix, stmatrix, movmatrix and mma.sync: fragments laid out element by element as the PTX ISA defines them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from cute_attn.emulator.errors import DivergentWarp, Misaligned, OutOfBounds, UninitializedShared, UnknownInstruction

from .harness import run

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
HALF = {"f16": torch.float16, "bf16": torch.bfloat16}
SMALL = {"e3m2": (3, 2), "e2m3": (2, 3), "e2m1": (2, 1)}


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
    if kind in ("s4", "u4"):
        values = rng.integers(-8, 8, shape) if kind == "s4" else rng.integers(0, 16, shape)
        return values.astype(np.float64), (values & 15).astype(np.uint8)
    if kind in SMALL:
        codes = rng.integers(0, 2 ** (sum(SMALL[kind]) + 1), shape).astype(np.uint8)
        return np.vectorize(lambda code: small_float(kind, int(code)))(codes), codes
    if kind == "tf32":
        bits = rng.standard_normal(shape).astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
        return bits.view(np.float32).astype(np.float64), bits
    tensor = torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to({**HALF, **FP8}[kind])
    width = tensor.element_size()
    bits = tensor.view({1: torch.uint8, 2: torch.int16}[width]).numpy().view(f"uint{8 * width}")
    return tensor.double().numpy(), bits


def small_float(kind: str, code: int) -> float:
    """The value of a float without infinity and NaN whose sign is the top bit of its code."""
    exponent_bits, mantissa_bits = SMALL[kind]
    sign, rest = divmod(code, 2 ** (exponent_bits + mantissa_bits))
    exponent, mantissa = divmod(rest, 2**mantissa_bits)
    size = ((exponent > 0) + mantissa / 2**mantissa_bits) * 2.0 ** (max(exponent, 1) - 2 ** (exponent_bits - 1) + 1)
    return -size if sign else size


def packed(codes: np.ndarray, axis: int) -> np.ndarray:
    """Codes of 4 bits, two to a byte along `axis`, the first one below."""
    low, high = (np.take(codes, range(n, codes.shape[axis], 2), axis) for n in (0, 1))
    return low | high << 4


def fragments(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> list[np.ndarray]:
    """Per lane the registers' bytes of A, B and C, [32, bytes] each."""
    per_register = 4 // a.itemsize
    fa = np.stack([[a[a_element(n, i, per_register)] for i in range(a.size // 32)] for n in range(32)])
    fb = np.stack([[b[b_element(n, i, per_register)] for i in range(b.size // 32)] for n in range(32)])
    fc = np.stack([[c[c_element(n, i)] for i in range(4)] for n in range(32)])
    return [np.ascontiguousarray(f).view(np.uint8) for f in (fa, fb, fc)]


def run_mma(opcode: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, **options: Any) -> np.ndarray:
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
    run(f"mad.wide.u32 %rd5, %r50, 64, %rd0; {loads} {opcode} {operands}; {stores}", {"data": data}, **options)
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


@pytest.mark.parametrize(
    "kinds,k",
    [
        *itertools.product(("s8.s8", "u8.u8", "s8.u8", "u8.s8"), (16, 32)),
        *itertools.product(("s4.s4", "u4.u4", "s4.u4", "u4.s4"), (32, 64)),
    ],
)
def test_integer_mma_is_exact_and_wraps(kinds, k):
    rng = np.random.default_rng(k)
    first, second = kinds.split(".")
    a, a_codes = random_matrix(first, (16, k), rng)
    b, b_codes = random_matrix(second, (k, 8), rng)
    c = rng.integers(-(2**31), 2**31 - 1, (16, 8), np.int32)
    c[0], c[1] = 2**31 - 1, -(2**31)
    exact = a.astype(np.int64) @ b.astype(np.int64) + c
    operands = (packed(a_codes, 1), packed(b_codes, 0), c) if "4" in kinds else (a_codes, b_codes, c)
    got = run_mma(f"mma.sync.aligned.m16n8k{k}.row.col.s32.{kinds}.s32", *operands)
    assert (got == exact.astype(np.int32)).all()
    clamped = run_mma(f"mma.sync.aligned.m16n8k{k}.row.col.satfinite.s32.{kinds}.s32", *operands)
    assert (clamped == np.clip(exact, -(2**31), 2**31 - 1)).all() and (clamped != exact).any()


F8F6F4 = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1")


def in_containers(kind: str, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Codes in bytes as kind::f8f6f4 takes them, what the ISA calls padding filled with noise."""
    if kind not in SMALL:
        return codes
    noise = rng.integers(0, 256, codes.shape).astype(np.uint8)
    return noise & 0xC3 | codes << 2 if kind == "e2m1" else noise & 0xC0 | codes


@pytest.mark.parametrize("first", F8F6F4)
@pytest.mark.parametrize("second", F8F6F4)
def test_mma_of_every_mix_of_8_6_and_4_bit_floats(first, second):
    rng = np.random.default_rng(0)
    a, a_codes = random_matrix(first, (16, 32), rng)
    b, b_codes = random_matrix(second, (32, 8), rng)
    operands = in_containers(first, a_codes, rng), in_containers(second, b_codes, rng)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    got = run_mma(f"mma.sync.aligned.m16n8k32.row.col.kind::f8f6f4.f32.{first}.{second}.f32", *operands, c)
    assert np.allclose(got, a @ b + c, rtol=1e-5, atol=1e-5)
    half = c.astype(np.float16)
    got = run_mma(f"mma.sync.aligned.kind::f8f6f4.m16n8k32.row.col.f16.{first}.{second}.f16", *operands, half)
    assert np.abs(got - (a @ b + half)).max() <= np.spacing(np.abs(a @ b + half).max().astype(np.float16))


@pytest.mark.parametrize("kinds", ["e4m3.e5m2", "e5m2.e4m3", "e4m3.e4m3"])
@pytest.mark.parametrize("k", [16, 32])
def test_8_bit_floats_mix_and_sum_to_f16(kinds, k):
    rng = np.random.default_rng(k)
    first, second = kinds.split(".")
    (a, a_bits), (b, b_bits) = random_matrix(first, (16, k), rng), random_matrix(second, (k, 8), rng)
    c = rng.standard_normal((16, 8)).astype(np.float16)
    got = run_mma(f"mma.sync.aligned.m16n8k{k}.row.col.f16.{kinds}.f16", a_bits, b_bits, c)
    assert np.allclose(got.astype(np.float64), a @ b + c, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "form",
    [
        "m16n8k16.row.col.f32.f16.bf16.f32",
        "m16n8k16.row.col.f16.bf16.bf16.f16",
        "m16n8k16.row.col.f32.f16.f16.f16",
        "m16n8k16.col.row.f32.f16.f16.f32",
        "m16n8k32.row.col.f32.f16.f16.f32",
        "m16n8k32.row.col.f32.e2m1.e2m1.f32",
        "m16n8k16.row.col.kind::f8f6f4.f32.e4m3.e4m3.f32",
        "m16n8k16.row.col.satfinite.f32.f16.f16.f32",
        "m16n8k32.row.col.kind::mxf4.f32.e2m1.e2m1.f32",
        "m8n8k16.row.col.s32.s8.s8.s32",
        "m16n8k16.row.col.f32.f16.f16.f32.extra",
    ],
)
def test_forms_that_mma_does_not_have_are_unknown(form):
    with pytest.raises(UnknownInstruction):
        registers = "{%r1, %r2, %r3, %r4}"
        run(f"mma.sync.aligned.{form} {registers}, {registers}, {{%r5, %r6}}, {registers};")


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
    body = """
        mad.wide.u32 %rd5, %r50, 4, %rd0; mad.wide.u32 %rd6, %r50, 4, %rd1; ld.global.b32 %r1, [%rd5];
        setp.lt.u32 %p1, %r50, LIMIT; mov.b32 %r2, %r1;
        GUARD movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1; st.global.b32 [%rd6], %r2;
    """
    for guard, limit, expected in (("", 0, source.T), ("@%p1", 32, source.T), ("@%p1", 0, source)):
        out = np.zeros_like(source)
        run(body.replace("GUARD", guard).replace("LIMIT", str(limit)), {"source": source, "out": out})
        assert (out == expected).all()
    with pytest.raises(DivergentWarp, match="executed by 5 of the 32 lanes"):
        run(body.replace("GUARD", "@%p1").replace("LIMIT", "5"), {"source": source, "out": out})


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


# ---- bytes and packed elements


def test_ldmatrix_transposes_16x16_bytes():
    """Lanes 0 to 15 name the rows of the first matrix, 16 to 31 of the second; anywhere, in any order."""
    source = np.random.default_rng(0).integers(0, 256, (32, 16), np.uint8)
    rows = np.random.default_rng(1).permutation(32)
    for count in (1, 2):
        out = np.zeros((32, 2 * count), np.uint32)
        regs = ", ".join(f"%r{20 + n}" for n in range(2 * count))
        body = (
            fill_shared(4)
            + f"""
            bar.sync 0; mad.wide.u32 %rd6, %r50, 4, %rd1; ld.global.b32 %r4, [%rd6]; mad.lo.u32 %r4, %r4, 16, %r1;
            ldmatrix.sync.aligned.m16n16.x{count}.trans.shared::cta.b8 {{{regs}}}, [%r4];
            mad.wide.u32 %rd7, %r50, {8 * count}, %rd2;
        """
            + "".join(f"st.global.b32 [%rd7+{4 * n}], %r{20 + n};" for n in range(2 * count))
        )
        run(body, {"source": source, "rows": rows.astype(np.uint32), "out": out}, shared=512)
        got = out.view(np.uint8).reshape(32, 2 * count, 4)
        for matrix, lane, half, i in itertools.product(range(count), range(32), range(2), range(4)):
            # row 8 * half + g and column 4t + i of the transposed matrix
            in_memory = source[rows[16 * matrix + 4 * (lane % 4) + i]]
            assert got[lane, 2 * matrix + half, i] == in_memory[8 * half + lane // 4]


@pytest.mark.parametrize("form,bits", [("b4x16_p64", 4), ("b6x16_p32", 6)])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_widens_packed_elements(form, bits, transposed):
    """Only the packed elements are written to shared memory: the padding of a row is never read."""
    rng = np.random.default_rng(bits)
    elements = rng.integers(0, 2**bits, (32, 16))
    source = np.zeros((32, 16), np.uint8)
    for row in range(32):
        whole = sum(int(element) << bits * n for n, element in enumerate(elements[row]))
        source[row, : 2 * bits] = np.frombuffer(whole.to_bytes(2 * bits, "little"), np.uint8)
    out = np.zeros((32, 4), np.uint32)
    opcode = f"m16n16.x2.trans.shared.b8x16.{form}" if transposed else f"m8n16.x4.shared.b8x16.{form}"
    body = (
        "mov.u32 %r1, dynamic; mad.lo.u32 %r3, %r50, 16, %r1; mad.wide.u32 %rd5, %r50, 16, %rd0;"
        + "".join(f"ld.global.b32 %r2, [%rd5+{4 * n}]; st.shared.b32 [%r3+{4 * n}], %r2;" for n in range(bits // 2))
        + f"""
        bar.sync 0; ldmatrix.sync.aligned.{opcode} {{%r10, %r11, %r12, %r13}}, [%r3];
        mad.wide.u32 %rd6, %r50, 16, %rd1; st.global.v4.b32 [%rd6], {{%r10, %r11, %r12, %r13}};
    """
    )
    run(body, {"source": source, "out": out}, shared=512)
    got = out.view(np.uint8).reshape(32, 4, 4)
    for lane, register, i in itertools.product(range(32), range(4), range(4)):
        g, column = lane // 4, 4 * (lane % 4) + i
        if transposed:
            expected = elements[16 * (register // 2) + column, 8 * (register % 2) + g]
        else:
            expected = elements[8 * register + g, column]
        assert got[lane, register, i] == expected
    with pytest.raises(UninitializedShared):
        run(body.replace("st.shared.b32 [%r3+4]", "st.shared.b32 [%r3+12]"), {"source": source, "out": out}, shared=512)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_of_bytes(count):
    """The register of a 16x8 matrix: bytes as in an accumulator; memory has the columns as rows of 16 bytes."""
    source = np.random.default_rng(0).integers(0, 256, (32, count, 4), np.uint8)
    rows = np.random.default_rng(1).permutation(32)
    out = np.zeros((32, 16), np.uint8)
    regs = ", ".join(f"%r{20 + n}" for n in range(count))
    loads = "".join(f"ld.global.b32 %r{20 + n}, [%rd5+{4 * n}];" for n in range(count))
    body = f"""
        mov.u32 %r1, dynamic; mad.lo.u32 %r3, %r50, 16, %r1; mov.b32 %r9, 0;
        st.shared.v4.b32 [%r3], {{%r9, %r9, %r9, %r9}}; bar.sync 0; mad.wide.u32 %rd5, %r50, {4 * count}, %rd0; {loads}
        mad.wide.u32 %rd6, %r50, 4, %rd1; ld.global.b32 %r4, [%rd6]; mad.lo.u32 %r4, %r4, 16, %r1;
        stmatrix.sync.aligned.m16n8.x{count}.trans.shared.b8 [%r4], {{{regs}}}; bar.sync 0;
        ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r3];
        mad.wide.u32 %rd7, %r50, 16, %rd2; st.global.v4.b32 [%rd7], {{%r10, %r11, %r12, %r13}};
    """
    run(body, {"source": source, "rows": rows.astype(np.uint32), "out": out}, shared=512)
    expected = np.zeros((32, 16), np.uint8)
    for lane, matrix, i in itertools.product(range(32), range(count), range(4)):
        row, column = c_element(lane, i)
        expected[rows[8 * matrix + column], row] = source[lane, matrix, i]
    assert (out == expected).all()


@pytest.mark.parametrize(
    "opcode,registers",
    [
        ("ldmatrix.sync.aligned.m16n16.x1.shared.b8", 2),
        ("ldmatrix.sync.aligned.m16n16.x4.trans.shared.b8", 8),
        ("ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8", 1),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b8", 1),
        ("ldmatrix.sync.aligned.m8n16.x1.trans.shared.b8x16.b4x16_p64", 1),
        ("stmatrix.sync.aligned.m16n8.x1.shared.b8", 1),
    ],
)
def test_forms_that_matrix_moves_do_not_have_are_unknown(opcode, registers):
    regs = "{" + ", ".join(f"%r{10 + n}" for n in range(registers)) + "}"
    operands = f"[%r1], {regs}" if opcode.startswith("st") else f"{regs}, [%r1]"
    with pytest.raises(UnknownInstruction):
        run(f"mov.u32 %r1, dynamic; {opcode} {operands};", shared=512)


# ---- guards


GUARDED = """
    shr.u32 %r40, %r50, 5; setp.COMPARE.u32 %p1, %r40, LIMIT;
    mov.u32 %r1, dynamic; mad.lo.u32 %r3, %r50, 16, %r1; mad.wide.u32 %rd5, %r50, 16, %rd0;
    ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd5];
    @%p1 stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r3], {%r4, %r5, %r6, %r7};
    @!%p1 mov.u32 %r3, 0xfffffff8;
    mov.b32 %r10, 11; mov.b32 %r11, 12; mov.b32 %r12, 13; mov.b32 %r13, 14;
    @%p1 ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r3];
    mov.b32 %r20, %r4; mov.b32 %r21, %r5; mov.b32 %r22, %r6; mov.b32 %r23, %r7;
    @%p1 mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32
        {%r20, %r21, %r22, %r23}, {%r10, %r11, %r12, %r13}, {%r4, %r5}, {%r20, %r21, %r22, %r23};
    mad.wide.u32 %rd6, %r50, 32, %rd1; st.global.v4.b32 [%rd6], {%r10, %r11, %r12, %r13};
    st.global.v4.b32 [%rd6+16], {%r20, %r21, %r22, %r23};
"""


def test_guards_that_are_the_same_in_a_warp():
    """Warps whose guard is false keep their registers, and their addresses, out of bounds here, are not looked at."""
    source = np.random.default_rng(0).integers(0, 2**32, (96, 4), np.uint32)

    def values(compare: str) -> np.ndarray:
        out = np.zeros((3, 32, 8), np.uint32)
        body = GUARDED.replace("COMPARE", compare).replace("LIMIT", "1")
        run(body, {"source": source, "out": out}, block=(96, 1, 1), shared=96 * 16)
        return out

    some, every, none = values("ne"), values("ge"), values("gt")
    assert (values("lt")[0, :, 0] != 11).any()
    assert (some[1, :, :4] == [11, 12, 13, 14]).all() and (some[1, :, 4:] == source[32:64]).all()
    assert (some[2] == every[2]).all() and (every[2, :, :4] == source[64:]).all()
    assert (some[2, :, 4:] != source[64:]).any() and (none[0, :, 4:] == source[:32]).all()
    a = every[2, :, :4].copy().view(np.uint8).reshape(32, 16)
    b = source[64:, :2].copy().view(np.int8).reshape(32, 8)
    left, right = np.zeros((16, 32), np.int64), np.zeros((32, 8), np.int64)
    for lane, i in itertools.product(range(32), range(16)):
        left[a_element(lane, i, 4)] = a[lane, i]
    for lane, i in itertools.product(range(32), range(8)):
        right[b_element(lane, i, 4)] = b[lane, i]
    exact = left @ right
    for lane, i in itertools.product(range(32), range(4)):
        expected = exact[c_element(lane, i)] + int(source[64 + lane, i])
        assert int(every[2, lane, 4 + i]) == expected % 2**32


@pytest.mark.parametrize("name", ["stmatrix", "ldmatrix", "mma"])
def test_guards_that_split_a_warp_are_divergence(name):
    lines = GUARDED.replace("COMPARE", "ge").replace("LIMIT", "0").splitlines()
    body = "\n".join(line.replace("@%p1", "@%p2") if f"@%p1 {name}" in line else line for line in lines)
    out, source = np.zeros((32, 8), np.uint32), np.zeros((32, 4), np.uint32)
    for limit, finds in (("31", True), ("32", False)):
        text = f"setp.lt.u32 %p2, %r50, {limit};" + body
        if finds:
            with pytest.raises(DivergentWarp, match="executed by 31 of the 32 lanes"):
                run(text, {"source": source, "out": out}, shared=512)
        else:
            run(text, {"source": source, "out": out}, shared=512)
