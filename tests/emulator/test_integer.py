"""Integer instructions against exact arithmetic on Python integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .harness import evaluate, interesting

TYPES = {f"{k}{w}": np.dtype(f"{'int' if k == 's' else 'uint'}{w}") for k in "su" for w in (16, 32, 64)}


def wrap(value: int, dtype: np.dtype) -> int:
    """`value` modulo 2^width as `dtype` reads it."""
    width = 8 * dtype.itemsize
    value &= (1 << width) - 1
    return value - (1 << width) if dtype.kind == "i" and value >> (width - 1) else value


def expect(function, dtype, *inputs):
    return np.array([wrap(function(*(int(x) for x in xs)), dtype) for xs in zip(*inputs, strict=True)], dtype)


def truncated_quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("name", TYPES)
def test_arithmetic_wraps(name):
    dtype = TYPES[name]
    a, b, c = interesting(dtype), interesting(dtype, seed=1)[::-1].copy(), interesting(dtype, seed=2)
    for code, function in {
        f"add.{name} %d, %a, %b;": lambda x, y, z: x + y,
        f"sub.{name} %d, %a, %b;": lambda x, y, z: x - y,
        f"mul.lo.{name} %d, %a, %b;": lambda x, y, z: x * y,
        f"mad.lo.{name} %d, %a, %b, %c;": lambda x, y, z: x * y + z,
        f"mul.hi.{name} %d, %a, %b;": lambda x, y, z: x * y >> 8 * dtype.itemsize,
        f"min.{name} %d, %a, %b;": lambda x, y, z: min(x, y),
        f"max.{name} %d, %a, %b;": lambda x, y, z: max(x, y),
        f"sad.{name} %d, %a, %b, %c;": lambda x, y, z: z + abs(x - y),
    }.items():
        got = evaluate(code, [a, b, c], dtype)
        assert (got == expect(function, dtype, a, b, c)).all(), code


@pytest.mark.parametrize("name", TYPES)
def test_division_truncates(name):
    dtype = TYPES[name]
    a, b = interesting(dtype), interesting(dtype, seed=1)[::-1].copy()
    b[b == 0] = 5
    small = np.where(b % 37 == 0, 3, b % 37).astype(dtype)
    for divisor in (b, small):
        got = evaluate(f"div.{name} %d, %a, %b;", [a, divisor], dtype)
        assert (got == expect(truncated_quotient, dtype, a, divisor)).all()
        got = evaluate(f"rem.{name} %d, %a, %b;", [a, divisor], dtype)
        assert (got == expect(lambda x, y: x - truncated_quotient(x, y) * y, dtype, a, divisor)).all()


@pytest.mark.parametrize("name", ["s16", "u16", "s32", "u32"])
def test_wide_products(name):
    dtype = TYPES[name]
    wide = np.dtype(f"{dtype.name.rstrip('0123456789')}{16 * dtype.itemsize}")
    a, b = interesting(dtype), interesting(dtype, seed=3)
    assert (evaluate(f"mul.wide.{name} %d, %a, %b;", [a, b], wide) == expect(lambda x, y: x * y, wide, a, b)).all()
    c = interesting(wide, seed=4)
    got = evaluate(f"mad.wide.{name} %d, %a, %b, %c;", [a, b, c], wide)
    assert (got == expect(lambda x, y, z: x * y + z, wide, a, b, c)).all()


def test_multiply_24_bits():
    def low24(x):
        x &= 0xFFFFFF
        return x - (1 << 24) if x >> 23 else x

    a, b = interesting(np.int32), interesting(np.int32, seed=1)
    got = evaluate("mul24.lo.s32 %d, %a, %b;", [a, b], np.int32)
    assert (got == expect(lambda x, y: low24(x) * low24(y), np.dtype("int32"), a, b)).all()
    got = evaluate("mul24.hi.s32 %d, %a, %b;", [a, b], np.int32)
    assert (got == expect(lambda x, y: low24(x) * low24(y) >> 16, np.dtype("int32"), a, b)).all()


def test_add_saturates():
    a, b = interesting(np.int32), interesting(np.int32, seed=1)
    got = evaluate("add.sat.s32 %d, %a, %b;", [a, b], np.int32)
    assert (got == np.clip(a.astype(np.int64) + b, -(2**31), 2**31 - 1)).all()


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("constant", [None, 0, 1, 31, 32, 63, 64, 200])
def test_shifts_clamp(width, constant):
    amounts = interesting(np.uint32)
    if constant is not None:
        amounts = np.full_like(amounts, constant)
    operand = "%b" if constant is None else str(constant)
    u, s = (np.dtype(f"{k}{width}") for k in ("uint", "int"))
    for code, dtype, function in (
        (f"shl.b{width} %d, %a, {operand};", u, lambda x, n: x << min(n, width)),
        (f"shr.u{width} %d, %a, {operand};", u, lambda x, n: x >> min(n, width)),
        (f"shr.s{width} %d, %a, {operand};", s, lambda x, n: x >> min(n, width)),
    ):
        x = interesting(dtype)
        assert (evaluate(code, [x, amounts], dtype) == expect(function, dtype, x, amounts)).all(), code


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(mode):
    low, high, n = (interesting(np.uint32, seed=s) for s in (0, 1, 2))
    n[:100] %= 40

    def amount(k):
        return k & 31 if mode == "wrap" else min(k, 32)

    u = np.dtype("uint32")
    left = expect(lambda a, b, k: ((b << 32 | a) << amount(k)) >> 32, u, low, high, n)
    right = expect(lambda a, b, k: (b << 32 | a) >> amount(k), u, low, high, n)
    assert (evaluate(f"shf.l.{mode}.b32 %d, %a, %b, %c;", [low, high, n], np.uint32) == left).all()
    assert (evaluate(f"shf.r.{mode}.b32 %d, %a, %b, %c;", [low, high, n], np.uint32) == right).all()


@pytest.mark.parametrize("table", [0x00, 0xFF, 0x80, 0xFE, 0x96, 0xEA, 0xF8, 0xCA, 0x6A, 0x78, 0x1B, 0xD2, 0x27])
def test_lop3_is_its_table(table):
    a, b, c = (interesting(np.uint32, seed=s) for s in (0, 1, 2))

    def function(x, y, z):
        return sum((table >> ((x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1)) & 1) << i for i in range(32))

    got = evaluate(f"lop3.b32 %d, %a, %b, %c, {table:#x};", [a, b, c], np.uint32)
    assert (got == expect(function, np.dtype("uint32"), a, b, c)).all()


@pytest.mark.parametrize("name", ["or", "and", "xor"])
def test_lop3_with_a_predicate(name):
    a, b, c = (interesting(np.uint32, seed=s) & np.uint32(0x11) for s in (1, 2, 3))
    code = f"""
        setp.gt.u32 %p1, %c, 5; lop3.{name}.b32 %r1|%p2, %a, %b, %c, 0x80, %p1;
        lop3.{name}.b32 _|%p3, %a, %b, %c, 0x80, !%p1;
        selp.u32 %d, 1, 0, %p2; @%p3 add.u32 %d, %d, 2; shl.b32 %r1, %r1, 4; or.b32 %d, %d, %r1;
    """
    function = {"or": np.logical_or, "and": np.logical_and, "xor": np.logical_xor}[name]
    any_bit = (a & b & c) != 0
    expected = (a & b & c) << 4 | function(any_bit, c > 5) | 2 * function(any_bit, c <= 5)
    assert (evaluate(code, [a, b, c], np.uint32) == expected).all()


def test_logic():
    a, b = interesting(np.uint64), interesting(np.uint64, seed=1)
    for name, function in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
        assert (evaluate(f"{name}.b64 %d, %a, %b;", [a, b], np.uint64) == function(a, b)).all()
    assert (evaluate("not.b64 %d, %a;", [a], np.uint64) == ~a).all()
    assert (evaluate("cnot.b64 %d, %a;", [a], np.uint64) == (a == 0)).all()
    s = interesting(np.int32)
    assert (evaluate("neg.s32 %d, %a;", [s], np.int32) == -s).all()
    assert (evaluate("abs.s32 %d, %a;", [s], np.int32) == np.abs(s)).all()


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.uint64, np.int64])
def test_bit_field_extract(dtype):
    dtype = np.dtype(dtype)
    width = 8 * dtype.itemsize
    name = f"{'s' if dtype.kind == 'i' else 'u'}{width}"
    x, position, length = interesting(dtype), interesting(np.uint32, seed=1), interesting(np.uint32, seed=2)
    position[::2] %= 70
    length[::3] %= 70

    def function(value, pos, size):
        pos, size = pos & 255, size & 255
        bits = value & (1 << width) - 1
        top = min(pos + size - 1, width - 1)
        sign = 0 if dtype.kind == "u" or size == 0 else bits >> top & 1
        return sum(((bits >> pos + i & 1) if i < size and pos + i < width else sign) << i for i in range(width))

    got = evaluate(f"bfe.{name} %d, %a, %b, %c;", [x, position, length], dtype)
    assert (got == expect(function, dtype, x, position, length)).all()


@pytest.mark.parametrize("width", [32, 64])
def test_bit_field_insert(width):
    dtype = np.dtype(f"uint{width}")
    field, base = interesting(dtype), interesting(dtype, seed=1)
    for position, length in ((0, 8), (5, 0), (3, 40), (width - 4, 20), (0, width), (100, 3)):

        def function(f, c, pos=position, size=length):
            for i in range(size):
                if pos + i < width:
                    c = c & ~(1 << pos + i) | (f >> i & 1) << pos + i
            return c

        got = evaluate(f"bfi.b{width} %d, %a, %b, {position}, {length};", [field, base], dtype)
        assert (got == expect(function, dtype, field, base)).all(), (position, length)


@pytest.mark.parametrize("width", [32, 64])
def test_counting(width):
    x = interesting(np.dtype(f"uint{width}"))
    ints = [int(v) for v in x]
    assert evaluate(f"popc.b{width} %d, %a;", [x], np.uint32).tolist() == [bin(v).count("1") for v in ints]
    assert evaluate(f"clz.b{width} %d, %a;", [x], np.uint32).tolist() == [width - v.bit_length() for v in ints]
    reversed_bits = [int(f"{v:0{width}b}"[::-1], 2) for v in ints]
    assert evaluate(f"brev.b{width} %d, %a;", [x], x.dtype).tolist() == reversed_bits
    found = [(v.bit_length() - 1) & 0xFFFFFFFF for v in ints]
    assert evaluate(f"bfind.u{width} %d, %a;", [x], np.uint32).tolist() == found
    signed = [(max(v, ~v).bit_length() - 1) & 0xFFFFFFFF for v in (int(s) for s in x.view(f"int{width}"))]
    assert evaluate(f"bfind.s{width} %d, %a;", [x], np.uint32).tolist() == signed


def permuted(a: int, b: int, selector: int) -> int:
    data = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    out = []
    for n in range(4):
        nibble = selector >> 4 * n & 15
        byte = data[nibble & 7]
        out.append((255 if byte >> 7 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(out), "little")


@settings(max_examples=40, deadline=None)
@given(selector=st.integers(0, 0xFFFF), seed=st.integers(0, 1000))
def test_prmt(selector, seed):
    a, b = interesting(np.uint32, seed=seed), interesting(np.uint32, seed=seed + 1)
    expected = expect(lambda x, y: permuted(x, y, selector), np.dtype("uint32"), a, b)
    assert (evaluate(f"prmt.b32 %d, %a, %b, {selector:#x};", [a, b], np.uint32) == expected).all()
    register = np.full(len(a), selector, np.uint32)
    assert (evaluate("prmt.b32 %d, %a, %b, %c;", [a, b, register], np.uint32) == expected).all()


# Bytes named from the eight of {a, b}, as the ISA's table of modes lists them for selectors 0 to 3.
PRMT_MODES = {
    "f4e": ["3210", "4321", "5432", "6543"],
    "b4e": ["5670", "6701", "7012", "0123"],
    "rc8": ["0000", "1111", "2222", "3333"],
    "ecl": ["3210", "3211", "3222", "3333"],
    "ecr": ["0000", "1110", "2210", "3210"],
    "rc16": ["1010", "3232", "1010", "3232"],
}


@pytest.mark.parametrize("mode", PRMT_MODES)
def test_prmt_modes(mode):
    a, b, c = (interesting(np.uint32, seed=s) for s in (0, 1, 2))
    expected = expect(lambda x, y, z: permuted(x, y, int(PRMT_MODES[mode][z & 3], 16)), np.dtype("uint32"), a, b, c)
    assert (evaluate(f"prmt.b32.{mode} %d, %a, %b, %c;", [a, b, c], np.uint32) == expected).all()


@pytest.mark.parametrize("types", ["s32.s32", "u32.u32", "s32.u32", "u32.s32"])
def test_dp4a(types):
    a, b, c = interesting(np.uint32), interesting(np.uint32, seed=1), interesting(np.int32, seed=2)

    def byte(x, n, signed):
        value = x >> 8 * n & 255
        return value - 256 if signed and value > 127 else value

    sa, sb = (t[0] == "s" for t in types.split("."))
    expected = expect(
        lambda x, y, z: z + sum(byte(x, n, sa) * byte(y, n, sb) for n in range(4)), np.dtype("int32"), a, b, c
    )
    assert (evaluate(f"dp4a.{types} %d, %a, %b, %c;", [a, b, c], np.int32) == expected).all()


def test_carry_chain():
    a, b = interesting(np.uint64), interesting(np.uint64, seed=1)
    code = """
        mov.b64 {%r1, %r2}, %a; mov.b64 {%r3, %r4}, %b;
        OP.cc.u32 %r5, %r1, %r3; OPc.u32 %r6, %r2, %r4; mov.b64 %d, {%r5, %r6};
    """
    assert (evaluate(code.replace("OP", "add"), [a, b], np.uint64) == a + b).all()
    assert (evaluate(code.replace("OP", "sub"), [a, b], np.uint64) == a - b).all()


def test_szext_leaves_the_value_at_positions_past_the_end():
    x, position = np.array([-5, -5, 5, 6], np.int32), np.array([31, 256, 3, 300], np.uint32)
    assert evaluate("szext.clamp.s32 %d, %a, %b;", [x, position], np.int32).tolist() == [-5, -5, -3, 6]


@pytest.mark.parametrize("kind,dtype", [("u32", np.uint32), ("s32", np.int32), ("u64", np.uint64), ("s64", np.int64)])
def test_multiply_add_with_carry(kind, dtype):
    """The three-word product of a two-word number and a word, as mad.cc and madc chains compute it."""
    bits = 8 * np.dtype(dtype).itemsize
    low, high, factor = (interesting(np.dtype(f"u{bits // 8}"), seed=s) for s in (1, 2, 3))
    zero = f"mov.b{bits} %z, 0;"
    chain = f"""
        {{ .reg .b{bits} %z, %w0, %w1; {zero}
        mad.lo.cc.u{bits} %w0, %a, %c, %z; madc.hi.cc.u{bits} %w1, %a, %c, %z; madc.hi.u{bits} %d, %b, %c, %z;
        mad.lo.cc.{kind} %w1, %b, %c, %w1; addc.u{bits} %d, %d, 0; }}
    """
    result = evaluate(chain, [low, high, factor], low.dtype)
    wide = [(int(h) << bits | int(lo)) * int(f) >> 2 * bits for lo, h, f in zip(low, high, factor, strict=True)]
    assert result.tolist() == wide


def test_signed_high_half_with_carry():
    a, b, c = (interesting(np.int32, seed=s) for s in (4, 5, 6))
    got = evaluate("mad.hi.cc.s32 %d, %a, %b, %c; addc.u32 %d, 0, 0;", [a, b, c], np.uint32)
    high = [(int(x) * int(y) >> 32) % 2**32 + int(z) % 2**32 for x, y, z in zip(a, b, c, strict=True)]
    assert got.tolist() == [h >> 32 for h in high]
    got = evaluate("mad.hi.cc.s32 %d, %a, %b, %c;", [a, b, c], np.uint32)
    assert got.tolist() == [h % 2**32 for h in high]


@pytest.mark.parametrize("name", ["add", "min", "max"])
@pytest.mark.parametrize("kind,dtype", [("u16x2", np.uint16), ("s16x2", np.int16)])
def test_packed_halves(name, kind, dtype):
    a, b = (interesting(np.uint32, seed=s) for s in (7, 8))
    function = {"add": np.add, "min": np.minimum, "max": np.maximum}[name]
    expected = function(a.view(dtype), b.view(dtype)).view(np.uint32)
    assert (evaluate(f"{name}.{kind} %d, %a, %b;", [a, b], np.uint32) == expected).all()
    if name != "add" and kind == "s16x2":
        expected = np.maximum(expected.view(dtype), dtype(0)).view(np.uint32)
        assert (evaluate(f"{name}.relu.{kind} %d, %a, %b;", [a, b], np.uint32) == expected).all()


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_bit_mask(mode):
    a, b = (np.array(values, np.uint32) for values in zip(*[(x, y) for x in range(40) for y in range(40)], strict=True))

    def mask(start: int, width: int) -> int:
        if mode == "wrap":
            start, width = start % 32, width % 32
        return sum(1 << n for n in range(32) if start <= n < start + width)

    got = evaluate(f"bmsk.{mode}.b32 %d, %a, %b;", [a, b], np.uint32)
    assert got.tolist() == [mask(int(x), int(y)) for x, y in zip(a, b, strict=True)]


def test_find_nth_set_bit():
    rng = np.random.default_rng(9)
    masks = rng.integers(0, 2**32, 600, np.uint32) & rng.integers(0, 2**32, 600, np.uint32)
    bases, offsets = rng.integers(0, 32, 600, np.uint32), rng.integers(-6, 7, 600, np.int32)

    def find(mask: int, base: int, offset: int) -> int:
        if offset == 0:
            return base if mask >> base & 1 else 0xFFFF_FFFF
        positions = range(base, 32) if offset > 0 else range(base, -1, -1)
        hits = [p for p in positions if mask >> p & 1]
        return hits[abs(offset) - 1] if len(hits) >= abs(offset) else 0xFFFF_FFFF

    got = evaluate("fns.b32 %d, %a, %b, %c;", [masks, bases, offsets.view(np.uint32)], np.uint32)
    assert got.tolist() == [find(int(m), int(b), int(o)) for m, b, o in zip(masks, bases, offsets, strict=True)]
