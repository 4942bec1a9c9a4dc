"""wgmma as asynchronous work: when operands are read and accumulators written, and what a program may not do before."""

from __future__ import annotations

import numpy as np
import pytest

from cute_attn.emulator import errors

from .wgmma_program import RNG, Program, fragment, integers, program, start_registers, vector

FENCE = "wgmma.fence.sync.aligned;"
COMMIT = "wgmma.commit_group.sync.aligned;"


def wait(newest: int) -> str:
    return f"wgmma.wait_group.sync.aligned {newest};"


KINDS = ("f16", "f16", "f32")
SEEDS = [None, 0, 1, 2]


def product(
    body: str, k: int = 64, n: int = 16, *, registers: bool = False, **rest: object
) -> tuple[Program, np.ndarray]:
    """A program of k / 16 instructions with C, and what its sum is."""
    a, b, c = integers("f16", 64, k), integers("f16", n, k), RNG.integers(-9, 9, (64, n))
    start = start_registers(c, "f32")
    return program(a, b, KINDS, registers=registers, body=body, start=start, **rest), a @ b.T + c


def moves(to: str, source: str, count: int = 8) -> str:
    return "".join(f"mov.b32 %{to}{r}, %{source}{r};" for r in range(count))


# ---- what is right


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_and_partial_waits(seed: int | None) -> None:
    """Two groups on one accumulator, the first awaited alone; then its operands are overwritten."""
    body = f"""
    {FENCE} {{wgmma 0}} {{wgmma 1}} {COMMIT} {{wgmma 2}} {{wgmma 3}} {COMMIT} {wait(1)}
    bar.sync 0;
    mad.lo.u32 %r34, %r50, 16, %shared; st.shared.b32 [%r34], 0;
    {wait(0)}
    """
    # The bytes written are columns 0 .. 31 of A only where the swizzle is 32 bytes wide: two instructions.
    kernel, exact = product(body, swizzle=(32, 128), settings={"seed": seed})
    assert (kernel.run() == exact).all()


def test_operands_are_read_as_late_as_the_wait_allows() -> None:
    """A write that nothing orders after the wait changes the result: the emulator shows the other order."""
    body = f"{FENCE} {{steps}} {COMMIT} mad.lo.u32 %r34, %r50, 16, %shared; st.shared.b32 [%r34], 0; {wait(0)}"
    kernel, exact = product(body)
    kernel.settings["races"] = False
    assert not (kernel.run() == exact).all()


def test_a_in_registers_is_read_at_the_instruction() -> None:
    body = f"{FENCE} {{steps}} {COMMIT} {wait(0)} " + "".join(f"mov.b32 %a{r}, 0;" for r in range(16))
    kernel, exact = product(body, registers=True)
    assert (kernel.run() == exact).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_loop_with_the_accumulator_in_flight(seed: int | None) -> None:
    """The accumulator is moved to other registers and back while in flight, across blocks; one group stays behind."""
    body = f"""
    mov.u32 %r40, 0; {FENCE} {{wgmma 0}} {COMMIT}
    LOOP: {moves("e", "d")} add.u32 %r40, %r40, 1; bra.uni NEXT;
    NEXT: {moves("d", "e")} {FENCE} {{wgmma 1}} {COMMIT} {wait(1)}
    setp.lt.u32 %p0, %r40, 3; @%p0 bra LOOP;
    {wait(0)}
    """
    a, b, c = integers("f16", 64, 32), integers("f16", 16, 32), RNG.integers(-9, 9, (64, 16))
    start = start_registers(c, "f32")
    kernel = program(a, b, KINDS, body=body, start=start, declarations=".reg .b32 %e<8>;", settings={"seed": seed})
    exact = a[:, :16] @ b[:, :16].T + 3 * a[:, 16:] @ b[:, 16:].T + c
    d = kernel.run(grid=5)
    assert all((part == exact).all() for part in d)


@pytest.mark.parametrize("seed", SEEDS)
def test_warpgroups_on_different_paths(seed: int | None) -> None:
    """CTAs come to the same instruction with their accumulator in flight, computed, and untouched."""
    body = f"""
    mov.u32 %r40, %ctaid.x; setp.eq.u32 %p0, %r40, 0; @%p0 bra LAST;
    {FENCE} {{wgmma 0}} {COMMIT}
    setp.eq.u32 %p0, %r40, 1; @%p0 bra LAST;
    {wait(0)}
    LAST: {FENCE} {{wgmma 1}} {{wgmma 2}} {COMMIT} {wait(0)}
    """
    a, b, c = integers("f16", 64, 48), integers("f16", 16, 48), RNG.integers(-9, 9, (64, 16))
    d = program(a, b, KINDS, body=body, start=start_registers(c, "f32"), settings={"seed": seed}).run(grid=6)
    assert (d[0] == a[:, 16:] @ b[:, 16:].T + c).all()
    assert all((part == a @ b.T + c).all() for part in d[1:])


@pytest.mark.parametrize("seed", SEEDS)
def test_two_accumulators(seed: int | None) -> None:
    """Both in flight at once, then added."""
    second = f"wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {vector('e', 8)}, %desc_a1, %desc_b1, 0, 1, 1, 0, 0;"
    body = f"{FENCE} {{wgmma 0}} {COMMIT} {second} {COMMIT} {wait(1)} {wait(0)}"
    body += "".join(f"add.f32 %d{r}, %d{r}, %e{r};" for r in range(8))
    kernel, exact = product(body, 32, declarations=".reg .b32 %e<8>;", settings={"seed": seed})
    assert (kernel.run() == exact).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_warps_that_arrive_late(seed: int | None) -> None:
    """One warp takes a longer way to the wgmma: the others wait for it."""
    body = f"""
    shr.u32 %r40, %r50, 5; setp.ne.u32 %p0, %r40, 2; @%p0 bra GO;
    mov.u32 %r41, 0; WORK: add.u32 %r41, %r41, 1; setp.lt.u32 %p1, %r41, 5; @%p1 bra WORK;
    GO: {FENCE} {{steps}} {COMMIT} {wait(0)}
    """
    kernel, exact = product(body, settings={"seed": seed})
    assert (kernel.run() == exact).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_other_warps_of_the_cta(seed: int | None) -> None:
    """A fifth warp beside the warpgroup, as a producer: 160 threads."""
    kernel, exact = product(f"@%p19 bra OVER; {FENCE} {{steps}} {COMMIT} {wait(0)} OVER:", settings={"seed": seed})
    kernel.threads = 160
    assert all((part == exact).all() for part in kernel.run(grid=3))


def test_results_that_nobody_waits_for() -> None:
    """The program ends with a wgmma in flight: it is done at the end, and reading unwritten memory is found there."""
    kernel, _ = product(f"{FENCE} {{steps}} {COMMIT} @!%p19 bra END;")
    kernel.run()
    kernel.right.descriptors[0] += 1 << 12
    with pytest.raises(errors.OutOfBounds):
        kernel.run()


# ---- what is found


def refuses(error: type[errors.EmulatorError], match: str, kernel: Program) -> None:
    with pytest.raises(error, match=match) as caught:
        kernel.run()
    assert caught.value.instruction is not None
    assert caught.value.kernel == "kernel"


@pytest.mark.parametrize(
    "use",
    [
        "add.f32 %r40, %d3, %d3;",
        "st.shared.b32 [%shared], %d3;",
        "selp.b32 %r40, %d3, %r50, %p0;",
        "@%p0 mov.b32 %r40, %d3;",
        "mov.b64 %rd30, {%d3, %d4};",
        "shfl.sync.idx.b32 %r40, %d3, 0, 31, -1;",
        "cvt.rn.f16x2.f32 %r40, %d3, %d4;",
        "st.global.b32 [%rd4], %d3;",
    ],
)
@pytest.mark.parametrize("where", ["", "bra.uni HERE; HERE:"], ids=["same block", "later block"])
def test_accumulator_used_in_flight(use: str, where: str) -> None:
    base = f"setp.eq.u32 %p0, %r50, 1; mov.b32 %r40, 0; mov.b64 %rd30, 0; {FENCE} {{steps}} {COMMIT}"
    # What is stored at the end keeps the operations alive that only compute.
    keep = "mov.b32 %d0, %r40; mov.b32 %d0, %d3; st.global.b32 [%rd4], %r40; st.global.b64 [%rd4], %rd30;"
    early, _ = product(f"{base} {where} {use} {wait(0)} {keep}")
    refuses(errors.AccumulatorInFlight, r"has yet to write: no wgmma.wait_group", early)
    with pytest.raises(errors.AccumulatorInFlight) as caught:
        early.run()
    assert use.split(";")[0] in str(caught.value)
    late, _ = product(f"{base} {where} {wait(0)} {use} {keep}")
    late.settings["races"] = False
    late.run()


def test_accumulator_of_a_later_group_used_in_flight() -> None:
    base = f"{FENCE} {{wgmma 0}} {COMMIT} {{wgmma 1}} {COMMIT}"
    early, _ = product(f"{base} {wait(1)} add.f32 %r40, %d3, %d3; {wait(0)} mov.b32 %d3, %r40;", 32)
    refuses(errors.AccumulatorInFlight, "has yet to write", early)
    late, _ = product(f"{base} {wait(0)} add.f32 %d3, %d3, %d3;", 32)
    late.run()


def test_uncommitted_wgmma_is_not_awaited() -> None:
    kernel, _ = product(f"{FENCE} {{steps}} {wait(0)}")
    refuses(errors.AccumulatorInFlight, "has yet to write", kernel)


def test_accumulator_goes_on_in_another_shape() -> None:
    second = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {vector('d', 4)}, %desc_a1, %desc_b1, 1, 1, 1, 0, 0;"
    early, _ = product(f"{FENCE} {{wgmma 0}} {second} {COMMIT} {wait(0)}", 32)
    refuses(errors.AccumulatorInFlight, "of another shape|not as a whole", early)
    late, _ = product(f"{FENCE} {{wgmma 0}} {COMMIT} {wait(0)} {FENCE} {second} {COMMIT} {wait(0)}", 32)
    late.run()


def test_copy_of_an_accumulator_with_which_another_goes_on() -> None:
    base = f"{FENCE} {{wgmma 0}} {COMMIT} {moves('e', 'd')} {{wgmma 1}} {COMMIT} {wait(0)}"
    kernel, _ = product(f"{base} add.f32 %d0, %d0, %e0;", 32, declarations=".reg .b32 %e<8>;")
    refuses(errors.AccumulatorInFlight, "use of a copy of an accumulator register", kernel)
    clean, _ = product(base, 32, declarations=".reg .b32 %e<8>;")
    clean.run()


def test_a_from_a_register_in_flight() -> None:
    second = (
        f"wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {vector('e', 8)}, {{%d0, %d1, %d2, %d3}}, %desc_b1, "
        "0, 1, 1, 0;"
    )
    extra = ".reg .b32 %e<8>;"
    early, _ = product(f"{FENCE} {{wgmma 0}} {second} {COMMIT} {wait(0)}", 32, declarations=extra)
    refuses(errors.AccumulatorInFlight, "A is in a register", early)
    late, _ = product(
        f"{FENCE} {{wgmma 0}} {COMMIT} {wait(0)} {FENCE} {second} {COMMIT} {wait(0)}", 32, declarations=extra
    )
    late.run()


@pytest.mark.parametrize("where", ["", "bra.uni HERE; HERE:"], ids=["same block", "later block"])
@pytest.mark.parametrize("write", ["mov.b32 %a2, 0;", "mov.b32 %d2, 0;", "add.u32 %d2, %r50, 1;", "mov.b32 %d2, %r50;"])
def test_register_written_in_flight(write: str, where: str) -> None:
    base = f"{FENCE} {{steps}} {COMMIT} {where}"
    early, _ = product(f"{base} {write} {wait(0)}", registers=True)
    refuses(errors.RegisterInFlight, "is written while `wgmma.*is in flight", early)
    late, _ = product(f"{base} {wait(0)} {write}", registers=True)
    late.run()


def test_guarded_fences_and_commits_are_unknown() -> None:
    guard = "setp.eq.u32 %g, %r50, 0; @%g"
    for body in (f"{guard} {FENCE} {{steps}} {COMMIT} {wait(0)}", f"{FENCE} {{steps}} {guard} {COMMIT} {wait(0)}"):
        guarded, _ = product(body, declarations=".reg .pred %g;")
        refuses(errors.UnknownInstruction, "wgmma.(fence|commit_group)", guarded)


@pytest.mark.parametrize("where", ["", "bra.uni HERE; HERE:"], ids=["same block", "later block"])
def test_renamed_accumulator_may_be_written(where: str) -> None:
    zero = "".join(f"mov.b32 %d{r}, 0;" for r in range(8))
    body = f"{FENCE} {{steps}} {COMMIT} {moves('e', 'd')} {where} {zero} {wait(0)} {moves('d', 'e')}"
    kernel, exact = product(body, declarations=".reg .b32 %e<8>;")
    assert (kernel.run() == exact).all()


@pytest.mark.parametrize("write", ["add.f32 %d2, %d2, %d2;", "mov.b32 %a2, 0;"])
@pytest.mark.parametrize("where", ["", "bra.uni HERE; HERE:"], ids=["same block", "earlier block"])
def test_missing_fence(write: str, where: str) -> None:
    end = f"{{steps}} {COMMIT} {wait(0)}"
    missing, _ = product(f"{FENCE} {write} {where} {end}", registers=True)
    refuses(errors.MissingFence, "no wgmma.fence since %[ad]2 was written by `(add|mov)", missing)
    fenced, _ = product(f"{write} {FENCE} {where} {end}", registers=True)
    fenced.run()


@pytest.mark.parametrize("where", ["", "bra.uni HERE; HERE:"], ids=["same block", "earlier block"])
def test_zeroing_an_accumulator_needs_no_fence(where: str) -> None:
    zero = "mov.b32 %r41, 0; " + "".join(f"mov.b32 %d{r}, {'0f00000000' if r % 2 else '%r41'};" for r in range(8))
    end = f"{{steps}} {COMMIT} {wait(0)}"
    kernel, with_c = product(f"{FENCE} {zero} {where} {end}")
    product_alone = kernel.run()
    assert (with_c - product_alone).any() and np.abs(with_c - product_alone).max() <= 9


@pytest.mark.parametrize("seed", SEEDS)
def test_another_warpgroup_is_still_in_flight(seed: int | None) -> None:
    """One CTA has waited, and uses its registers, while the other, which issued together with it, has not."""
    body = f"""
    {FENCE} {{steps}} {COMMIT} mov.u32 %r40, %ctaid.x; setp.eq.u32 %p0, %r40, 1; @%p0 bra OTHER;
    {wait(0)} {"".join(f"add.f32 %d{r}, %d{r}, 0f3F800000;" for r in range(8))} mov.b32 %a2, 0;
    OTHER: {wait(0)}
    """
    kernel, exact = product(body, registers=True, settings={"seed": seed})
    d = kernel.run(grid=2)
    assert (d[0] == exact + 1).all()
    assert (d[1] == exact).all()


def test_missing_first_fence() -> None:
    kernel, _ = product(f"bra.uni HERE; HERE: {{steps}} {COMMIT} {wait(0)}")
    refuses(errors.MissingFence, "before the first wgmma of the warpgroup", kernel)


def test_fence_outside_of_a_loop() -> None:
    """Without writes in between none is needed in the loop; a write there, or before, needs one."""
    loop = f"LOOP: {{wgmma 0}} {COMMIT} {wait(0)} @@ add.u32 %r40, %r40, 1; setp.lt.u32 %p0, %r40, 3; @%p0 bra LOOP;"
    kernel, _ = product(f"mov.u32 %r40, 0; {FENCE} {loop.replace('@@', '')}", 16)
    kernel.run()
    kernel, _ = product(f"mov.u32 %r40, 0; {FENCE} {loop.replace('@@', 'add.f32 %d1, %d1, %d1;')}", 16)
    refuses(errors.MissingFence, "since %d1 was written by `add.f32", kernel)


def test_divergent_warpgroup() -> None:
    """Three warps go, and one exits; or one thread is missing."""
    for condition in ("setp.lt.u32 %p0, %r50, 96;", "setp.ne.u32 %p0, %r50, 77;"):
        for end in (f"{FENCE}", f"{{steps}} {COMMIT} {wait(0)}"):
            before = "" if end == FENCE else FENCE
            kernel, _ = product(f"{before} {condition} @!%p0 bra END; {end}")
            refuses(errors.DivergentWarp, "warpgroup-wide instruction executed by (96|127) of the 128 threads", kernel)


def test_descriptor_differs_between_warps() -> None:
    kernel, _ = product(
        f"shr.u32 %r40, %r50, 5; cvt.u64.u32 %rd30, %r40; add.u64 %desc_b0, %desc_b0, %rd30; {FENCE} {{steps}}"
    )
    refuses(errors.InvalidOperand, "the descriptor of B differs within the warpgroup", kernel)


def test_operand_beyond_shared_memory() -> None:
    kernel, _ = product(f"{FENCE} {{steps}} {COMMIT} {wait(0)}")
    kernel.left.descriptors[1] += 4096 >> 4
    refuses(errors.OutOfBounds, "A is at 0x1020 to 0x.* of shared memory: the CTA has", kernel)


def test_unwritten_operand() -> None:
    kernel, exact = product(f"{FENCE} {{steps}} {COMMIT} {wait(0)}")
    assert (kernel.run() == exact).all()
    kernel.extra_shared = 8192
    kernel.right.descriptors[2] += 4096 >> 4
    refuses(errors.UninitializedShared, "operand in shared memory that nobody has written", kernel)
    kernel.settings["uninitialized_shared"] = "poison"
    assert np.isnan(kernel.run()).any()


def test_fragments_of_the_test_itself() -> None:
    """Thread 37 is lane 5 of warp 1: g = 1, t = 1; its register 3 holds row 16 + 8 + 1 and columns 8 + 2, 8 + 3."""
    values = np.zeros((64, 16), int)
    values[25, 10], values[25, 11] = 1, 2
    found = fragment(values, "f16")
    assert found[3, 37] == 0x40003C00
    assert np.count_nonzero(found) == 1
