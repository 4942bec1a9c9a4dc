"""Device functions, printf and assert from the device, branch tables."""

from __future__ import annotations

import numpy as np
import pytest

from cute_attn.emulator.errors import InvalidOperand, ParseError, UnknownInstruction

from .harness import run

STORE = "mad.wide.u32 %rd5, %r51, 4, %rd0; st.global.u32 [%rd5], %r1;"

COLLATZ = """
.func (.param .b32 steps) collatz (.param .b32 n)
{
    .reg .pred %p<3>; .reg .b32 %r<5>;
    ld.param.b32 %r1, [n]; mov.b32 %r2, 0;
AGAIN:
    setp.eq.u32 %p1, %r1, 1; @%p1 bra DONE;
    and.b32 %r3, %r1, 1; setp.eq.u32 %p2, %r3, 0; add.u32 %r2, %r2, 1;
    @%p2 bra HALF; mad.lo.u32 %r1, %r1, 3, 1; bra AGAIN;
HALF:
    shr.u32 %r1, %r1, 1; bra AGAIN;
DONE:
    st.param.b32 [steps], %r2; ret;
}
"""


def collatz(n: int) -> int:
    return 0 if n == 1 else 1 + collatz(n // 2 if n % 2 == 0 else 3 * n + 1)


def call(argument: str, result: str, name: str = "collatz") -> str:
    return f"""{{ .param .b32 p; .param .b32 r; st.param.b32 [p], {argument};
        call.uni (r), {name}, (p); ld.param.b32 {result}, [r]; }}"""


@pytest.mark.parametrize("seed", [None, 1])
def test_function_with_divergent_control_flow_called_twice(seed):
    out = np.zeros(64, np.uint32)
    body = f"""
        add.u32 %r2, %r51, 1; {call("%r2", "%r3")} add.u32 %r4, %r2, 100; {call("%r4", "%r5")}
        mad.lo.u32 %r1, %r5, 1000, %r3; {STORE}
    """
    run(body, {"out": out}, block=(64, 1, 1), module=COLLATZ, seed=seed)
    assert out.tolist() == [1000 * collatz(n + 101) + collatz(n + 1) for n in range(64)]


def test_divergent_call_inside_a_branch():
    out = np.zeros(32, np.uint32)
    body = f"""
        mov.u32 %r1, 7; setp.lt.u32 %p1, %r50, 5; @%p1 bra SKIP;
        {call("%r50", "%r1").replace("call.uni", "call")}
        SKIP: {STORE}
    """
    run(body, {"out": out}, module=COLLATZ)
    assert out.tolist() == [7] * 5 + [collatz(n) for n in range(5, 32)]


def test_registers_literals_guards_and_calls_in_calls():
    functions = """
        .func (.reg .b32 %sum) add3 (.reg .b32 %a, .reg .b32 %b, .param .b32 c)
        { .reg .b32 %t; ld.param.b32 %t, [c]; add.u32 %sum, %a, %b; add.u32 %sum, %sum, %t; ret; }
        .func (.reg .b32 %out) twice (.reg .b32 %x)
        { .reg .b32 %y; .reg .pred %p; call (%y), add3, (%x, %x, 1); setp.lt.u32 %p, %x, 3; mov.b32 %out, 0;
          @%p ret; mov.b32 %out, %y; }
    """
    out = np.zeros(32, np.uint32)
    body = f"mov.u32 %r1, 99; setp.ne.u32 %p1, %r50, 8; @%p1 call (%r1), twice, (%r50); {STORE}"
    run(body, {"out": out}, module=functions)
    assert out.tolist() == [99 if n == 8 else 0 if n < 3 else 2 * n + 1 for n in range(32)]


def test_arrays_as_arguments_and_shared_memory_of_a_function():
    functions = """
        .func (.param .align 8 .b8 r[8]) rotate (.param .align 8 .b8 v[8])
        { .shared .align 4 .b8 seen[4]; .reg .b32 %a<4>; .reg .pred %p; mov.b32 %a3, seen;
          ld.param.v2.b32 {%a0, %a1}, [v]; st.param.b32 [r+4], %a0; st.param.b32 [r], %a1; mov.u32 %a2, %tid.x;
          setp.eq.u32 %p, %a2, 0; @%p st.shared.b32 [%a3], %a1; ret; }
    """
    use = """{ .param .align 8 .b8 p[8]; .param .align 8 .b8 r[8]; st.param.v2.b32 [p], {%r2, %r3};
        call (r), rotate, (p); ld.param.v2.b32 {%r2, %r3}, [r]; }"""
    out = np.zeros(32, np.uint32)
    body = f"mov.b32 %r2, %r50; mov.b32 %r3, 77; {use} {use} {use} mad.lo.u32 %r1, %r3, 100, %r2; {STORE}"
    run(body, {"out": out}, module=functions)
    assert out.tolist() == [100 * n + 77 for n in range(32)]


def test_calls_that_cannot_be_expanded():
    with pytest.raises(UnknownInstruction, match="call"):
        run("call elsewhere;", module=".extern .func elsewhere;")
    with pytest.raises(UnknownInstruction, match="call forever"):
        run("call forever;", module=".func forever { call forever; ret; }")
    with pytest.raises(UnknownInstruction, match="call"):
        run("{ .param .b32 p; call (p), %rd1, (p), prototype; }")
    with pytest.raises(ParseError, match="collatz"):
        run("call collatz;", module=COLLATZ)


def test_the_address_of_an_argument_is_unknown():
    module = ".func f (.param .b32 x) { .reg .b64 %a; mov.b64 %a, x; ret; }"
    with pytest.raises(UnknownInstruction, match="mov.b64"):
        run("{ .param .b32 p; st.param.b32 [p], 1; call f, (p); }", module=module)


def text(name: str, value: str) -> str:
    data = [*value.encode(), 0]
    return f".global .align 1 .b8 {name}[{len(data)}] = {{{', '.join(map(str, data))}}};"


VPRINTF = ".extern .func (.param .b32 result) vprintf (.param .b64 format, .param .b64 values);"
PRINT = """
    mov.b64 %rd9, depot; cvta.local.u64 %rd8, %rd9; st.local.b32 [%rd9], %r50;
    cvt.rn.f64.s32 %rd7, %r50; mul.f64 %rd7, %rd7, 0dBFE0000000000000; st.local.b64 [%rd9+8], %rd7;
    mov.b64 %rd6, name; cvta.global.u64 %rd6, %rd6; st.local.b64 [%rd9+16], %rd6; st.local.b32 [%rd9+24], -5;
    st.local.b64 [%rd9+32], 0x100000000; st.local.b32 [%rd9+40], 6; st.local.b32 [%rd9+44], 66;
    st.local.b32 [%rd9+48], 65;
    mov.b64 %rd5, format; cvta.global.u64 %rd5, %rd5;
    { .param .b64 a; .param .b64 b; .param .b32 c; st.param.b64 [a], %rd5; st.param.b64 [b], %rd8;
      call.uni (c), vprintf, (a, b); ld.param.b32 %r1, [c]; }
"""


def test_printf(capsys):
    """Widths given by `*` take an argument of their own: 6, then the value 66."""
    module = VPRINTF + text("format", "t=%d v=%.2f %5s|%-4d|%#llx %*d%% %c\n") + text("name", "ab")
    body = f"mov.u32 %r1, 0; setp.gt.u32 %p1, %r50, 2; @%p1 bra SKIP; {PRINT} SKIP: {STORE}"
    out = np.zeros(32, np.uint32)
    run(body, {"out": out}, module=module, declarations=".local .align 8 .b8 depot[64];")
    expected = "".join(f"t={t} v={t * -0.5:.2f}    ab|-5  |0x100000000     66% A\n" for t in range(3))
    assert capsys.readouterr().out == expected
    assert out[:3].tolist() == [8, 8, 8]


def test_assert_from_the_device():
    module = (
        ".extern .func __assertfail(.param .b64 m, .param .b64 f, .param .b32 l, .param .b64 g, .param .b64 s);"
        + text("message", "x > 0")
        + text("file", "kernel.py")
        + text("function", "work")
    )
    body = """
        setp.ne.u32 %p1, %r50, 3; @%p1 bra FINE;
        { .param .b64 a; .param .b64 b; .param .b32 c; .param .b64 d; .param .b64 e; mov.b64 %rd1, message;
        mov.b64 %rd2, file; mov.b64 %rd3, function; st.param.b64 [a], %rd1; st.param.b64 [b], %rd2;
        st.param.b32 [c], 12; st.param.b64 [d], %rd3; st.param.b64 [e], 1; call.uni __assertfail, (a, b, c, d, e); }
        FINE: mov.u32 %r1, 1;
    """
    with pytest.raises(InvalidOperand, match=r"assertion failed: x > 0, at kernel\.py:12 in work") as caught:
        run(body, module=module)
    assert caught.value.thread == (3, 0, 0)
    run(body, module=module, block=(3, 1, 1))


TABLE = f"""
    and.b32 %r2, %r50, 3;
    TABLE: .branchtargets A, B, C, B;
    brx.idx %r2, TABLE;
A:  mov.u32 %r1, 10; bra END;
B:  mov.u32 %r1, 20; bra END;
C:  mov.u32 %r1, 30;
END: {STORE}
"""


@pytest.mark.parametrize("seed", [None, 2])
def test_branch_table(seed):
    out = np.zeros(32, np.uint32)
    run(TABLE, {"out": out}, seed=seed)
    assert out.tolist() == [10, 20, 30, 20] * 8
    guarded = TABLE.replace("brx.idx", "setp.gt.u32 %p1, %r50, 3; mov.u32 %r1, 5; @!%p1 brx.idx")
    guarded = guarded.replace("A:", "bra END; A:")
    run(guarded, {"out": out}, seed=seed)
    assert out.tolist() == [10, 20, 30, 20] + [5] * 28


def test_index_past_a_branch_table():
    with pytest.raises(InvalidOperand, match="index 4 into a table of 4 branch targets") as caught:
        run(TABLE.replace("and.b32 %r2, %r50, 3;", "mov.u32 %r2, %r50;"), {"out": np.zeros(32, np.uint32)})
    assert caught.value.thread == (4, 0, 0)
