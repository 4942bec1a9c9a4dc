"""How tensor cores sum: cases worked out by hand, values of other people's bit-exact models, and mma that use them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cute_attn.emulator import settings
from cute_attn.emulator.errors import UnknownAccumulation
from cute_attn.emulator.settings import Settings
from cute_attn.emulator.tensor_core import dot, model_for

from .harness import run
from .test_block_scaled import KINDS, mxf8f6f4, run_scaled, scale_lanes, scale_value
from .test_matrix import CHAIN, F8F6F4, in_containers, packed, random_matrix, run_mma, small_float

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def total(
    target: str,
    kinds: str,
    a: dict[int, float],
    b: dict[int, float] | float,
    c: float = 0.0,
    *,
    k: int,
    accumulator: str = "f32",
    instruction: Any = "mma",
) -> float:
    """c plus the sum of products of two vectors of k elements, given by position; b may be the same everywhere."""
    left, right = np.zeros(k), np.zeros(k) if isinstance(b, dict) else np.full(k, b)
    for position, value in a.items():
        left[position] = value
    for position, value in b.items() if isinstance(b, dict) else ():
        right[position] = value
    first, second = kinds.split(".")
    model = model_for(target, instruction, first, second, accumulator, k=k)
    return float(dot(left[None], right[None], np.float32([[c]]), model)[0, 0])


# ---- worked out by hand


def test_a_large_product_swamps_small_ones():
    """2^20 keeps 24 bits below it on Ampere and 25 on Hopper: seven times 2^-5 are nothing there, 7/32 here.

    A float32 has steps of 1/8 at 2^20, so 7/32 is cut to 1/8 (and would be rounded to 1/4).
    """
    a, b = {0: 1024.0} | dict.fromkeys(range(1, 8), 2.0**-5), {0: 1024.0} | dict.fromkeys(range(1, 8), 1.0)
    negative = {n: -value for n, value in a.items()}
    for kinds in ("f16.f16", "bf16.bf16"):
        for target, extra in (("sm_80", 0), ("sm_86", 0), ("sm_89", 0), ("sm_90a", 0.125), ("sm_120a", 0.125)):
            assert total(target, kinds, a, b, k=8) == 2**20 + extra
            assert total(target, kinds, negative, b, k=8) == -(2**20) - extra


def test_each_term_is_cut_toward_zero():
    """Next to 2^20 and on Ampere -2^-5 is 0, not -2^-4; 1.5 · 2^-4 is 2^-4 on either side of zero."""
    assert total("sm_80", "f16.f16", {0: 1024.0, 1: -(2.0**-5)}, {0: 1024.0, 1: 1.0}, k=8) == 2**20
    for sign in (1, -1):
        a = {0: 1024.0, 1: -1024.0, 2: sign * 1.5 * 2.0**-4}
        assert total("sm_80", "f16.f16", a, {0: 1024.0, 1: 1024.0, 2: 1.0}, k=8) == sign * 2.0**-4


def test_c_takes_part_in_the_alignment():
    assert total("sm_80", "f16.f16", {0: 2.0**-5}, 1.0, 2.0**20, k=8) == 2**20
    assert total("sm_90a", "f16.f16", dict.fromkeys(range(4), 2.0**-5), 1.0, 2.0**20, k=8) == 2**20 + 0.125
    # C is cut as well: 1 + 2^-10 next to 2^20 keeps 2^-4
    assert total("sm_80", "f16.f16", {0: 1024.0, 1: -1024.0}, {0: 1024.0, 1: 1024.0}, 1 + 2.0**-10, k=8) == 1.0


@pytest.mark.parametrize(
    "target,kinds,k,group",
    [
        ("sm_80", "f16.f16", 16, 8),
        ("sm_86", "bf16.bf16", 16, 8),
        ("sm_89", "tf32.tf32", 8, 4),
        ("sm_90a", "f16.f16", 16, 16),
        ("sm_90a", "tf32.tf32", 8, 8),
        ("sm_120a", "f16.f16", 16, 16),
        ("sm_89", "e4m3.e4m3", 32, 16),
        ("sm_120a", "e4m3.e4m3", 32, 32),
    ],
)
def test_groups(target, kinds, k, group):
    """Small products survive if their group is summed before the large one comes, and only then."""
    large, fraction = (16.0, 13) if target == "sm_89" and kinds.startswith("e4m3") else (256.0, 24)
    fraction += target in ("sm_90a", "sm_120a")
    small = large**2 * 2.0 ** -(fraction + 1)  # one bit below what is kept

    def value(at: int) -> float:
        a = dict.fromkeys(range(k), 2.0**-6) | {at: large}
        b = dict.fromkeys(range(k), small * 2.0**6) | {at: large}
        return total(target, kinds, a, b, k=k) / large**2

    assert value(0) == 1
    before = k - group  # the last group holds the large one: the products before it have been added up by then
    kept = before * small / large**2
    assert value(k - 1) == 1 + kept - kept % 2.0**-23 and (kept > 0) == (group < k)


def test_subnormal_factors_count_with_the_least_exponent():
    """2^-24 · 2^15 in f16 counts as 2^1: 2^-24 beside it is below the 24 bits kept. As 2^-9 it would be there."""
    a, b = {0: 2.0**-24, 1: 2.0**-12}, {0: 2.0**15, 1: 2.0**-12}
    assert total("sm_80", "f16.f16", a, b, k=8) == 2.0**-9
    assert total("sm_80", "tf32.tf32", a, b, k=4) == 2.0**-9 + 2.0**-24


def test_products_are_not_normalised():
    """1.5 · 1.5 is aligned as 2^0: four times 2^-24 are just there, and make one step of a float32 above 2."""
    a = {0: 1.5} | dict.fromkeys(range(1, 5), 2.0**-12)
    assert total("sm_80", "f16.f16", a, a, k=8) == 2.25 + 2.0**-22


def test_f16_accumulators_round_after_each_group():
    """Eight times 1/8 to 2048, where f16 has steps of 2: a tie to even twice on Ampere, one sum of 16 on Hopper."""
    a = dict.fromkeys(range(16), 0.125)
    assert total("sm_80", "f16.f16", a, 1.0, 2048.0, k=16, accumulator="f16") == 2048
    assert total("sm_90a", "f16.f16", a, 1.0, 2048.0, k=16, accumulator="f16") == 2050
    assert total("sm_80", "f16.f16", {0: 60000.0, 1: 60000.0}, 1.0, k=16, accumulator="f16") == np.inf


@pytest.mark.parametrize("target,instruction", [("sm_89", "mma"), ("sm_90a", "wgmma")])
def test_8_bit_floats_keep_13_bits_on_ada_and_in_wgmma(target, instruction):
    def value(a: dict[int, float], c: float, b: float = 2.0**-6) -> float:
        return total(target, "e4m3.e4m3", a, b, c, k=32, instruction=instruction)

    assert value({0: 2.0**-7}, 1.0) == 1 + 2.0**-13
    assert value({0: 2.0**-8}, 1.0) == 1.0
    assert value(dict.fromkeys(range(32), 2.0**-8), -1.0) == -1.0
    assert value({0: 2.0**-7}, 3.0) == 3.0
    # 2^-12 and 2^-13 are both kept beside two products of 1.75, but the sum of all has its 13 bits from 2^1 on
    assert value({0: 2.0**-6, 1: 2.0**-7, 2: 112.0, 3: 112.0}, 0.0) == 3.5 + 2.0**-12
    # 2^-8 is subnormal and counts as 2^-6, so 2^-11 is the last bit kept beside 448 · 2^-8
    assert value({0: 2.0**-3, 1: 2.0**-4, 2: 448.0}, 0.0, 2.0**-8) == 1.75 + 2.0**-11


def test_8_bit_float_mma_on_hopper_is_two_f16_mma_and_an_addition():
    """Products of the lower halves of all registers (k mod 4 of 0 and 1) come first; C is added last, rounded."""
    for at, expected in ((2, 2.0**16 + 16 * 2.0**-10), (0, 2.0**16)):
        vector = dict.fromkeys(range(32), 2.0**-5) | {at: 256.0}
        assert total("sm_90a", "e4m3.e4m3", vector, vector, k=32) == expected
        assert total("sm_100a", "e4m3.e4m3", vector, vector, k=32) == expected
    assert total("sm_90a", "e4m3.e4m3", {0: 1.0}, 1.0, 2.0**24 + 2, k=32) == 2.0**24 + 4  # a tie, to even
    assert total("sm_120a", "e4m3.e4m3", {0: 1.0}, 1.0, 2.0**24 + 2, k=32) == 2.0**24 + 2  # cut
    assert total("sm_90a", "e5m2.e4m3", {0: 1.0}, 1.0, 2048.0, k=32, accumulator="f16") == 2048


def test_tiny_sums():
    """Alignment stops at 2^-20 for f16 accumulators: 2^-48 no longer breaks the tie at 2^-25. Far lower for float32."""
    a, b = {0: 2.0**-11, 1: 2.0**-24}, {0: 2.0**-14, 1: 2.0**-24}
    for target in ("sm_80", "sm_90a"):
        assert total(target, "f16.f16", a, b, k=16, accumulator="f16") == 0
        assert total(target, "f16.f16", a | {1: 2.0**-19}, b, k=16, accumulator="f16") == 2.0**-24
        assert total(target, "f16.f16", a, b, k=16) == 2.0**-25 + 2.0**-48
        assert total(target, "bf16.bf16", {0: 2.0**-70, 1: 2.0**-75}, {0: 2.0**-70, 1: 2.0**-74}, k=16) == (
            2.0**-140 + 2.0**-149
        )
        assert total(target, "bf16.bf16", {0: 2.0**-75}, {0: 2.0**-75}, k=16) == 0


def test_special_values_and_zero():
    for kinds, k in (("f16.f16", 16), ("bf16.bf16", 16)):
        assert total("sm_80", kinds, {0: np.inf, 1: 1.0}, 1.0, k=k) == np.inf
        assert np.isnan(total("sm_80", kinds, {0: np.inf, 1: -np.inf}, 1.0, k=k))
        assert np.isnan(total("sm_90a", kinds, {0: np.nan}, 1.0, k=k))
        assert total("sm_80", kinds, {0: 1.0}, 1.0, -np.inf, k=k) == -np.inf
        zero = total("sm_80", kinds, {0: -1.0, 1: 1.0}, 1.0, -0.0, k=k)
        assert zero == 0 and not np.signbit(zero)
    assert total("sm_80", "bf16.bf16", {0: 2.0**127, 1: 2.0**127}, 1.0, k=16) == np.inf


def test_4_bit_blocks_are_exact_within_and_aligned_by_their_scales():
    """16 products are summed exactly; between blocks 35 bits below the largest scale count, whatever the sums are."""

    def value(a: np.ndarray, scales: list[float], c: float = 0.0) -> float:
        model = model_for("sm_120a", "mma", "e2m1", "e2m1", "f32", k=64, scale="ue8m0")
        one = np.ones((1, 4), np.float32)
        return float(dot(a[None], np.ones((1, 64)), np.float32([[c]]), model, np.float32([scales]), one)[0, 0])

    a = np.zeros(64)
    a[0], a[16] = 0.5, 0.5
    assert value(a, [1.0, 2.0**-23, 1.0, 1.0]) == 0.5 + 2.0**-24
    assert value(a, [2.0**-120, 2.0**-127, 2.0**-127, 2.0**-127]) == 2.0**-121 + 2.0**-128
    a[1] = -0.5
    # The first block is zero, yet its scale counts: 2^-36 below it is cut
    assert value(a, [1.0, 2.0**-34, 1.0, 1.0]) == 2.0**-35
    assert value(a, [1.0, 2.0**-35, 1.0, 1.0]) == 0.0
    a[:16] = 0
    assert value(a, [1.0, 2.0**-35, 1.0, 1.0]) == 2.0**-36  # a block of nothing but zeros does not


@pytest.mark.parametrize(
    "target,instruction,kinds,k",
    [
        ("sm_75", "mma", "f16.f16", 8),
        ("sm_103a", "mma", "f16.f16", 16),
        ("sm_120a", "wgmma", "f16.f16", 16),
        ("sm_80", "mma", "e4m3.e4m3", 32),
        ("sm_90a", "mma", "e2m1.e4m3", 32),
    ],
)
def test_what_nobody_has_published_is_refused(target, instruction, kinds, k):
    with pytest.raises(UnknownAccumulation):
        model_for(target, instruction, *kinds.split("."), "f32", k=k)


# ---- values of other models

# Three instructions after another, C = 1000 / seed at first, inputs from `pseudo_random` (A: seed, B: seed + 100,
# scales: seed + 200 and + 300), seeds 1 to 6. From mmaemu 0.1.0 (presets "ada" and "hopper", which replay recordings of
# an RTX 4060 and an H100) and from MMA-Sim 2.1.1 ("RTX Blackwell").
MMAEMU = {
    ("sm_89", "mma", "e4m3", "e4m3"): "C70B5800 C7C28400 C6C49000 C75BB000 452DF000 471A9C00",
    ("sm_89", "mma", "e5m2", "e4m3"): "C9DD6C00 CADDAC00 4AA99C00 CADC6800 4970DC00 4A2BA800",
    ("sm_89", "mma", "e5m2", "e5m2"): "CCA6E800 CE514C00 4E402000 CE8E5000 4CD3D800 4D82B000",
    ("sm_90a", "wgmma", "e4m3", "e4m3"): "C70B5800 C7C28400 C6C49000 C75BC000 452DE000 471A9400",
    ("sm_90a", "wgmma", "e5m2", "e4m3"): "C9DD6C00 CADDAC00 4AA99C00 CADC6800 4970D800 4A2BA800",
    ("sm_90a", "wgmma", "e5m2", "e5m2"): "CCA6E800 CE514C00 4E402000 CE8E5000 4CD3D800 4D82B000",
}
MMA_SIM = {
    ("e2m1", "e2m1", "ue4m3", 4): "C8F99B57 C8DAD58C C7B28FA2 494C2AF8 C6B3E037 C9593E7B",
    ("e2m1", "e2m1", "ue8m0", 2): "C78B40C9 C90AA5BD C6E26156 430C89A0 C5389229 C6EBB0BA",
    ("e3m2", "e5m2", "ue8m0", 1): "C9133A88 4C872D91 47D0FC52 4707BFD4 CBCEBCF8 C8633220",
    ("e2m1", "e4m3", None, 0): "C2AC3800 C4E546A8 451E4819 C3FC1E60 44FBEF60 C20CAB58",
    ("e5m2", "e5m2", None, 0): "CCA6E7BB CE515065 4E401B16 CE8E5051 4CD3D628 4D82B0B7",
}


def pseudo_random(count: int, seed: int) -> np.ndarray:
    result = []
    for _ in range(count):
        seed = (seed * 1103515245 + 12345) % 2**31
        result.append(seed >> 16 & 0xFF)
    return np.array(result, np.uint8)


def elements(kind: str, count: int, seed: int) -> np.ndarray:
    if kind in FP8:
        codes = pseudo_random(count, seed)
        codes[(codes & 0x7F) > 0x7B] ^= 0x40
        return torch.from_numpy(codes).view(FP8[kind]).double().numpy()
    bits = 4 if kind == "e2m1" else 6
    return np.array([small_float(kind, int(code) % 2**bits) for code in pseudo_random(count, seed)])


def bits_of(x: float) -> str:
    return f"{np.float32(x).view(np.uint32):08X}"


@pytest.mark.parametrize("target,instruction,first,second", MMAEMU)
def test_8_bit_floats_as_mmaemu_has_them(target, instruction, first, second):
    model = model_for(target, instruction, first, second, "f32", k=32)
    for seed, expected in enumerate(MMAEMU[target, instruction, first, second].split(), 1):
        a, b = elements(first, 96, seed), elements(second, 96, seed + 100)
        c = np.float32([[1000 / seed]])
        for step in range(0, 96, 32):
            c = dot(a[None, step : step + 32], b[None, step : step + 32], c, model)
        assert bits_of(c[0, 0]) == expected


@pytest.mark.parametrize("first,second,scale,scales", MMA_SIM)
def test_sm_120_as_mma_sim_has_it(first, second, scale, scales):
    k = 64 if scales > 1 else 32
    model = model_for("sm_120a", "mma", first, second, "f32", k=k, scale=scale)
    for seed, expected in enumerate(MMA_SIM[first, second, scale, scales].split(), 1):
        if k == 64:  # two elements to a byte
            a, b = (
                np.array([small_float("e2m1", int(n)) for byte in pseudo_random(96, s) for n in (byte & 15, byte >> 4)])
                for s in (seed, seed + 100)
            )
        else:
            a, b = elements(first, 96, seed), elements(second, 96, seed + 100)
        c = np.float32([[1000 / seed]])
        for step in range(3):
            part = slice(k * step, k * step + k)
            own: list[np.ndarray] = []
            for s in (200, 300) if scale else ():
                codes = pseudo_random(3 * scales, seed + s)[scales * step : scales * step + scales]
                codes = 117 + codes % 20 if scale == "ue8m0" else codes % 126
                own.append(np.array([[scale_value(str(scale), int(code)) for code in codes]]))
            c = dot(a[None, part], b[None, part], c, model, *own)
        assert bits_of(c[0, 0]) == expected


# ---- mma with the hardware's sums


@pytest.mark.parametrize(
    "target,kind,k,accumulator",
    [
        ("sm_80", "f16", 16, "f32"),
        ("sm_80", "f16", 8, "f16"),
        ("sm_86", "tf32", 8, "f32"),
        ("sm_90a", "bf16", 16, "f32"),
        ("sm_89", "e4m3", 32, "f32"),
        ("sm_89", "e5m2", 16, "f16"),
        ("sm_90a", "e5m2", 32, "f32"),
        ("sm_90a", "e4m3", 32, "f16"),
        ("sm_120a", "e4m3", 32, "f32"),
    ],
)
def test_mma_sums_as_its_target_does(target, kind, k, accumulator):
    rng = np.random.default_rng(0)
    (a, a_bits), (b, b_bits) = random_matrix(kind, (16, k), rng), random_matrix(kind, (k, 8), rng)
    c = rng.standard_normal((16, 8)).astype(np.float32 if accumulator == "f32" else np.float16)
    opcode = f"mma.sync.aligned.m16n8k{k}.row.col.{accumulator}.{kind}.{kind}.{accumulator}"
    got = run_mma(opcode, a_bits, b_bits, c, target=target, accumulation="hardware")
    expected = dot(a, b.T, c.astype(np.float32), model_for(target, "mma", kind, kind, accumulator, k=k))
    assert (got == expected).all()
    if accumulator == "f32" and target != "sm_90a":  # whose 25 bits hold these sums exactly
        assert (got != run_mma(opcode, a_bits, b_bits, c, target=target)).any()


@pytest.mark.parametrize("name", ["mxf4", "mxf4nvf4 4X", "mxf8f6f4"])
def test_block_scaled_mma_sums_as_the_hardware_does(name):
    rng = np.random.default_rng(0)
    opcode, scales, kind = KINDS.get(name, (mxf8f6f4("e2m1", "e4m3"), 1, "ue8m0"))
    k, second = (32, "e4m3") if scales == 1 else (64, "e2m1")
    (a, a_codes), (b, b_codes) = random_matrix("e2m1", (16, k), rng), random_matrix(second, (k, 8), rng)
    if scales == 1:
        operands = in_containers("e2m1", a_codes, rng), b_codes
    else:
        operands = packed(a_codes, 1), packed(b_codes, 0)
    low, high = (107, 147) if kind == "ue8m0" else (0, 127)
    codes = [rng.integers(low, high, (rows, scales)).astype(np.uint8) for rows in (16, 8)]
    c = rng.standard_normal((16, 8)).astype(np.float32)
    lanes = [scale_lanes(code, 0, thread, rng) for code, thread in zip(codes, (1, 3), strict=True)]
    selectors = (0, 1, 0, 3)
    got = run_scaled(opcode, (*operands, c), *lanes, selectors, target="sm_120a", accumulation="hardware")
    values = [np.vectorize(lambda code: scale_value(kind, int(code)))(code) for code in codes]
    model = model_for("sm_120a", "mma", "e2m1", second, "f32", k=k, scale=kind)
    assert (got == dot(a, b.T, c, model, *values)).all()


def test_fused_mma_keep_the_hardware_s_order():
    """A chain that is one product otherwise is summed instruction by instruction: the same bits as one at a time."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 0x78, (32, 16)).astype(np.uint8) for _ in range(2))
    for target in ("sm_89", "sm_90a", "sm_120a"):
        results = []
        for separator in ("", "bar.sync 0;"):
            out = np.zeros((32, 8), np.float32)
            mma = f"{separator} mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"
            body = "mad.wide.u32 %rd7, %r50, 32, %rd2;" + CHAIN.replace("EXTRA", "").replace("MMA", mma)
            run(body, {"a": a, "b": b, "out": out}, target=target, accumulation="hardware")
            results.append(out)
        assert np.array_equal(*results, equal_nan=True) and results[0].any()


def test_integers_are_exact_and_unknown_targets_refused():
    rng = np.random.default_rng(0)
    (a, a_bits), (b, b_bits) = random_matrix("s8", (16, 32), rng), random_matrix("u8", (32, 8), rng)
    opcode = "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32"
    got = run_mma(opcode, a_bits, b_bits, np.zeros((16, 8), np.int32), target="sm_103a", accumulation="hardware")
    assert (got == a @ b).all()
    (_, a_bits), (_, b_bits) = random_matrix("f16", (16, 16), rng), random_matrix("f16", (16, 8), rng)
    opcode = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    with pytest.raises(UnknownAccumulation, match="sm_103a"):
        run_mma(opcode, a_bits, b_bits, np.zeros((16, 8), np.float32), target="sm_103a", accumulation="hardware")


@pytest.mark.parametrize("kind", F8F6F4)
def test_every_mix_of_f8f6f4_has_a_model(kind):
    rng = np.random.default_rng(0)
    (a, a_codes), (b, b_codes) = random_matrix(kind, (16, 32), rng), random_matrix("e2m3", (32, 8), rng)
    c = (rng.standard_normal((16, 8)) * 2**12).astype(np.float32)
    operands = in_containers(kind, a_codes, rng), in_containers("e2m3", b_codes, rng), c
    opcode = f"mma.sync.aligned.m16n8k32.row.col.kind::f8f6f4.f32.{kind}.e2m3.f32"
    got = run_mma(opcode, *operands, target="sm_120a", accumulation="hardware")
    assert (got == dot(a, b.T, c, model_for("sm_120a", "mma", kind, "e2m3", "f32", k=32))).all()


# ---- what it is for

LONG_SUM = """
    mad.wide.u32 %rd5, %r50, 4, %rd0; mov.b32 %r30, 0; mov.b32 %r5, 0; mov.b32 %r6, 0; mov.b32 %r31, 0;
    mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;
    mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0;
LOOP:
    mad.wide.u32 %rd6, %r30, 768, %rd0; mad.wide.u32 %rd6, %r50, 24, %rd6;
    ld.global.v2.b32 {%r1, %r2}, [%rd6]; ld.global.v2.b32 {%r3, %r4}, [%rd6+8]; ld.global.v2.b32 {%r5, %r6}, [%rd6+16];
    mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32
        {%r10, %r11, %r12, %r13}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r10, %r11, %r12, %r13};
    add.u32 %r30, %r30, 1; and.b32 %r31, %r30, PERIOD; setp.ne.u32 %p1, %r31, 0; @%p1 bra NEXT;
    add.f32 %r20, %r20, %r10; add.f32 %r21, %r21, %r11; add.f32 %r22, %r22, %r12; add.f32 %r23, %r23, %r13;
    mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0;
NEXT:
    setp.lt.u32 %p1, %r30, 128; @%p1 bra LOOP;
    mad.wide.u32 %rd7, %r50, 16, %rd1; st.global.v4.b32 [%rd7], {%r20, %r21, %r22, %r23};
"""


@pytest.mark.parametrize("target", ["sm_89", "sm_120a"])
def test_long_sums_of_8_bit_floats_need_two_levels(target):
    """k = 4096, positive terms: an accumulator of 13 bits loses per cents, as DeepSeek-V3's report (3.5.2) found on
    Hopper and SageAttention2 on Ada; sums of 128 that are added up in float32 do not, nor does sm_120's accumulator.
    """
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.random((128, 32, 24), np.float32)).to(torch.float8_e4m3fn)
    codes = values.view(torch.uint8).numpy()

    def error(period: int, accumulation: str) -> float:
        out = np.zeros((32, 4), np.float32)
        body = LONG_SUM.replace("PERIOD", str(period - 1))
        run(body, {"codes": codes, "out": out}, target=target, accumulation=accumulation)
        exact = values.double().numpy()
        sums = np.zeros((32, 4))
        for lane in range(32):
            for i in range(4):
                g, column = lane // 4 + (8 if i >= 2 else 0), 2 * (lane % 4) + i % 2
                for t in range(4):
                    a = exact[:, 4 * (g % 8) + t, :16].reshape(128, 4, 4)[:, g // 8 :: 2]
                    b = exact[:, 4 * column + t, 16:].reshape(128, 2, 4)
                    sums[lane, i] += (a * b).sum()
        return float(np.abs(out / sums - 1).max())

    one_level, two_levels = error(128, "hardware"), error(4, "hardware")
    assert error(128, "float32") < 1e-5 and error(4, "float32") < 1e-5
    if target == "sm_89":
        assert 0.02 < one_level < 0.15 and two_levels < 0.002
    else:
        assert one_level < 1e-5 and two_levels < 1e-5


def test_it_is_a_setting():
    assert Settings().accumulation == "float32"
    with settings(accumulation="hardware"), pytest.raises(TypeError), settings(accumulate="hardware"):
        pass
