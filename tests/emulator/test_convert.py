"""cvt against torch (bf16, fp8), numpy (f16) and exact arithmetic (integers)."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch

from cute_attn.emulator import formats
from cute_attn.emulator.errors import UnknownInstruction

from .harness import evaluate, interesting, interesting_floats, run, same_bits

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
INTEGERS = {f"{k}{w}": np.dtype(f"{'int' if k == 's' else 'uint'}{w}") for k in "su" for w in (8, 16, 32, 64)}


def register_of(dtype: np.dtype) -> np.dtype:
    """The narrowest register that holds the type: 8-bit values live in 16 bits."""
    return dtype if dtype.itemsize > 1 else np.dtype("int16" if dtype.kind == "i" else "uint16")


def bits_of(x: torch.Tensor) -> np.ndarray:
    width = {2: torch.int16, 1: torch.uint8}[x.element_size()]
    return x.view(width).numpy().view(f"uint{8 * x.element_size()}").copy()


@pytest.mark.parametrize("kind", FP8)
def test_fp8_decoding_of_every_code(kind):
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(FP8[kind]).float().numpy()
    assert same_bits(formats.narrow_to_f32(codes, kind), expected)


@pytest.mark.parametrize("kind", FP8)
def test_fp8_encoding_saturates(kind):
    x = interesting_floats(np.float32, 2000)
    largest = torch.finfo(FP8[kind]).max
    expected = torch.from_numpy(x).clamp(-largest, largest).to(FP8[kind])
    got = formats.f32_to_narrow(x, kind)
    nan = np.isnan(x)
    assert (got[~nan] == bits_of(expected)[~nan]).all()
    assert (got[nan] == 0x7F).all()


@pytest.mark.parametrize("kind", FP8)
def test_fp8_encoding_breaks_ties_to_even(kind):
    values = torch.arange(0, 127 if kind == "e4m3" else 124, dtype=torch.uint8).view(FP8[kind]).double().numpy()
    middle = (values[:-1] + values[1:]) / 2
    expected = np.arange(len(middle)) + np.arange(len(middle)) % 2
    assert (formats.f32_to_narrow(middle.astype(np.float32), kind) == expected).all()


def test_float64_to_bf16_rounds_once():
    """Just above a midpoint of bf16 by less than float32 can hold."""
    x = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8, 1 + 2.0**-8 - 2.0**-40])
    assert formats.bf16_to_f32(formats.f32_to_bf16(x)).tolist() == [1 + 2.0**-7, 1.0, 1.0]


def test_f32_to_bf16():
    x = interesting_floats(np.float32)
    expected = torch.from_numpy(x).bfloat16()
    got = evaluate("cvt.rn.bf16.f32 %d, %a;", [x], np.uint16)
    assert same_bits(formats.bf16_to_f32(got), expected.float().numpy())
    towards_zero = evaluate("cvt.rz.bf16.f32 %d, %a;", [x], np.uint16)
    kept = ~np.isnan(x)
    assert (towards_zero[kept] == (x.view(np.uint32) >> 16).astype(np.uint16)[kept]).all()
    assert (evaluate("cvt.f32.bf16 %d, %a;", [got], np.float32)[kept] == expected.float().numpy()[kept]).all()


def test_f16():
    x = interesting_floats(np.float32)
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    assert same_bits(evaluate("cvt.rn.f16.f32 %d, %a;", [x], np.float16), half)
    assert same_bits(evaluate("cvt.f32.f16 %d, %a;", [half], np.float32), half.astype(np.float32))
    truncated = evaluate("cvt.rz.f16.f32 %d, %a;", [x], np.float16)
    inside = np.isfinite(x) & (np.abs(x) < 65504)
    assert (np.abs(truncated[inside].astype(np.float64)) <= np.abs(x[inside])).all()
    assert (np.abs(truncated[inside].astype(np.float64) - x[inside]) <= np.spacing(np.abs(half[inside]))).all()
    assert same_bits(evaluate("cvt.rn.f16.f64 %d, %a;", [x.astype(np.float64)], np.float16), half)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_packed_halves(kind):
    high, low = interesting_floats(np.float32), interesting_floats(np.float32, seed=1)
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]

    def halves(code: str) -> tuple[np.ndarray, np.ndarray]:
        both = torch.from_numpy(evaluate(code, [high, low], np.uint32).view(np.int16)).view(dtype).float().numpy()
        return both[1::2], both[::2]

    for got, source in zip(halves(f"cvt.rn.{kind}x2.f32 %d, %a, %b;"), (high, low), strict=True):
        assert same_bits(got, torch.from_numpy(source).to(dtype).float().numpy())
    for got, source in zip(halves(f"cvt.rn.relu.{kind}x2.f32 %d, %a, %b;"), (high, low), strict=True):
        expected = torch.relu(torch.from_numpy(source)).to(dtype).float().numpy()
        assert np.array_equal(got, expected, equal_nan=True)


@pytest.mark.parametrize("kind", FP8)
def test_packed_fp8(kind):
    high, low = interesting_floats(np.float32), interesting_floats(np.float32, seed=1)
    got = evaluate(f"cvt.rn.satfinite.{kind}x2.f32 %d, %a, %b;", [high, low], np.uint16)
    assert (got >> 8 == formats.f32_to_narrow(high, kind)).all()
    assert (got & 255 == formats.f32_to_narrow(low, kind)).all()
    relu = evaluate(f"cvt.rn.satfinite.relu.{kind}x2.f32 %d, %a, %b;", [high, low], np.uint16)
    assert (relu & 255 == formats.f32_to_narrow(np.maximum(low, 0), kind)).all()
    codes = np.random.default_rng(0).integers(0, 2**16, 256, np.uint16)
    decoded = evaluate(f"cvt.rn.f16x2.{kind}x2 %d, %a;", [codes], np.uint32).view(np.float16)
    expected = torch.from_numpy(codes.view(np.uint8)).view(FP8[kind]).float().numpy().astype(np.float16)
    assert same_bits(decoded, expected)
    again = evaluate(f"cvt.rn.satfinite.{kind}x2.f16x2 %d, %a;", [decoded.view(np.uint32)], np.uint16)
    finite = np.isfinite(expected) & (expected != 0)
    assert (again.view(np.uint8)[finite] == codes.view(np.uint8)[finite]).all()


def test_f64_and_f32():
    x = np.concatenate([interesting_floats(np.float64), [1 + 2.0**-24, 1 + 2.0**-30]])
    with np.errstate(over="ignore"):
        assert same_bits(evaluate("cvt.rn.f32.f64 %d, %a;", [x], np.float32), x.astype(np.float32))
    single = interesting_floats(np.float32)
    assert same_bits(evaluate("cvt.f64.f32 %d, %a;", [single], np.float64), single.astype(np.float64))
    up = evaluate("cvt.rp.f32.f64 %d, %a;", [np.array([1 + 2.0**-30, -1 - 2.0**-30])], np.float32)
    assert up.tolist() == [1 + 2.0**-23, -1.0]


def test_round_to_integral_float():
    x = interesting_floats(np.float32)
    for mode, function in {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.items():
        assert same_bits(evaluate(f"cvt.{mode}.f32.f32 %d, %a;", [x], np.float32), function(x))


def test_tf32():
    x = interesting_floats(np.float32)
    got = evaluate("cvt.rna.tf32.f32 %d, %a;", [x], np.float32)
    finite = np.isfinite(x) & (np.abs(x) > 1e-30) & (np.abs(x) < 1e38)
    assert (got.view(np.uint32) & 0x1FFF == 0).all()
    assert (np.abs(got[finite] / x[finite] - 1) <= 2.0**-11).all()
    ties = np.float32([1 + 2.0**-11, 1 + 3 * 2.0**-11])
    assert evaluate("cvt.rna.tf32.f32 %d, %a;", [ties], np.float32).tolist() == [1 + 2.0**-10, 1 + 2 * 2.0**-10]


ROUNDINGS = {"rni": lambda f: round(f), "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("source", ["f32", "f64", "f16"])
def test_float_to_integer_saturates_and_nan_is_zero(name, source):
    dtype, floating = INTEGERS[name], np.dtype(f"float{source[1:]}")
    with np.errstate(over="ignore"):
        x = np.concatenate([interesting_floats(np.float64), [2.0**31, 2.0**32, 2.0**63, 2.0**64, -(2.0**63)]])
        x = x.astype(floating)
    info = np.iinfo(dtype)
    register = (
        dtype if dtype.itemsize > 1 else np.dtype(f"{dtype.kind}2".replace("i2", "int16").replace("u2", "uint16"))
    )
    for mode, function in ROUNDINGS.items():
        got = evaluate(f"cvt.{mode}.{name}.{source} %d, %a;", [x], register)
        for value, result in zip(x, got, strict=True):
            if math.isnan(value):
                expected = 0
            elif math.isinf(value):
                expected = info.max if value > 0 else info.min
            else:
                expected = min(max(function(Fraction(float(value))), info.min), info.max)
            assert int(result) == expected, (mode, value)


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_to_float(name):
    dtype = INTEGERS[name]
    x = interesting(dtype)
    wide = x.astype(register_of(dtype))
    assert (evaluate(f"cvt.rn.f32.{name} %d, %a;", [wide], np.float32) == x.astype(np.float32)).all()
    assert (evaluate(f"cvt.rn.f64.{name} %d, %a;", [wide], np.float64) == x.astype(np.float64)).all()
    with np.errstate(over="ignore"):
        assert (
            evaluate(f"cvt.rn.f16.{name} %d, %a;", [wide], np.float16) == x.astype(np.float64).astype(np.float16)
        ).all()
    if dtype.itemsize <= 4:
        towards_zero = evaluate(f"cvt.rz.f32.{name} %d, %a;", [wide], np.float32)
        assert (np.abs(towards_zero.astype(np.float64)) <= np.abs(x.astype(np.float64))).all()


@pytest.mark.parametrize("dest", INTEGERS)
@pytest.mark.parametrize("source", INTEGERS)
def test_integer_to_integer(dest, source):
    to, of = INTEGERS[dest], INTEGERS[source]
    x = interesting(of)
    wide, register = x.astype(register_of(of)), register_of(to)
    assert (evaluate(f"cvt.{dest}.{source} %d, %a;", [wide], register) == x.astype(to)).all()
    info = np.iinfo(to)
    expected = [min(max(int(v), info.min), info.max) for v in x]
    assert evaluate(f"cvt.sat.{dest}.{source} %d, %a;", [wide], register).tolist() == expected


# ---- floats of 8 bits and less, by their definitions (OCP Microscaling Formats 1.0, section 5.3)

NARROW = {"e4m3": (4, 3), "e5m2": (5, 2), "e3m2": (3, 2), "e2m3": (2, 3), "e2m1": (2, 1)}
PACKED_BITS = {"e4m3": 8, "e5m2": 8, "e3m2": 8, "e2m3": 8, "e2m1": 4}


@cache
def magnitudes(kind: str) -> np.ndarray:
    """The finite numbers that are not negative, in the order of their codes; float64 holds them exactly."""
    exponent_bits, mantissa_bits = NARROW[kind]
    bias = 2 ** (exponent_bits - 1) - 1
    codes = np.arange(2 ** (exponent_bits + mantissa_bits) - {"e4m3": 1, "e5m2": 4}.get(kind, 0))
    exponent, fraction = np.divmod(codes, 2**mantissa_bits)
    return np.ldexp((exponent > 0) + fraction / 2**mantissa_bits, np.maximum(exponent, 1) - bias)


def nearest_code(kind: str, x: float) -> int:
    """The nearest number, the one with the even code of two: where float64 rounds a distance, the other is far off."""
    numbers, bits = magnitudes(kind), sum(NARROW[kind])
    if math.isnan(x):
        return 0x7F if kind in ("e4m3", "e5m2") else len(numbers) - 1
    if abs(x) >= numbers[-1]:
        code = len(numbers) - 1
    else:
        distances = np.abs(numbers - abs(x))
        nearest = np.flatnonzero(distances == distances.min())
        code = int(nearest[nearest % 2 == 0][0] if len(nearest) > 1 else nearest[0])
    return code | (math.copysign(1, x) < 0) << bits


@pytest.mark.parametrize("kind", NARROW)
def test_pairs_of_narrow_floats(kind):
    """Both orders of the pair, ties, the ends of the range, infinities and NaN; back to f16 and bf16; relu."""
    numbers = magnitudes(kind)
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate([numbers, ties, np.nextafter(ties, 0), -ties, [numbers[-1] * 1.01, 1e30, np.nan, np.inf]])
    x = np.concatenate([x, -x, interesting_floats(np.float32, 100)]).astype(np.float32)
    bits, y = PACKED_BITS[kind], x[::-1].copy()
    declare = ".reg .b8 %e;" if bits == 4 else ".reg .b16 %e;"
    read = "cvt.u16.u8 %d, %e;" if bits == 4 else "mov.b16 %d, %e;"
    write = "cvt.u8.u16 %e, %a;" if bits == 4 else "mov.b16 %e, %a;"
    for relu in ("", ".relu"):
        x, y = (np.where(v == 0, 0, v) if relu else v for v in (x, y))  # which zero relu makes of -0 is not defined
        got = evaluate(f"{declare} cvt.rn.satfinite{relu}.{kind}x2.f32 %e, %a, %b; {read}", [x, y], np.uint16)
        for high, low, code in zip(x, y, got, strict=True):
            if relu:
                high, low = (v if np.isnan(v) else max(v, np.float32(0)) for v in (high, low))
            assert code == nearest_code(kind, float(high)) << bits | nearest_code(kind, float(low))
    codes = np.unique(evaluate(f"{declare} cvt.rn.satfinite.{kind}x2.f32 %e, %a, %b; {read}", [x, y], np.uint16))
    codes = codes[((codes & 0x7F) != 0x7F) & ((codes >> 8 & 0x7F) != 0x7F)] if bits == 8 else codes
    sign = 1 << sum(NARROW[kind])
    for wide, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        pairs = evaluate(f"{declare} {write} cvt.rn.{wide}x2.{kind}x2 %d, %e;", [codes], np.uint32)
        values = torch.from_numpy(pairs.view(np.int16)).view(dtype).double().numpy()
        for n, code in enumerate(codes):
            for part, value in ((code & 2**bits - 1, values[2 * n]), (code >> bits, values[2 * n + 1])):
                exact = numbers[part & sign - 1] * (-1 if part & sign else 1)
                assert value == exact and (math.copysign(1, value) < 0) == bool(part & sign)
        again = evaluate(f"{declare} cvt.rn.satfinite.{kind}x2.{wide}x2 %e, %a; {read}", [pairs], np.uint16)
        assert (again == codes).all()


@pytest.mark.parametrize("rounding", ["rz", "rp"])
@pytest.mark.parametrize("saturation", ["", ".satfinite"])
def test_ue8m0(rounding, saturation):
    """Powers of two around |x|; what the host functions of cuda_fp8.h give for zero, negative and infinite inputs."""
    exponents = np.arange(-149, 128)
    x = np.concatenate([np.ldexp(1.0, exponents), np.ldexp(1.75, exponents), [0.0, -0.0, np.inf, np.nan, 3e-39]])
    x = np.concatenate([x, -x]).astype(np.float32)
    got = evaluate(f"cvt.{rounding}{saturation}.ue8m0x2.f32 %d, %a, %b;", [x, np.full_like(x, 2.0)], np.uint16)
    assert (got & 255 == 128).all()
    for value, code in zip(x, got >> 8, strict=True):
        size = abs(float(value))
        if math.isnan(size):
            expected = 255
        elif math.isinf(size):
            expected = 254 if saturation else 255
        else:
            powers = np.ldexp(1.0, np.arange(256) - 127)
            below, above = np.flatnonzero(powers[:255] <= size), np.flatnonzero(powers >= size)
            expected = (below[-1] if below.size else 0) if rounding == "rz" else above[0] if above.size else 255
            expected = min(expected, 254) if saturation else expected
        assert code == expected, value
    codes = np.arange(255, dtype=np.uint16) << 8 | np.arange(254, -1, -1).astype(np.uint16)
    pairs = evaluate("cvt.rn.bf16x2.ue8m0x2 %d, %a;", [codes], np.uint32)
    values = torch.from_numpy(pairs.view(np.int16)).view(torch.bfloat16).double().numpy()
    assert (values[1::2] == np.ldexp(1.0, np.arange(255) - 127)).all() and (values[::2] == values[1::2][::-1]).all()
    again = evaluate(f"cvt.{rounding}{saturation}.ue8m0x2.bf16x2 %d, %a;", [pairs], np.uint16)
    assert (again == codes).all()


@pytest.mark.parametrize(
    "instruction",
    [
        "cvt.rs.satfinite.e2m1x4.f32 %h0, {%r1, %r1, %r1, %r1}, %r1;",
        "cvt.rz.satfinite.e4m3x2.f32 %h0, %r1, %r1;",
        "cvt.rn.e3m2x2.f32 %h0, %r1, %r1;",
        "cvt.rn.ue8m0x2.f32 %h0, %r1, %r1;",
        "cvt.rn.f16x2.ue8m0x2 %r1, %h0;",
        "cvt.rz.ue8m0x2.f16x2 %h0, %r1;",
        "cvt.pack.sat.s8.s32 %r1, %r1, %r1;",
        "cvt.pack.sat.s16.u32 %r1, %r1, %r1;",
    ],
)
def test_forms_without_an_encoder_are_unknown(instruction):
    with pytest.raises(UnknownInstruction):
        run(f"mov.b32 %r1, 0; mov.b16 %h0, 0; {instruction}")


@pytest.mark.parametrize("name", ["s16", "u16", "s8", "u8", "s4", "u4", "s2", "u2"])
def test_pack_of_saturated_integers(name):
    bits, signed = int(name[1:]), name[0] == "s"
    a, b = interesting(np.int32), interesting(np.int32, seed=1)
    b[:40] = np.arange(-20, 20)
    above = interesting(np.uint32, seed=2)
    if bits == 16:
        got = evaluate(f"cvt.pack.sat.{name}.s32 %d, %a, %b;", [a, b], np.uint32)
    else:
        got = evaluate(f"cvt.pack.sat.{name}.s32.b32 %d, %a, %b, %c;", [a, b, above], np.uint32)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    for x, y, z, result in zip(a, b, above, got, strict=True):
        expected = min(max(int(x), low), high) % 2**bits << bits | min(max(int(y), low), high) % 2**bits
        if bits < 16:
            expected |= int(z) << 2 * bits
        assert result == expected % 2**32
