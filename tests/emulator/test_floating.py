"""f32, f64 and f32x2 arithmetic against exact rational arithmetic and numpy in higher precision."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from .harness import evaluate, interesting_floats, same_bits

HALF = {"f16": torch.float16, "bf16": torch.bfloat16}


def correctly_rounded(exact: Fraction) -> np.float32:
    """The float32 nearest to an exact value, ties to even, by comparing with the neighbours."""
    guess = np.float32(float(exact))
    if not np.isfinite(guess):
        return guess
    candidates = [guess, np.nextafter(guess, np.float32(np.inf)), np.nextafter(guess, np.float32(-np.inf))]
    return min(candidates, key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view(np.uint32)) & 1))


def finite(count: int, seed: int) -> np.ndarray:
    x = interesting_floats(np.float32, count, seed)
    return x[np.isfinite(x) & ((np.abs(x) > 1e-30) | (x == 0)) & (np.abs(x) < 1e18)]


@pytest.mark.parametrize("name", ["f32", "f64"])
def test_basic_operations_are_ieee(name):
    dtype = np.dtype(f"float{name[1:]}")
    a = interesting_floats(dtype)
    b = interesting_floats(dtype, seed=1)[::-1].copy()
    with np.errstate(all="ignore"):
        for op, expected in {"add": a + b, "sub": a - b, "mul": a * b}.items():
            assert same_bits(evaluate(f"{op}.{name} %d, %a, %b;", [a, b], dtype), expected)
            assert same_bits(evaluate(f"{op}.rn.{name} %d, %a, %b;", [a, b], dtype), expected)
        assert same_bits(evaluate(f"div.rn.{name} %d, %a, %b;", [a, b], dtype), a / b)
        assert same_bits(evaluate(f"sqrt.rn.{name} %d, %a;", [a], dtype), np.sqrt(a))
        assert same_bits(evaluate(f"rcp.rn.{name} %d, %a;", [a], dtype), 1 / a)
    assert same_bits(evaluate(f"neg.{name} %d, %a;", [a], dtype), -a)
    assert same_bits(evaluate(f"abs.{name} %d, %a;", [a], dtype), np.abs(a))


def test_fma_rounds_once():
    a, b = finite(300, 0), finite(300, 1)
    n = min(len(a), len(b))
    a, b = a[:n], b[:n]
    # c cancels most of the product, so that only a fused operation keeps what is left.
    c = -(a * b) * np.where(np.arange(n) % 3 == 0, 1, 1.5).astype(np.float32)
    got = evaluate("fma.rn.f32 %d, %a, %b, %c;", [a, b, c], np.float32)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    expected = np.array([correctly_rounded(v) for v in exact], np.float32)
    normal = (np.abs(expected) > 1e-37) | (expected == 0)
    assert (got[normal] == expected[normal]).all()


def test_fma_where_float64_lands_on_a_midpoint():
    """(1 + 2^-12)^2 = 1 + 2^-11 + 2^-24 lies between two float32; an addend that float64 cannot hold decides."""
    x = np.float32([1 + 2.0**-12] * 3)
    z = np.float32([2.0**-80, -(2.0**-80), 0.0])
    up, down = np.float32(1 + 2.0**-11 + 2.0**-23), np.float32(1 + 2.0**-11)
    assert evaluate("fma.rn.f32 %d, %a, %b, %c;", [x, x, z], np.float32).tolist() == [up, down, down]


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode):
    a, b = finite(200, 0), finite(200, 1)
    n = min(len(a), len(b))
    a, b = a[:n], b[:n]
    for op, function in {"add": lambda x, y: x + y, "mul": lambda x, y: x * y}.items():
        got = evaluate(f"{op}.{mode}.f32 %d, %a, %b;", [a, b], np.float32)
        for x, y, g in zip(a, b, got, strict=True):
            exact, value = function(Fraction(float(x)), Fraction(float(y))), Fraction(float(g))
            below = mode == "rm" or (mode == "rz" and exact > 0)
            beyond = Fraction(float(np.nextafter(g, np.float32(np.inf if below else -np.inf))))
            if value != exact:
                assert value < exact < beyond if below else beyond < exact < value, (x, y, g)


def test_ftz_flushes_inputs_and_outputs():
    tiny = np.finfo(np.float32).tiny
    a = np.float32([tiny / 2, -tiny / 2, tiny, tiny * 1.5, 1.0])
    b = np.float32([1.0, 1.0, 0.5, 0.5, 0.5])
    assert evaluate("mul.ftz.f32 %d, %a, %b;", [a, b], np.float32).tolist() == [0.0, 0.0, 0.0, 0.0, 0.5]
    kept = evaluate("mul.f32 %d, %a, %b;", [a, b], np.float32)
    assert (kept == a * b).all() and kept[3] != 0


def test_saturation():
    a = np.float32([-1.0, 0.25, 2.0, np.nan, np.inf])
    zero = np.zeros(5, np.float32)
    assert evaluate("add.sat.f32 %d, %a, %b;", [a, zero], np.float32).tolist() == [0.0, 0.25, 1.0, 0.0, 1.0]


def test_min_max_and_nan():
    a = np.float32([1.0, np.nan, 2.0, np.nan, -1.0])
    b = np.float32([2.0, 1.0, np.nan, np.nan, -3.0])
    assert same_bits(evaluate("max.f32 %d, %a, %b;", [a, b], np.float32), np.fmax(a, b))
    assert same_bits(evaluate("min.f32 %d, %a, %b;", [a, b], np.float32), np.fmin(a, b))
    assert same_bits(evaluate("max.NaN.f32 %d, %a, %b;", [a, b], np.float32), np.maximum(a, b))
    assert same_bits(evaluate("min.NaN.f32 %d, %a, %b;", [a, b], np.float32), np.minimum(a, b))
    assert evaluate("max.xorsign.abs.f32 %d, %a, %b;", [a[[0, 4]], b[[0, 4]]], np.float32).tolist() == [2.0, 3.0]


FUNCTIONS = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_approximations_are_close(name):
    x = np.random.default_rng(0).uniform(-3, 3, 500).astype(np.float32)
    if name in ("lg2", "sqrt", "rsqrt"):
        x = np.abs(x)
    expected = FUNCTIONS[name](x.astype(np.float64))
    got = evaluate(f"{name}.approx{'' if name == 'tanh' else '.ftz'}.f32 %d, %a;", [x], np.float32)
    assert np.allclose(got, expected, rtol=3e-7, atol=1e-7)


def test_approximations_at_the_ends():
    x = np.float32([-np.inf, np.inf, -200.0, 200.0, np.nan, 0.0])
    assert same_bits(
        evaluate("ex2.approx.ftz.f32 %d, %a;", [x], np.float32), np.float32([0, np.inf, 0, np.inf, np.nan, 1])
    )
    y = np.float32([0.0, -0.0, np.inf, -1.0])
    assert same_bits(
        evaluate("lg2.approx.ftz.f32 %d, %a;", [y], np.float32), np.float32([-np.inf, -np.inf, np.inf, np.nan])
    )
    assert same_bits(evaluate("rcp.approx.ftz.f32 %d, %a;", [y], np.float32), np.float32([np.inf, -np.inf, 0.0, -1.0]))


def test_packed_f32x2():
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal((64, 2)).astype(np.float32) for _ in range(3))
    packed = [x.view(np.uint64).reshape(-1) for x in (a, b, c)]

    def two(code: str) -> np.ndarray:
        return evaluate(code, packed, np.uint64).view(np.float32).reshape(-1, 2)

    assert (two("add.rn.f32x2 %d, %a, %b;") == a + b).all()
    assert (two("mul.rn.f32x2 %d, %a, %b;") == a * b).all()
    halves = [evaluate("fma.rn.f32 %d, %a, %b, %c;", [x[:, n].copy() for x in (a, b, c)], np.float32) for n in (0, 1)]
    assert (two("fma.rn.f32x2 %d, %a, %b, %c;") == np.stack(halves, 1)).all()


def test_testp():
    x = np.float32([1.0, np.inf, np.nan, 1e-40, 0.0])
    for name, expected in {
        "finite": [1, 0, 0, 1, 1],
        "infinite": [0, 1, 0, 0, 0],
        "notanumber": [0, 0, 1, 0, 0],
        "subnormal": [0, 0, 0, 1, 0],
    }.items():
        code = f"testp.{name}.f32 %p1, %a; selp.u32 %d, 1, 0, %p1;"
        assert evaluate(code, [x], np.uint32).tolist() == expected, name


@pytest.mark.parametrize("half", ["f16", "bf16"])
def test_mixed_precision(half):
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.standard_normal(100).astype(np.float32)).to(HALF[half]) for _ in range(2))
    c = rng.standard_normal(100).astype(np.float32)
    bits = [x.view(torch.int16).numpy().view(np.uint16) for x in (a, b)]
    wide_a, wide_b = a.float().numpy(), b.float().numpy()
    assert (evaluate(f"add.rn.f32.{half} %d, %a, %b;", [bits[0], c], np.float32) == wide_a + c).all()
    assert (evaluate(f"sub.rn.f32.{half} %d, %a, %b;", [bits[0], c], np.float32) == wide_a - c).all()
    exact = (wide_a.astype(np.float64) * wide_b + c).astype(np.float32)
    assert (evaluate(f"fma.rn.f32.{half} %d, %a, %b, %c;", [*bits, c], np.float32) == exact).all()


@pytest.mark.parametrize(
    "tiny,expected", [(1e-30, (12582912, 12582913, 12582912)), (-1e-30, (12582911, 12582912, 12582911))]
)
def test_directed_sums_see_what_float64_drops(tiny, expected):
    """(rm, rp, rz) of 12582912 + tiny, whose float64 sum is 12582912."""
    x, y = np.array([12582912], np.float32), np.array([tiny], np.float32)
    for rounding, result in zip(("rm", "rp", "rz"), expected, strict=True):
        assert evaluate(f"add.{rounding}.f32 %d, %a, %b;", [x, y], np.float32) == result
        assert evaluate(f"sub.{rounding}.f32 %d, %a, %b;", [x, -y], np.float32) == result
        assert evaluate(f"fma.{rounding}.f32 %d, %a, 0f3F800000, %b;", [x, y], np.float32) == result
