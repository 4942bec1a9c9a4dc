"""Sums of products as the tensor cores of each architecture really form them.

A tensor core does not add in float32. It takes the products of a group of k elements together with the accumulator,
aligns all of them to the largest exponent among them, cuts each off toward zero some bits below that exponent, adds
exactly, and cuts or rounds the sum to the accumulator's format; the next group starts from that. So a large term swamps
small ones, and with 8-bit floats on Ada and Hopper, where only 13 bits are kept, a long sum stands still early.

`model_for` gives the model of an instruction and `dot` applies it; both wgmma and mma.sync use them:

    model = model_for(wave.kernel.target, "wgmma", "e4m3", "e4m3", "f32", k=32)
    d = dot(a, b, c, model)        # float32 a [..., m, k], b [..., n, k], c [..., m, n]; k of one instruction

A sum over several instructions is several calls: which products form a group is a matter of one instruction. Integer
products need no model: they are exact everywhere.

Sources
* Group sizes, kept bits, rounding, least exponents: P. Xie et al., "MMA-Sim: Bit-Accurate Reference Model of Tensor
  Cores and Matrix Cores", arXiv 2511.10909, and its tables for Ampere, Ada, Hopper, Blackwell and RTX Blackwell. For
  8- to 19-bit floats F. Khattak and M. Mikaitis, "Accurate Models of NVIDIA Tensor Cores", arXiv 2512.07004, found the
  same independently. The recordings that they publish, 5,000 sums per format from A100, A2, RTX 1000 Ada, L40S, H100,
  H200 and B200 GPUs, agree bit for bit with the models here (wgmma of 8-bit floats: with C = 0 and f32 only).
* mma.sync of 8-bit floats on sm_90 and sm_100: `ptxas` has no such instruction there. It converts to f16 and emits two
  f16 mma, one of the lower and one of the upper halves of every register, and then adds C by an ordinary addition
  (read off its machine code; the recordings of H100, H200 and B200 agree).
* sm_120, its block-scaled kinds included: arXiv 2511.10909 alone.

Not published, hence refused with `UnknownAccumulation`: architectures that are not in the table. Each recording is one
instruction; that the next one continues from the rounded accumulator follows from the accumulator being a register. NaN
payloads are not modelled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np

from .errors import UnknownAccumulation
from .memory import Array

LEAST_EXPONENT = {
    "f16": -14,
    "bf16": -126,
    "tf32": -126,
    "e4m3": -6,
    "e5m2": -14,
    "e3m2": -2,
    "e2m3": 0,
    "e2m1": 0,
    "ue4m3": -6,
    "ue8m0": -127,
}
"""Exponent of the smallest normal number. Subnormal factors are not normalised: they count with this exponent."""
_ELEMENT_BYTES = {"f16": 2, "bf16": 2, "tf32": 4}
_ZERO = -8000
"""The exponent of zero: below every other, and four of them still fit into int16."""
_CHUNK = 1 << 15
"""Sums formed at a time: about what the caches hold."""


@dataclass(frozen=True)
class Model:
    """How one instruction of one architecture sums.

    group: products that are aligned and summed together. fraction: bits kept below the largest exponent. result: the
    accumulator's format after each group: "f32" and "e8m13" (float32 with 13 bits of fraction) by truncation, "f16" to
    nearest even. least: the alignment exponent is never below this. a, b: the element formats. scale: the format of the
    block scales, if any. block: that many products are summed exactly and only then scaled and aligned, by the exponent
    of the scales alone. halves: the groups are the lower and the upper halves of the 32-bit registers. c_last: the
    instruction sums from zero, and C is added to that in the accumulator's own arithmetic.
    """

    group: int
    fraction: int
    result: Literal["f32", "e8m13", "f16"]
    least: int
    a: str
    b: str
    scale: str | None = None
    block: int = 1
    halves: bool = False
    c_last: bool = False


@dataclass(frozen=True)
class _Core:
    """The tensor core of an architecture: bytes of A summed at once, fraction bits, least exponents for f32 and f16."""

    group_bytes: int
    fraction: int
    least: int
    least_f16: int


_AMPERE = _Core(16, 24, -132, -20)
_HOPPER = _Core(32, 25, -133, -21)
_CORES = {
    "sm_80": _AMPERE,
    "sm_86": _AMPERE,
    "sm_89": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "sm_120": _HOPPER,
}
_FP8_FRACTION = 13
"""8-bit floats on Ada and in Hopper's wgmma keep 13 bits and hold the accumulator as e8m13."""


@cache
def model_for(
    target: str,
    instruction: Literal["mma", "wgmma"],
    a: str,
    b: str,
    accumulator: str,
    *,
    k: int,
    scale: str | None = None,
) -> Model:
    """The model of a floating instruction on a PTX target ("sm_90a").

    a, b, accumulator, scale: PTX type names (scale: of the block-scaled kinds). k: the instruction's.
    Raises UnknownAccumulation where nobody has published what the hardware does.
    """
    arch = re.sub(r"[a-z]$", "", target)
    core = _CORES.get(arch)
    if core is None or (instruction == "wgmma" and arch != "sm_90"):
        raise UnknownAccumulation(f"how {instruction} of {a} and {b} sums on {target} is not known")
    f16 = accumulator == "f16"
    model = Model(
        group=min(k, core.group_bytes // _ELEMENT_BYTES.get(a, 1)),
        fraction=core.fraction,
        result="f16" if f16 else "f32",
        least=core.least_f16 if f16 else core.least,
        a=a,
        b=b,
    )
    if a in _ELEMENT_BYTES:
        return model
    if arch == "sm_120":
        if scale is not None and k == 64:
            return replace(model, group=64, fraction=35, least=-139, scale=scale, block=16)
        return replace(model, scale=scale)
    if {a, b} - {"e4m3", "e5m2"} or scale is not None or arch in ("sm_80", "sm_86"):
        raise UnknownAccumulation(f"{target} has no {instruction} of {a} and {b}")
    if instruction == "mma" and arch != "sm_89":
        return replace(model, group=k // 2, a="f16", b="f16", halves=True, c_last=True)
    return replace(model, fraction=_FP8_FRACTION, result="f16" if f16 else "e8m13")


def _exponents(x: Array, least: int) -> Array:
    """int16 exponents of float64 x, subnormals of a format with that least exponent clamped to it."""
    exponents = np.maximum(np.frexp(x)[1] - 1, least)
    return np.where(x == 0, _ZERO, np.where(np.isfinite(x), exponents, 0)).astype(np.int16)


def _power_of_two(exponents: Array) -> Array:
    """float64 2^e for |e| < 1000."""
    return (exponents.astype(np.int64) + 1023 << 52).view(np.float64)


def _truncate_f32(x: Array) -> Array:
    """float64 -> float32 toward zero; beyond the range infinity."""
    nearest = x.astype(np.float32)
    bits = nearest.view(np.uint32)
    beyond = np.abs(nearest.astype(np.float64)) > np.abs(x)
    result = np.where(beyond, bits - np.uint32(1), bits).astype(np.uint32).view(np.float32)
    return np.where(np.abs(x) >= 2.0**128, np.copysign(np.float32(np.inf), nearest), result)


def _round(x: Array, result: str, *, ordinary: bool) -> Array:
    """float64 -> the accumulator's format, as float32 without negative zero.

    ordinary: every x is finite, and zero or at least 2^-126.
    """
    if result == "f16":
        return x.astype(np.float16).astype(np.float32) + np.float32(0)
    dropped = 29 if result == "f32" else 39  # of float64's 52 bits of fraction
    if ordinary and np.abs(x).max(initial=0) < 2.0**128:
        return (x.view(np.int64) & -(1 << dropped)).view(np.float64).astype(np.float32) + np.float32(0)
    truncated = _truncate_f32(x)
    if result == "e8m13":
        mask = np.where(np.isnan(truncated), np.uint32(0xFFFFFFFF), np.uint32(0xFFFFFC00))
        truncated = (truncated.view(np.uint32) & mask).view(np.float32)
    return truncated + np.float32(0)


Term = tuple[Array, Array, Array, Array]
"""Two float64 factors and their exponents, int16; they broadcast to the shape of the accumulator."""


def _aligned_sum(terms: list[Term], c: Array, model: Model) -> Array:
    """One group: the products and float32 c -> the new accumulator."""
    wide = c.astype(np.float64)
    top = np.maximum(_exponents(wide, -14 if model.result == "f16" else -126), np.int16(model.least))
    for _, _, exponent_a, exponent_b in terms:
        np.maximum(top, exponent_a + exponent_b, out=top)
    scale = _power_of_two(model.fraction - top)
    steps = np.trunc(wide * scale)
    for a, b, _, _ in terms:
        np.multiply(a, b, out=wide)
        np.multiply(wide, scale, out=wide)
        steps += np.trunc(wide, out=wide)
    ordinary = int(top.min(initial=0)) - model.fraction >= -126 and bool(np.isfinite(steps).all())
    return _round(steps * _power_of_two(top - model.fraction), model.result, ordinary=ordinary)


def _order(k: int, model: Model) -> Array:
    """Positions along k, [groups, group], in the order in which the hardware takes them."""
    positions = np.arange(k)
    if model.halves:
        positions = positions.reshape(-1, 2, 2).swapaxes(0, 1)  # a 32-bit register holds four elements
    return positions.reshape(-1, model.group)


def dot(
    a: Array, b: Array, c: Array, model: Model, scale_a: Array | None = None, scale_b: Array | None = None
) -> Array:
    """c + a · bᵀ for the k elements of one instruction, as `model` sums: float32 [..., m, n].

    a [..., m, k], b [..., n, k], c [..., m, n]: the elements' values in any float dtype, leading dimensions alike.
    scale_a [..., m, scales], scale_b [..., n, scales]: the block scales' values, each for k / scales elements.
    """
    lead, m, n = a.shape[:-2], a.shape[-2], b.shape[-2]
    count = int(np.prod(lead, dtype=np.int64))
    a, b, c = (x.reshape(count, *x.shape[-2:]) for x in (a, b, c))
    if scale_a is not None and scale_b is not None:
        scale_a, scale_b = (x.reshape(count, *x.shape[-2:]) for x in (scale_a, scale_b))
    step = max(1, _CHUNK // (m * n))
    with np.errstate(all="ignore"):
        results = []
        for start in range(0, count, step):
            part = slice(start, start + step)
            scales = None if scale_a is None or scale_b is None else (scale_a[part], scale_b[part])
            results.append(_dot(model, a[part], b[part], c[part], scales))
    return np.concatenate(results).reshape(*lead, m, n)


def _dot(model: Model, a: Array, b: Array, c: Array, scales: tuple[Array, Array] | None) -> Array:
    a, b, c = a.astype(np.float64), b.astype(np.float64), c.astype(np.float32)
    if scales is not None:
        if model.block > 1:
            return _dot_of_scaled_blocks(a, b, c, *scales, model)
        a, exponents_a = _scaled(a, scales[0], model.a, model)
        b, exponents_b = _scaled(b, scales[1], model.b, model)
    else:
        exponents_a = _exponents(a, LEAST_EXPONENT[model.a])
        exponents_b = _exponents(b, LEAST_EXPONENT[model.b])
    a, exponents_a = (np.ascontiguousarray(np.moveaxis(x, -1, 0))[..., None] for x in (a, exponents_a))
    b, exponents_b = (np.ascontiguousarray(np.moveaxis(x, -1, 0))[..., None, :] for x in (b, exponents_b))
    total = np.zeros_like(c) if model.c_last else c
    for group in _order(len(a), model):
        total = _aligned_sum([(a[i], b[i], exponents_a[i], exponents_b[i]) for i in group], total, model)
    if not model.c_last:
        return total
    exact = total.astype(np.float64) + c.astype(np.float64)
    return exact.astype(np.float16).astype(np.float32) if model.result == "f16" else total + c


def _scaled(x: Array, scale: Array, element: str, model: Model) -> tuple[Array, Array]:
    """Elements times their block's scale, and the sum of both exponents."""
    assert model.scale is not None
    wide = np.repeat(scale.astype(np.float64), x.shape[-1] // scale.shape[-1], axis=-1)
    exponents = _exponents(x, LEAST_EXPONENT[element]) + _exponents(wide, LEAST_EXPONENT[model.scale])
    return x * wide, np.maximum(exponents, np.int16(_ZERO))


def _dot_of_scaled_blocks(a: Array, b: Array, c: Array, scale_a: Array, scale_b: Array, model: Model) -> Array:
    """The 4-bit kinds: blocks of 16 products are summed exactly, and their alignment looks at the scales alone."""
    assert model.scale is not None
    blocks = a.shape[-1] // model.block
    left = a.reshape(*a.shape[:-1], blocks, model.block).swapaxes(1, 2)
    right = b.reshape(*b.shape[:-1], blocks, model.block).swapaxes(1, 2).swapaxes(2, 3)
    sums = left @ right  # [count, blocks, m, n]
    nothing = (left != 0).astype(np.float64) @ (right != 0).astype(np.float64) == 0
    wide_a, wide_b = (np.repeat(s.astype(np.float64), blocks // s.shape[-1], axis=-1) for s in (scale_a, scale_b))
    least = LEAST_EXPONENT[model.scale]
    terms = []
    for n in range(blocks):
        factor_a, factor_b = wide_a[:, :, None, n], wide_b[:, None, :, n]
        exponents = _exponents(factor_a, least) + _exponents(factor_b, least)
        exponents = np.where(nothing[:, n], np.int16(_ZERO), exponents)
        terms.append((sums[:, n], factor_a * factor_b, exponents, np.int16(0)))
    return _aligned_sum(terms, c, model)
