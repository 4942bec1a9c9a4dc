"""wgmma against sums formed by numpy: types, shapes, layouts, signs, and what the accumulator starts from."""

from __future__ import annotations

import numpy as np
import pytest

from cute_attn.emulator import errors

from .wgmma_program import RNG, K, integers, operand, program, start_registers

TYPES = [
    ("f16", "f16", "f32"),
    ("f16", "f16", "f16"),
    ("bf16", "bf16", "f32"),
    ("tf32", "tf32", "f32"),
    ("e4m3", "e4m3", "f32"),
    ("e4m3", "e5m2", "f16"),
    ("e5m2", "e4m3", "f32"),
    ("e5m2", "e5m2", "f32"),
    ("s8", "s8", "s32"),
    ("s8", "u8", "s32"),
    ("u8", "s8", "s32"),
    ("u8", "u8", "s32"),
]


@pytest.mark.parametrize("registers", [False, True], ids=["shared", "registers"])
@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_types(types: tuple[str, str, str], registers: bool) -> None:
    a, b = integers(types[0], 64, 2 * K[types[0]]), integers(types[1], 32, 2 * K[types[0]])
    c = RNG.integers(-100, 100, (64, 32))
    d = program(a, b, types, registers=registers, start=start_registers(c, types[2])).run()
    assert (d == a @ b.T + c).all()


@pytest.mark.parametrize("n", [8, 24, 64, 136, 256])
def test_columns(n: int) -> None:
    a, b, c = integers("f16", 64, 32), integers("f16", n, 32), RNG.integers(-9, 9, (64, n))
    d = program(a, b, ("f16", "f16", "f32"), start=start_registers(c, "f32")).run()
    assert (d == a @ b.T + c).all()


@pytest.mark.parametrize("b_major_mn", [False, True], ids=["K", "N"])
@pytest.mark.parametrize("a_major_mn", [False, True], ids=["K", "M"])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_layouts_of_16_bit_elements(swizzle: int, a_major_mn: bool, b_major_mn: bool) -> None:
    a, b = integers("bf16", 64, 128), integers("bf16", 128, 128)
    d = program(
        a, b, swizzle=(swizzle, {0: 64, 32: 128, 64: 32, 128: 0}[swizzle]), mn_major=(a_major_mn, b_major_mn)
    ).run()
    assert (d == a @ b.T).all()


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("element", ["s8", "tf32"])
def test_layouts_of_other_elements(element: str, swizzle: int) -> None:
    a, b = integers(element, 64, 4 * K[element]), integers(element, 48, 4 * K[element])
    d = program(a, b, (element, element, "s32" if element == "s8" else "f32"), swizzle=(128, swizzle)).run()
    assert (d == a @ b.T).all()


@pytest.mark.parametrize("line", [1, 5])
def test_matrix_that_starts_within_the_swizzling_pattern(line: int) -> None:
    """The base offset says at which 128-byte line the pattern starts; without it, it is a finding."""
    a, b = integers("bf16", 64, 64), integers("bf16", 16, 64)
    whole = program(a, b)
    # Swizzled as if it started at 0, and then moved by some lines.
    whole.right.image = np.concatenate([np.zeros(128 * line, np.uint8), whole.right.image, np.zeros(2048, np.uint8)])
    whole.right.image = whole.right.image[: whole.right.image.size // 2048 * 2048]
    moved = [bits + (128 * line >> 4) for bits in whole.right.descriptors]
    whole.right.descriptors = [bits | line << 49 for bits in moved]
    assert (whole.run() == a @ b.T).all()
    whole.right.descriptors = moved
    with pytest.raises(errors.Misaligned, match=f"in line {line} of the 128-byte swizzling pattern.*base offset 0"):
        whole.run()


@pytest.mark.parametrize(("signs", "sign"), [(", -1, 1", -1), (", 1, -1", -1), (", -1, -1", 1)])
def test_negated_operands(signs: str, sign: int) -> None:
    a, b, c = integers("e4m3", 64, 64), integers("e5m2", 16, 64), RNG.integers(-9, 9, (64, 16))
    d = program(a, b, ("e4m3", "e5m2", "f32"), signs=signs, start=start_registers(c, "f32")).run()
    assert (d == sign * (a @ b.T) + c).all()


def test_scale_d() -> None:
    """False: the accumulator is not read, NaN or not. A literal, a predicate, and a negated one."""
    a, b = integers("f16", 64, 16), integers("f16", 8, 16)
    nan = np.full((4, 128), np.float32(np.nan)).view(np.uint32)
    ones = start_registers(np.ones((64, 8)), "f32")

    def run(scale: str, start: np.ndarray) -> np.ndarray:
        body = "setp.eq.u32 %p0, 0, 1; wgmma.fence.sync.aligned; {steps}"
        body += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
        return program(a, b, ("f16", "f16", "f32"), body=body, start=start, scale=scale).run()

    for scale in ("0", "%p0"):
        assert (run(scale, nan) == a @ b.T).all()
    for scale in ("1", "!%p0"):
        assert (run(scale, ones) == a @ b.T + 1).all()
        assert np.isnan(run(scale, nan)).all()


def test_scale_d_differs_between_ctas() -> None:
    a, b = integers("f16", 64, 16), integers("f16", 8, 16)
    body = "mov.u32 %r36, %ctaid.x; setp.ne.u32 %p0, %r36, 1; wgmma.fence.sync.aligned; {steps}"
    body += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    ones = start_registers(np.ones((64, 8)), "f32")
    d = program(a, b, ("f16", "f16", "f32"), body=body, start=ones, scale="%p0").run(grid=3)
    for cta in range(3):
        assert (d[cta] == a @ b.T + (cta != 1)).all()


def test_tf32_ignores_the_low_bits() -> None:
    a, b = integers("tf32", 64, 16), integers("tf32", 8, 16)
    noisy = program(a, b, ("tf32", "tf32", "f32"))
    noisy.right.image = (noisy.right.image.view(np.uint32) | np.uint32(0x1FFF)).view(np.uint8)
    assert (noisy.run() == a @ b.T).all()


def test_integers_wrap_or_saturate() -> None:
    a, b = np.full((64, 32), 3), np.full((8, 32), 3)
    c = np.full((64, 8), 2**31 - 10)
    for suffix in (".satfinite.s32.s8.s8", ".s32.s8.s8.satfinite"):
        d = program(a, b, ("s8", "s8", "s32"), start=start_registers(c, "s32"), opcode=f"m64n8k32{suffix}").run()
        assert (d == 2**31 - 1).all()
    d = program(a, b, ("s8", "s8", "s32"), start=start_registers(c, "s32")).run()
    assert (d == 2**31 - 10 + 9 * 32 - 2**32).all()


def test_long_integer_sums_are_exact() -> None:
    """512 products of 255 * 255 exceed 2^24, up to which float32 counts."""
    a, b = np.full((64, 512), 255), np.full((8, 512), 255)
    b[:, ::2] = 254
    assert (program(a, b, ("u8", "u8", "s32")).run() == a @ b.T).all()


def test_f16_accumulators_round_at_every_instruction() -> None:
    """2048 + 1 + 1 is 2048 in f16 where each addition is rounded, and 2050 where the sum is."""
    a, b = np.zeros((64, 32), int), np.zeros((8, 32), int)
    a[:, 0] = a[:, 16] = b[:, 0] = b[:, 16] = 1
    start = start_registers(np.full((64, 8), 2048), "f16")
    assert (program(a, b, ("f16", "f16", "f16"), start=start).run() == 2048).all()


def test_hardware_accumulation() -> None:
    """8-bit floats keep 13 bits of fraction: beside 2^16 products of 4 are dropped, and those of 16 are not."""
    c = start_registers(np.full((64, 8), 2**16), "f32")
    a, b = np.zeros((64, 32), int), np.zeros((8, 32), int)
    exact = {"accumulation": "hardware"}
    for value, left in ((2, 0), (4, 128)):
        a[:, :8] = b[:, :8] = value
        kinds = ("e4m3", "e4m3", "f32")
        assert (program(a, b, kinds, start=c).run() == 2**16 + 8 * value**2).all()
        assert (program(a, b, kinds, start=c, settings=exact).run() == 2**16 + left).all()
        assert (program(a, b, ("f16", "f16", "f32"), start=c, settings=exact).run() == 2**16 + 8 * value**2).all()


@pytest.mark.parametrize(
    "opcode",
    [
        "m64n12k16.f32.f16.f16",
        "m64n264k16.f32.f16.f16",
        "m64n8k8.f32.f16.f16",
        "m64n8k16.f16.bf16.bf16",
        "m64n8k16.f32.f16.bf16",
        "m64n8k16.satfinite.f32.f16.f16",
        "m64n8k256.s32.b1.b1.and.popc",
        "m64n40k32.s32.s8.s8",
    ],
)
def test_illegal_combinations(opcode: str) -> None:
    a, b = integers("f16", 64, 16), integers("f16", 8, 16)
    with pytest.raises(errors.UnknownInstruction):
        program(a, b, ("f16", "f16", "f32"), opcode=opcode).run()


def test_operands_that_the_assembler_refuses() -> None:
    a, b = integers("f16", 64, 16), integers("f16", 8, 16)
    for change in ({"signs": ", 1, 2"}, {"signs": ", 1"}, {"scale": "2"}):
        with pytest.raises(errors.UnknownInstruction):
            program(a, b, ("f16", "f16", "f32"), **change).run()


def test_layouts_of_the_test_itself() -> None:
    """The byte at which CuTe puts single elements, worked out by hand: Swizzle<3,4,3> of (row 3, column 9) bf16."""
    values = np.zeros((16, 64), int)
    values[3, 9] = 1
    image = operand(values, "bf16", 128).image.view(np.uint16)
    # linear byte 3 * 128 + 18, in 16-byte chunk 1; the line is 3, so the chunk becomes 1 ^ 3 = 2
    assert image[(3 * 128 + 2 * 16 + 2) // 2] == 0x3F80
    assert np.count_nonzero(image) == 1
    image = operand(values.T.copy(), "bf16", 64, mn_major=True).image.view(np.uint16)
    # row 9, k 3: line of 32 elements 3, byte 18, chunk 1; 64-byte lines 2 and 3 share 128-byte line 1: chunk 1 ^ 1 = 0
    assert image[(3 * 64 + 0 * 16 + 2) // 2] == 0x3F80
    assert np.count_nonzero(image) == 1
