"""Block-scaled mma.sync: scales and selectors placed element by element as the PTX ISA defines them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from cute_attn.emulator.errors import InvalidOperand, UnknownInstruction

from .harness import run
from .test_matrix import F8F6F4, a_element, b_element, c_element, in_containers, packed, random_matrix

MXF4 = "mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0"
NVF4 = "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::"
KINDS = {
    "mxf4": (MXF4, 2, "ue8m0"),
    "mxf4 by default": (MXF4.replace(".scale_vec::2X", ""), 2, "ue8m0"),
    "mxf4nvf4 2X": (NVF4 + "2X.f32.e2m1.e2m1.f32.ue8m0", 2, "ue8m0"),
    "mxf4nvf4 4X ue8m0": (NVF4 + "4X.f32.e2m1.e2m1.f32.ue8m0", 4, "ue8m0"),
    "mxf4nvf4 4X": (NVF4 + "4X.f32.e2m1.e2m1.f32.ue4m3", 4, "ue4m3"),
}


def mxf8f6f4(first: str, second: str) -> str:
    return f"mma.sync.aligned.kind::mxf8f6f4.block_scale.scale_vec::1X.m16n8k32.row.col.f32.{first}.{second}.f32.ue8m0"


def scale_value(kind: str, code: int) -> float:
    if kind == "ue8m0":
        return 2.0 ** (code - 127)
    exponent, mantissa = divmod(code & 0x7F, 8)
    return ((exponent > 0) + mantissa / 8) * 2.0 ** (max(exponent, 1) - 7)


def random_scales(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    low, high = (117, 137) if kind == "ue8m0" else (0, 127)
    return rng.integers(low, high, shape).astype(np.uint8)


def scale_lanes(codes: np.ndarray, byte_id: int, thread_id: int, rng: np.random.Generator) -> np.ndarray:
    """The scales' register of every lane: codes [16 rows of A or 8 columns of B, scales]; noise everywhere else."""
    lanes = rng.integers(0, 256, (32, 4)).astype(np.uint8)
    rows, scales = codes.shape
    for row, n in itertools.product(range(rows), range(scales)):
        lane = 4 * (row % 8) + (2 * thread_id + row // 8 if rows == 16 else thread_id)
        lanes[lane, byte_id + n] = codes[row, n]
    return lanes


def fragments(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, ...]:
    """Bytes of the registers per lane, from matrices of bytes."""
    fa = np.stack([[a[a_element(lane, i, 4)] for i in range(16)] for lane in range(32)])
    fb = np.stack([[b[b_element(lane, i, 4)] for i in range(8)] for lane in range(32)])
    fc = np.stack([[c[c_element(lane, i)] for i in range(4)] for lane in range(32)])
    return fa, fb, np.ascontiguousarray(fc)


LOAD = """
    mad.wide.u32 %rd5, %r50, 64, %rd0;
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd5]; ld.global.v2.b32 {%r5, %r6}, [%rd5+16];
    ld.global.b32 %r7, [%rd5+24]; ld.global.b32 %r8, [%rd5+28];
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd5+32];
"""
STORE = "st.global.v4.b32 [%rd5+48], {%r10, %r11, %r12, %r13};"
OPERANDS = "{%r10, %r11, %r12, %r13}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r10, %r11, %r12, %r13}"


def run_scaled(
    opcode: str,
    operands: tuple[np.ndarray, ...],
    lanes_a: np.ndarray,
    lanes_b: np.ndarray,
    selectors: tuple[Any, ...],
    before: str = "",
    **options: Any,
) -> np.ndarray:
    """D [16, 8] of one mma by one warp. selectors: byte-id and thread-id of A and of B, as written in the operands."""
    data = np.zeros((32, 64), np.uint8)
    fa, fb, fc = fragments(*operands)
    for start, part in ((0, fa), (16, fb), (24, lanes_a), (28, lanes_b), (32, fc.view(np.uint8))):
        data[:, start : start + part.shape[1]] = part
    byte_a, thread_a, byte_b, thread_b = selectors
    mma = f"{opcode} {OPERANDS}, {{%r7}}, {{{byte_a}, {thread_a}}}, {{%r8}}, {{{byte_b}, {thread_b}}};"
    run(LOAD + before + mma + STORE, {"data": data}, **options)
    out = np.ascontiguousarray(data[:, 48:64]).view(np.float32)
    result = np.zeros((16, 8), np.float32)
    for lane, i in itertools.product(range(32), range(4)):
        result[c_element(lane, i)] = out[lane, i]
    return result


def exact(a: np.ndarray, b: np.ndarray, scales_a: np.ndarray, scales_b: np.ndarray, kind: str) -> np.ndarray:
    """float64 product of [16, k] and [k, 8], each block of k scaled."""
    block = a.shape[1] // scales_a.shape[1]
    factor_a, factor_b = (
        np.repeat(np.vectorize(lambda code: scale_value(kind, int(code)))(s), block, axis=1)
        for s in (scales_a, scales_b)
    )
    return (a * factor_a) @ (b * factor_b.T)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("thread_a,thread_b", [(0, 0), (1, 2), (0, 3), (1, 1)])
def test_4_bit_kinds(name, thread_a, thread_b):
    opcode, scales, kind = KINDS[name]
    rng = np.random.default_rng(0)
    (a, a_codes), (b, b_codes) = random_matrix("e2m1", (16, 64), rng), random_matrix("e2m1", (64, 8), rng)
    scales_a, scales_b = random_scales(kind, (16, scales), rng), random_scales(kind, (8, scales), rng)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    for byte_a, byte_b in [(0, 0)] if scales == 4 else [(0, 2), (2, 0)]:
        lanes = scale_lanes(scales_a, byte_a, thread_a, rng), scale_lanes(scales_b, byte_b, thread_b, rng)
        operands = packed(a_codes, 1), packed(b_codes, 0), c
        got = run_scaled(opcode, operands, *lanes, (byte_a, thread_a, byte_b, thread_b))
        product = exact(a, b, scales_a, scales_b, kind)
        assert np.allclose(got, product + c, rtol=1e-5, atol=1e-5 * np.abs(product).max())


@pytest.mark.parametrize("first", F8F6F4)
@pytest.mark.parametrize("second", F8F6F4)
def test_mxf8f6f4(first, second):
    rng = np.random.default_rng(0)
    (a, a_codes), (b, b_codes) = random_matrix(first, (16, 32), rng), random_matrix(second, (32, 8), rng)
    scales_a, scales_b = random_scales("ue8m0", (16, 1), rng), random_scales("ue8m0", (8, 1), rng)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    operands = in_containers(first, a_codes, rng), in_containers(second, b_codes, rng), c
    byte_a, thread_a = F8F6F4.index(first) % 4, F8F6F4.index(second) % 2
    byte_b, thread_b = F8F6F4.index(second) % 4, F8F6F4.index(first) % 4
    lanes = scale_lanes(scales_a, byte_a, thread_a, rng), scale_lanes(scales_b, byte_b, thread_b, rng)
    got = run_scaled(mxf8f6f4(first, second), operands, *lanes, (byte_a, thread_a, byte_b, thread_b))
    product = exact(a, b, scales_a, scales_b, "ue8m0")
    assert np.allclose(got, product + c, rtol=1e-5, atol=1e-5 * np.abs(product).max())


def test_extreme_scales():
    """2^100 times 2^-120: neither factor's product with an element need fit into float32, D does. NaN is NaN."""
    rng = np.random.default_rng(0)
    (a, a_codes), (b, b_codes) = random_matrix("e5m2", (16, 32), rng), random_matrix("e4m3", (32, 8), rng)
    scales_a, scales_b = np.full((16, 1), 127 + 125, np.uint8), np.full((8, 1), 127 - 120, np.uint8)
    scales_a[3], scales_b[5] = 0, 255
    c = np.zeros((16, 8), np.float32)
    lanes = scale_lanes(scales_a, 1, 0, rng), scale_lanes(scales_b, 2, 1, rng)
    got = run_scaled(mxf8f6f4("e5m2", "e4m3"), (a_codes, b_codes, c), *lanes, (1, 0, 2, 1))
    product = exact(a, b, scales_a, scales_b, "ue8m0")
    keep = np.arange(8) != 5
    assert np.isnan(got[:, 5]).all()
    assert np.allclose(got[:, keep], product[:, keep], rtol=1e-5, atol=1e-5 * np.abs(product[4]).max())
    assert (np.abs(got[:3, keep]) > 1).any() and (np.abs(got[3, keep]) < 1e-30).all()


def ones() -> tuple[np.ndarray, ...]:
    return np.full((16, 32), 0x22, np.uint8), np.full((32, 8), 0x22, np.uint8), np.zeros((16, 8), np.float32)


def test_selectors_in_registers():
    """They may differ from warp to warp, but not within a warp, and only the listed values are allowed."""
    lanes_a = np.zeros((32, 4), np.uint8)
    lanes_a[:, :] = np.arange(4) + 125  # byte n of every lane: 2^(n - 2)
    lanes_b = np.full((32, 4), 127, np.uint8)
    lanes_b[3::4] = 128
    set_up = "mov.u16 %h1, 2; mov.u16 %h2, 1; mov.u16 %h3, 0; mov.u16 %h4, 3;"
    got = run_scaled(KINDS["mxf4"][0], ones(), lanes_a, lanes_b, ("%h1", "%h2", "%h3", "%h4"), set_up)
    assert (got == 32 * 2.0 + 32 * 4.0).all()
    loaded = set_up + "mov.u32 %r40, %ctaid.x; cvt.u16.u32 %h1, %r40;"
    got = run_scaled(KINDS["mxf4"][0], ones(), lanes_a, lanes_b, ("%h1", "%h2", "%h3", "%h4"), loaded)
    assert (got == 32 * 0.5 + 32 * 1.0).all()
    for wrong, value in (("mov.u16 %h1, 1;", "byte-id-a is 1"), ("mov.u16 %h4, 4;", "thread-id-b is 4")):
        with pytest.raises(InvalidOperand, match=value):
            run_scaled(KINDS["mxf4"][0], ones(), lanes_a, lanes_b, ("%h1", "%h2", "%h3", "%h4"), set_up + wrong)
    uneven = set_up + "setp.eq.u32 %p1, %r50, 7; @%p1 mov.u16 %h1, 0;"
    with pytest.raises(InvalidOperand, match="the same in a warp") as caught:
        run_scaled(KINDS["mxf4"][0], ones(), lanes_a, lanes_b, ("%h1", "%h2", "%h3", "%h4"), uneven)
    assert caught.value.thread == (7, 0, 0)


@pytest.mark.parametrize(
    "opcode",
    [
        NVF4 + "2X.f32.e2m1.e2m1.f32.ue4m3",
        NVF4.replace(".scale_vec::", "") + ".f32.e2m1.e2m1.f32.ue8m0",
        MXF4.replace("2X", "4X"),
        MXF4.replace("ue8m0", "ue4m3"),
        MXF4.replace("e2m1.e2m1", "e2m1.e4m3"),
        MXF4.replace("f32", "f16"),
        mxf8f6f4("e4m3", "e4m3").replace("1X", "2X"),
        mxf8f6f4("e4m3", "f16"),
    ],
)
def test_forms_that_do_not_exist_are_unknown(opcode):
    scales = np.full((32, 4), 127, np.uint8)
    with pytest.raises(UnknownInstruction):
        run_scaled(opcode, ones(), scales, scales, (0, 0, 0, 0))


def test_without_scale_operands_it_is_unknown():
    with pytest.raises(UnknownInstruction):
        run(f"{LOAD} {MXF4} {OPERANDS};", {"data": np.zeros((32, 64), np.uint8)})


CHAIN = """
    and.b32 %r40, %r50, ELEMENTS; mad.wide.u32 %rd5, %r40, 32, %rd0;
    and.b32 %r41, %r50, SCALES; mad.wide.u32 %rd8, %r41, 32, %rd0; mad.wide.u32 %rd6, %r50, 16, %rd1;
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd6];
    ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd5]; ld.global.v2.b32 {%r30, %r31}, [%rd8+16];
    mov.b32 %r9, 0;
    MMA {%r10, %r11, %r12, %r13}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r9, %r9, %r9, %r9},
        %r30, {0, 0}, %r31, {0, 0};
    MMA {%r20, %r21, %r22, %r23}, {%r1, %r2, %r3, %r4}, {%r7, %r8}, {%r9, %r9, %r9, %r9},
        %r30, {0, 0}, %r31, {0, 1};
    MMA {%r10, %r11, %r12, %r13}, {%r2, %r1, %r4, %r3}, {%r7, %r8}, {%r10, %r11, %r12, %r13},
        %r30, {0, 1}, %r31, {0, 2};
    MMA {%r20, %r21, %r22, %r23}, {%r2, %r1, %r4, %r3}, {%r5, %r6}, {%r20, %r21, %r22, %r23},
        %r30, {0, 1}, %r31, {0, 3};
    mad.wide.u32 %rd7, %r50, 32, %rd2;
    st.global.v4.b32 [%rd7], {%r10, %r11, %r12, %r13}; st.global.v4.b32 [%rd7+16], {%r20, %r21, %r22, %r23};
"""


@pytest.mark.parametrize("elements,scales", [(31, 31), (127, 127), (31, 127), (127, 31)])
def test_fused_chains_equal_single_instructions(elements, scales):
    """Chains that share A and its scales; four warps with one B or one set of scales (mask 31), or each its own."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (128, 16), np.uint8)
    b = rng.integers(0, 256, (128, 32), np.uint8)
    b[:, 16:] = rng.integers(0x30, 0x40, (128, 16))
    results = []
    for separator in ("", "bar.sync 0;"):  # a barrier before each mma makes it a block of its own
        out = np.zeros((128, 8), np.float32)
        body = CHAIN.replace("MMA", separator + KINDS["mxf4nvf4 4X"][0])
        run(
            body.replace("ELEMENTS", str(elements)).replace("SCALES", str(scales)),
            {"b": b, "a": a, "out": out},
            block=(128, 1, 1),
        )
        results.append(out)
    assert np.allclose(*results, rtol=1e-5, atol=1e-4) and np.abs(results[0]).min(axis=0).all()
    lane = np.arange(32)
    for warp in range(4):  # each warp alone, as the only one of its CTA
        own = np.concatenate([b[(32 * warp + lane) & elements, :16], b[(32 * warp + lane) & scales, 16:]], axis=1)
        alone = np.zeros((32, 8), np.float32)
        run(
            body.replace("ELEMENTS", "31").replace("SCALES", "31"),
            {"b": own, "a": a[32 * warp : 32 * warp + 32], "out": alone},
        )
        assert np.allclose(results[0][32 * warp : 32 * warp + 32], alone, rtol=1e-5, atol=1e-4)
