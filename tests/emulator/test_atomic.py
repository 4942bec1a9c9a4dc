"""atom and red against a loop over the lanes."""

from __future__ import annotations

import numpy as np
import pytest

from cute_attn.emulator import scheduler
from cute_attn.emulator.errors import Deadlock, Misaligned, OutOfBounds, UninitializedShared, UnknownInstruction

from .harness import run

LANES = 64
INTEGERS = {"u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64, "b32": np.uint32, "b64": np.uint64}

SEQUENTIAL = {
    "add": lambda m, x: m + x,
    "min": min,
    "max": max,
    "and": lambda m, x: m & x,
    "or": lambda m, x: m | x,
    "xor": lambda m, x: m ^ x,
    "exch": lambda m, x: x,
    "inc": lambda m, x: m.dtype.type(0) if m >= x else m + m.dtype.type(1),
    "dec": lambda m, x: x if m == 0 or m > x else m - m.dtype.type(1),
}


def one_after_another(memory: np.ndarray, slots: np.ndarray, values: np.ndarray, step) -> tuple[np.ndarray, np.ndarray]:
    memory, olds = memory.copy(), np.zeros_like(values)
    with np.errstate(over="ignore"):
        for n, (slot, value) in enumerate(zip(slots, values, strict=True)):
            olds[n] = memory[slot]
            memory[slot] = step(memory[slot], value)
    return memory, olds


def perform(
    opcode: str, memory: np.ndarray, slots: np.ndarray, values: np.ndarray, swaps: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(memory, old values) after lane n has done `opcode` on memory[slots[n]] with values[n]; 64 lanes."""
    memory, olds = memory.copy(), np.zeros_like(values)
    bits, size = 8 * values.itemsize, values.itemsize
    arrays = {"slots": slots.astype(np.uint32), "values": values, "olds": olds, "memory": memory}
    if swaps is not None:
        arrays["swaps"] = swaps
    value, swap, old = ("%h1", "%h2", "%h3") if bits == 16 else ("%r1", "%r2", "%r3")
    if bits == 64:
        value, swap, old = "%rd20", "%rd21", "%rd22"
    body = f"""
        mad.wide.u32 %rd10, %r50, 4, %rd0; ld.global.u32 %r10, [%rd10]; mad.wide.u32 %rd11, %r50, {size}, %rd1;
        ld.global.b{bits} {value}, [%rd11]; mad.wide.u32 %rd12, %r10, {size}, %rd3;
        mad.wide.u32 %rd13, %r50, {size}, %rd2;
    """
    if swaps is not None:
        body += f"mad.wide.u32 %rd14, %r50, {size}, %rd4; ld.global.b{bits} {swap}, [%rd14];"
    third = f", {swap}" if swaps is not None else ""
    if opcode.startswith("red"):
        body += f"{opcode} [%rd12], {value};"
    else:
        body += f"{opcode} {old}, [%rd12], {value}{third}; st.global.b{bits} [%rd13], {old};"
    run(body, arrays, block=(LANES, 1, 1))
    return memory, olds


@pytest.mark.parametrize("slots", [1, 7, 64], ids=["one address", "shared addresses", "an address each"])
@pytest.mark.parametrize(
    "name,kind",
    [
        *[
            ("add", "u32"),
            ("add", "s32"),
            ("add", "u64"),
            ("min", "s32"),
            ("min", "u64"),
            ("max", "u32"),
            ("max", "s64"),
        ],
        *[
            ("and", "b32"),
            ("or", "b64"),
            ("xor", "b32"),
            ("exch", "b32"),
            ("exch", "b64"),
            ("inc", "u32"),
            ("dec", "u32"),
        ],
    ],
)
def test_integers(name, kind, slots):
    rng = np.random.default_rng(slots)
    dtype = INTEGERS[kind]
    info = np.iinfo(dtype)
    low, high = (0, 6) if name in ("inc", "dec") else (info.min, info.max)
    memory = rng.integers(low, high, 64, dtype, endpoint=True)
    values = rng.integers(low, high, LANES, dtype, endpoint=True)
    places = rng.permutation(64) if slots == 64 else rng.integers(0, slots, LANES)
    expected, olds = one_after_another(memory, places, values, SEQUENTIAL[name])
    got, old = perform(f"atom.global.{name}.{kind}", memory, places, values)
    assert (got == expected).all() and (old == olds).all()
    if name != "exch":
        got, _ = perform(f"red.relaxed.gpu.global.{name}.{kind}", memory, places, values)
        assert (got == expected).all()


@pytest.mark.parametrize("dtype,kind", [(np.float32, "f32"), (np.float64, "f64"), (np.float16, "noftz.f16")])
def test_float_sums_round_after_each_addend(dtype, kind):
    rng = np.random.default_rng(1)
    memory = rng.standard_normal(5).astype(dtype)
    values = (rng.standard_normal(LANES) * 2.0 ** rng.integers(-4, 4, LANES)).astype(dtype)
    places = rng.integers(0, 5, LANES)
    expected, olds = one_after_another(memory, places, values, lambda m, x: m + x)
    got, old = perform(f"atom.global.add.{kind}", memory, places, values)
    assert (got.view(np.uint8) == expected.view(np.uint8)).all() and (old == olds).all()
    got, _ = perform(f"red.add.{kind}", memory, places, values)
    assert (got == expected).all()


def bf16(x: np.ndarray) -> np.ndarray:
    """Bits of bf16 numbers that hold `x` exactly (small integers)."""
    return (np.asarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def test_bf16_sum():
    values = np.arange(LANES) % 4
    got, old = perform("atom.global.add.noftz.bf16", bf16(np.zeros(2)), np.arange(LANES) % 2, bf16(values))
    assert (got == bf16(np.array([values[::2].sum(), values[1::2].sum()]))).all()
    assert (old[2:4] == bf16(values[:2])).all()


def test_global_sums_flush_subnormal_numbers_and_shared_ones_do_not():
    body = """
        mov.u32 %r9, dynamic; mov.b32 %r1, 0f00080000; mov.b32 %r2, 0f00000000; st.shared.b32 [%r9], %r2;
        red.global.add.f32 [%rd0], %r1; red.shared.add.f32 [%r9], %r1; ld.shared.b32 %r3, [%r9];
        st.global.b32 [%rd0+4], %r3;
    """
    out = np.zeros(2, np.float32)
    run(body, {"out": out}, block=(1, 1, 1), shared=4)
    assert out.view(np.uint32).tolist() == [0, 0x00080000]
    # The difference of two normal numbers that is itself subnormal.
    memory = np.array([2.0**-126 * 1.5], np.float32)
    got, _ = perform("red.global.add.f32", memory, np.zeros(LANES), np.full(LANES, -(2.0**-126), np.float32))
    assert got[0] == -63 * np.float32(2.0**-126)


@pytest.mark.parametrize("dtype,kind", [(np.uint16, "b16"), (np.uint32, "b32"), (np.uint64, "b64")])
def test_compare_and_swap(dtype, kind):
    rng = np.random.default_rng(2)
    memory = rng.integers(0, 3, 6).astype(dtype)
    expected_values, new = (rng.integers(0, 3, LANES).astype(dtype) for _ in range(2))
    places = rng.integers(0, 6, LANES)
    state, olds = memory.copy(), np.zeros(LANES, dtype)
    for n, slot in enumerate(places):
        olds[n] = state[slot]
        if state[slot] == expected_values[n]:
            state[slot] = new[n]
    got, old = perform(f"atom.global.acq_rel.gpu.cas.{kind}", memory, places, expected_values, new)
    assert (got == state).all() and (old == olds).all()


def test_16_bytes_at_once():
    memory = np.arange(4, dtype=np.uint64)
    out = np.zeros((32, 2), np.uint64)
    body = """
        mov.u64 %rd10, 0; mov.u64 %rd11, 1; mov.b128 %q0, {%rd10, %rd11}; cvt.u64.u32 %rd12, %r50;
        mov.b128 %q1, {%rd12, %rd10}; atom.global.cas.b128 %q2, [%rd0], %q0, %q1;
        atom.global.exch.b128 %q3, [%rd0+16], %q1; mov.b128 {%rd13, %rd14}, %q2; mov.b128 {%rd15, _}, %q3;
        mad.wide.u32 %rd16, %r50, 16, %rd1; st.global.v2.b64 [%rd16], {%rd13, %rd15};
    """
    run(body, {"memory": memory, "out": out}, declarations=".reg .b128 %q<4>;")
    assert memory.tolist() == [0, 0, 31, 0]
    assert out[:, 0].tolist() == [0] * 32 and out[:, 1].tolist() == [2, *range(31)]


def test_vectors_are_atomic_by_element():
    rng = np.random.default_rng(3)
    memory, values = np.zeros((4, 4), np.float32), rng.integers(-9, 9, (32, 4)).astype(np.float32)
    body = """
        and.b32 %r1, %r50, 3; mad.wide.u32 %rd10, %r1, 16, %rd0; mad.wide.u32 %rd11, %r50, 16, %rd1;
        ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd11]; red.global.add.v4.f32 [%rd10], {%r2, %r3, %r4, %r5};
    """
    run(body, {"memory": memory, "values": values})
    assert (memory == values.reshape(8, 4, 4).sum(0)).all()


def test_vector_of_halves_returns_old_values():
    memory = np.arange(8, dtype=np.float16)
    olds = np.zeros((2, 8), np.float16)
    body = """
        mov.b32 %r1, 0x40003C00; mov.b32 %r2, 0; mov.b32 %r3, 0xC0003C00; mov.b32 %r4, 0x7E000000;
        atom.global.max.noftz.v4.f16x2 {%r5, %r6, %r7, %r8}, [%rd0], {%r1, %r2, %r3, %r4};
        mad.wide.u32 %rd10, %r50, 16, %rd1; st.global.v4.b32 [%rd10], {%r5, %r6, %r7, %r8};
    """
    run(body, {"memory": memory, "olds": olds}, block=(2, 1, 1))
    assert memory.tolist() == [1, 2, 2, 3, 4, 5, 6, 7]
    assert olds[0].tolist() == list(range(8)) and olds[1].tolist() == memory.tolist()
    body = (
        body[: body.index("mad.wide")]  # the old values go to registers that it does not store
        .replace("max.noftz.v4.f16x2", "add.noftz.v8.f16")
        .replace("{%r5, %r6, %r7, %r8}, [", "{%h1, %h2, %h3, %h4, %h5, %h6, %h7, %h8}, [")
        .replace("{%r1, %r2, %r3, %r4}", "{%h9, %h9, %h9, %h9, %h9, %h9, %h9, %h9}")
    )
    body = "mov.b16 %h9, 0x3C00;" + body
    run(body, {"memory": memory, "olds": olds}, block=(2, 1, 1))
    assert memory.tolist() == [3, 4, 4, 5, 6, 7, 8, 9]


def test_packed_halves_in_generic_memory():
    memory = np.zeros(2, np.float16)
    body = """
        mov.b32 %r1, 0x40003C00; mov.u32 %r9, dynamic; mov.b32 %r2, 0; st.shared.b32 [%r9], %r2;
        cvt.u64.u32 %rd5, %r9; cvta.shared.u64 %rd5, %rd5; setp.lt.u32 %p1, %r50, 8; selp.b64 %rd6, %rd5, %rd0, %p1;
        atom.add.noftz.f16x2 %r3, [%rd6], %r1; bar.sync 0; ld.shared.b32 %r4, [%r9]; st.global.b32 [%rd1], %r4;
    """
    shared = np.zeros(2, np.float16)
    run(body, {"memory": memory, "shared": shared}, shared=4)
    assert memory.tolist() == [24, 48] and shared.tolist() == [8, 16]


def test_guarded_lanes_do_not_take_part():
    memory, olds = np.zeros(1, np.uint32), np.full(32, 7, np.uint32)
    body = """
        mad.wide.u32 %rd10, %r50, 4, %rd1; mov.u32 %r1, 99; setp.lt.u32 %p1, %r50, 3;
        @%p1 atom.global.add.u32 %r1, [%rd0], 5; st.global.u32 [%rd10], %r1;
    """
    run(body, {"memory": memory, "olds": olds})
    assert memory[0] == 15 and olds.tolist() == [0, 5, 10] + [99] * 29


LOCK = """
    LOOP: atom.global.acquire.gpu.cas.b32 %r1, [%rd0], 0, 1; setp.ne.u32 %p1, %r1, 0; @%p1 bra LOOP;
    ld.global.u32 %r2, [%rd0+4]; add.u32 %r2, %r2, 1; st.global.u32 [%rd0+4], %r2;
    atom.global.release.gpu.exch.b32 %r3, [%rd0], 0;
"""


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_a_lock_between_warps(seed):
    memory = np.zeros(2, np.uint32)
    body = f"setp.ne.u32 %p2, %r50, 0; and.b32 %r9, %r50, 31; setp.ne.u32 %p2, %r9, 0; @%p2 exit; {LOCK}"
    run(body, {"memory": memory}, block=(256, 1, 1), grid=(3, 1, 1), seed=seed)
    assert memory.tolist() == [0, 24]


def test_a_lock_that_nobody_opens(monkeypatch):
    monkeypatch.setattr(scheduler, "POLLING_ROUNDS", 1000)
    with pytest.raises(Deadlock, match="polls for what nobody does"):
        run(LOCK.replace("atom.global.release.gpu.exch.b32 %r3, [%rd0], 0;", ""), {"m": np.zeros(2, np.uint32)})


def test_findings():
    memory = np.zeros(2, np.uint32)
    with pytest.raises(OutOfBounds, match="global atomic access of 4 bytes"):
        run("red.global.add.u32 [%rd0+8], 1;", {"memory": memory})
    with pytest.raises(Misaligned):
        run("red.global.add.u64 [%rd0+4], 1;", {"memory": np.zeros(4, np.uint32)})
    with pytest.raises(UninitializedShared):
        run("mov.u32 %r1, dynamic; red.shared.add.u32 [%r1], 1;", shared=16)


@pytest.mark.parametrize(
    "text",
    [
        "red.global.cas.b32 [%rd0], 1",
        "atom.global.inc.s32 %r1, [%rd0], 1",
        "atom.global.add.f16 %h1, [%rd0], %h2",
        "atom.shared.add.v2.f32 {%r1, %r2}, [%r0], {%r1, %r2}",
        "atom.global.min.f32 %r1, [%rd0], %r2",
        "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r1], %r2, [%r3]",
    ],
)
def test_forms_that_do_not_exist_are_unknown(text):
    with pytest.raises(UnknownInstruction, match=text.split()[0]):
        run(f"{text};", {"memory": np.zeros(4, np.uint32)})


def test_atoms_that_change_nothing_in_some_lanes_do_not_split_the_warp() -> None:
    """A lane that adds 0 looks as if it polled; the warp-wide instruction after it still finds all 32 lanes."""
    out, sums = np.zeros(32, np.uint32), np.zeros(32, np.float32)
    body = """
        and.b32 %r1, %r50, 1; cvt.rn.f32.u32 %r2, %r1;
        mad.wide.u32 %rd2, %r50, 4, %rd1;
        atom.global.add.f32 %r3, [%rd2], %r2;
        atom.global.add.f32 %r3, [%rd2], %r2;
        shfl.sync.bfly.b32 %r4, %r50, 1, 31, -1;
        mad.wide.u32 %rd3, %r50, 4, %rd0; st.global.u32 [%rd3], %r4;
    """
    run(body, {"out": out, "sums": sums})
    assert out.tolist() == [n ^ 1 for n in range(32)]
    assert sums.tolist() == [2.0 * (n & 1) for n in range(32)]
