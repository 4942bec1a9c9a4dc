"""setp, set, selp, slct and predicate logic."""

from __future__ import annotations

import operator

import numpy as np
import pytest

from cute_attn.emulator.errors import UnknownInstruction

from .harness import evaluate, interesting, interesting_floats

ORDERED = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge
}  # fmt: skip
UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}


def compare(code: str, inputs: list[np.ndarray]) -> np.ndarray:
    return evaluate(code + " selp.u32 %d, 1, 0, %p1;", inputs, np.uint32).astype(bool)


@pytest.mark.parametrize("name", ["s32", "u32", "s64", "u16"])
def test_integers(name):
    dtype = np.dtype(f"{'int' if name[0] == 's' else 'uint'}{name[1:]}")
    a, b = interesting(dtype), interesting(dtype, seed=1)
    b[::3] = a[::3]
    for op, function in ORDERED.items():
        assert (compare(f"setp.{op}.{name} %p1, %a, %b;", [a, b]) == function(a, b)).all()
    if name == "u32":
        for op, function in UNSIGNED.items():
            assert (compare(f"setp.{op}.{name} %p1, %a, %b;", [a, b]) == function(a, b)).all()


@pytest.mark.parametrize("name", ["f32", "f64", "f16"])
def test_floats_and_nan(name):
    dtype = np.dtype(f"float{name[1:]}")
    with np.errstate(over="ignore"):
        a, b = interesting_floats(np.float32).astype(dtype), interesting_floats(np.float32, seed=1).astype(dtype)
    b[::3] = a[::3]
    b[1::7] = np.nan
    nan = np.isnan(a) | np.isnan(b)
    for op, function in ORDERED.items():
        assert (compare(f"setp.{op}.{name} %p1, %a, %b;", [a, b]) == (function(a, b) & ~nan)).all(), op
        assert (compare(f"setp.{op}u.{name} %p1, %a, %b;", [a, b]) == (function(a, b) | nan)).all(), op
    assert (compare(f"setp.num.{name} %p1, %a, %b;", [a, b]) == ~nan).all()
    assert (compare(f"setp.nan.{name} %p1, %a, %b;", [a, b]) == nan).all()


@pytest.mark.parametrize("name,function", [("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)])
@pytest.mark.parametrize("negated", [False, True])
def test_combination_and_second_destination(name, function, negated):
    a, b = interesting(np.int32), interesting(np.int32, seed=1)
    third = (a & 1).astype(bool)
    bang = "!" if negated else ""
    code = f"""
        and.b32 %r1, %a, 1; setp.ne.s32 %p3, %r1, 0;
        setp.lt.{name}.s32 %p1|%p2, %a, %b, {bang}%p3;
        selp.u32 %r2, 1, 0, %p1; selp.u32 %r3, 2, 0, %p2; or.b32 %d, %r2, %r3;
    """
    got = evaluate(code, [a, b], np.uint32)
    c = ~third if negated else third
    assert ((got & 1).astype(bool) == function(a < b, c)).all()
    assert ((got & 2).astype(bool) == function(~(a < b), c)).all()


def test_predicate_logic():
    a = np.arange(64, dtype=np.uint32)
    code = """
        and.b32 %r1, %a, 1; setp.ne.u32 %p2, %r1, 0; and.b32 %r1, %a, 2; setp.ne.u32 %p3, %r1, 0;
        xor.pred %p4, %p2, %p3; not.pred %p4, %p4; and.pred %p5, %p2, %p3; or.pred %p1, %p4, %p5;
        mov.pred %p6, %p1; and.pred %p1, %p6, %p6;
    """
    odd, two = (a & 1) != 0, (a & 2) != 0
    assert (compare(code, [a]) == (~(odd ^ two) | (odd & two))).all()


def test_guards_select_lanes():
    a = np.arange(100, dtype=np.uint32)
    code = """
        and.b32 %r1, %a, 1; setp.ne.u32 %p1, %r1, 0; mov.b32 %d, 7;
        @%p1 add.u32 %d, %a, 1000; @!%p1 add.u32 %d, %d, %a;
    """
    assert (evaluate(code, [a], np.uint32) == np.where(a & 1, a + 1000, a + 7)).all()


def test_set_and_slct():
    a, b = np.float32([1, 2, np.nan, 4]), np.float32([2, 1, 1, 4])
    assert evaluate("set.lt.f32.f32 %d, %a, %b;", [a, b], np.float32).tolist() == [1, 0, 0, 0]
    assert evaluate("set.geu.u32.f32 %d, %a, %b;", [a, b], np.uint32).tolist() == [0, 2**32 - 1, 2**32 - 1, 2**32 - 1]
    never = "setp.eq.u32 %p1, 1, 2; set.equ.and.u32.f32 %d, %a, %b, %p1;"
    assert evaluate(never, [a, b], np.uint32).tolist() == [0, 0, 0, 0]
    c = np.int32([-1, 0, 5, -7])
    assert evaluate("slct.f32.s32 %d, %a, %b, %c;", [b, b + 10, c], np.float32).tolist() == [12, 1, 1, 14]


def test_packed_halves_give_two_predicates():
    a = np.float16([1, 5, 3, np.nan]).view(np.uint32)
    b = np.float16([2, 4, 3, 1]).view(np.uint32)
    code = "setp.lt.f16x2 %p1|%p2, %a, %b; selp.u32 %r1, 1, 0, %p1; selp.u32 %r2, 2, 0, %p2; or.b32 %d, %r1, %r2;"
    assert evaluate(code, [a, b], np.uint32).tolist() == [1, 0]


def test_setp_may_overwrite_the_predicate_that_it_combines():
    code = (
        "setp.ge.u32 %p1, %a, 2; setp.lt.and.u32 %p1|%p2, %a, 4, %p1; selp.u32 %d, 2, 0, %p2; @%p1 add.u32 %d, %d, 1;"
    )
    assert evaluate(code, [np.arange(6, dtype=np.uint32)], np.uint32).tolist() == [0, 0, 1, 1, 2, 2]


def test_slct_flushes_what_it_tests():
    tested = np.array([-1e-40, -1.0, 1.0, np.nan], np.float32)
    ones = np.ones(4, np.float32)
    for suffix, expected in (("", [0, 0, 1, 0]), (".ftz", [1, 0, 1, 0])):
        got = evaluate(f"slct{suffix}.f32.f32 %d, %b, %c, %a;", [tested, ones, 0 * ones], np.float32)
        assert got.tolist() == expected


def test_set_of_packed_halves():
    a, b = np.float16([1, 5, 3, np.nan]), np.float16([2, 4, 3, 1])
    pair = [a.view(np.uint32), b.view(np.uint32)]
    masks = evaluate("set.le.u32.f16x2 %d, %a, %b;", pair, np.uint32).view(np.uint16)
    assert masks.tolist() == [0xFFFF, 0, 0xFFFF, 0]
    assert evaluate("set.ltu.f16x2.f16x2 %d, %a, %b;", pair, np.uint32).view(np.float16).tolist() == [1, 0, 0, 1]
    wide = [(x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint32) for x in (a, b)]
    ones = evaluate("set.ge.bf16x2.bf16x2 %d, %a, %b;", wide, np.uint32).view(np.uint16)
    assert ones.tolist() == [0, 0x3F80, 0x3F80, 0]
    with pytest.raises(UnknownInstruction):
        evaluate("set.ge.f16x2.bf16x2 %d, %a, %b;", wide, np.uint32)
