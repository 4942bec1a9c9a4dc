"""Random programs with guards, divergent branches and loops, against an interpreter of one thread at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from .harness import run

MASK = 0xFFFF_FFFF
OPERATIONS = {
    "add.u32": lambda a, b: a + b & MASK,
    "mul.lo.u32": lambda a, b: a * b & MASK,
    "xor.b32": lambda a, b: a ^ b,
    "max.u32": max,
    "shr.u32": lambda a, b: a >> min(b, 32),
}
COMPARISONS = {"lt": lambda a, b: a < b, "eq": lambda a, b: a == b, "ge": lambda a, b: a >= b}

register = st.integers(1, 5)
predicate = st.integers(1, 3)
guard = st.one_of(st.none(), st.tuples(predicate, st.booleans()))
statement = st.one_of(
    st.tuples(st.just("op"), guard, st.sampled_from(sorted(OPERATIONS)), register, register, register),
    st.tuples(st.just("set"), guard, register, st.integers(0, 40)),
    st.tuples(st.just("cmp"), guard, st.sampled_from(sorted(COMPARISONS)), predicate, register, register),
    st.tuples(st.just("copy"), guard, register, register),
    # Skips ahead by up to five statements, in some lanes only.
    st.tuples(st.just("skip"), guard, st.integers(1, 5)),
)


def text_of(program: list, rounds: int) -> str:
    """The program as PTX, repeated `rounds` + thread % 3 times by a loop around it; %r1 to %r5 are its state."""
    lines = ["mov.u32 %r6, 0; and.b32 %r7, %r50, 3; rem.u32 %r7, %r7, 3;", f"add.u32 %r7, %r7, {rounds};", "TOP:"]
    for at, (kind, when, *rest) in enumerate(program):
        prefix = "" if when is None else f"@{'!' if when[1] else ''}%p{when[0]} "
        lines.append(f"L{at}:")
        if kind == "op":
            name, d, a, b = rest
            lines.append(f"{prefix}{name} %r{d}, %r{a}, %r{b};")
        elif kind == "set":
            lines.append(f"{prefix}mov.u32 %r{rest[0]}, {rest[1]};")
        elif kind == "cmp":
            lines.append(f"{prefix}setp.{rest[0]}.u32 %p{rest[1]}, %r{rest[2]}, %r{rest[3]};")
        elif kind == "copy":
            lines.append(f"{prefix}mov.b32 %r{rest[0]}, %r{rest[1]};")
        else:
            lines.append(f"{prefix}bra L{min(at + 1 + rest[0], len(program))};")
    lines.append(f"L{len(program)}: add.u32 %r6, %r6, 1; setp.lt.u32 %p9, %r6, %r7; @%p9 bra TOP;")
    return "\n".join(lines)


def interpret(program: list, rounds: int, thread: int, state: list[int]) -> list[int]:
    """What one thread computes; state holds registers 1 to 5."""
    r, p = [0, *state], [False] * 4
    for _ in range(rounds + (thread & 3) % 3):
        at = 0
        while at < len(program):
            kind, when, *rest = program[at]
            at += 1
            if when is not None and p[when[0]] == when[1]:
                continue
            if kind == "op":
                r[rest[1]] = OPERATIONS[rest[0]](r[rest[2]], r[rest[3]])
            elif kind == "set":
                r[rest[0]] = rest[1]
            elif kind == "cmp":
                p[rest[1]] = COMPARISONS[rest[0]](r[rest[2]], r[rest[3]])
            elif kind == "copy":
                r[rest[0]] = r[rest[1]]
            else:
                at = min(at + rest[0], len(program))
    return r[1:]


@settings(max_examples=60, deadline=None)
@given(
    program=st.lists(statement, min_size=1, max_size=20), rounds=st.integers(1, 3), seed=st.none() | st.integers(0, 9)
)
def test_every_thread_computes_what_it_would_alone(program, rounds, seed):
    threads = 96
    state = np.random.default_rng(0).integers(0, 50, (threads, 5), np.uint32)
    out = np.zeros_like(state)
    load = "mad.wide.u32 %rd5, %r51, 20, %rd0; mad.wide.u32 %rd6, %r51, 20, %rd1;"
    load += "".join(f"ld.global.u32 %r{n + 1}, [%rd5+{4 * n}];" for n in range(5))
    load += "".join(f"setp.ne.u32 %p{n}, 0, 0;" for n in range(1, 4))
    store = "".join(f"st.global.u32 [%rd6+{4 * n}], %r{n + 1};" for n in range(5))
    arrays = {"state": state, "out": out}
    run(load + text_of(program, rounds) + store, arrays, grid=(2, 1, 1), block=(48, 1, 1), seed=seed)
    for thread in range(threads):
        expected = interpret(program, rounds, thread % 48, [int(v) for v in state[thread]])
        assert out[thread].tolist() == expected, thread
