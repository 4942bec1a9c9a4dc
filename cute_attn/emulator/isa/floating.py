"""f32, f64 and f32x2 arithmetic.

Exactness against hardware:
* add, sub, mul, div.rn, rcp.rn, sqrt.rn: correctly rounded, as the hardware's.
* fma.f32: computed in float64, where the product is exact, and rounded to odd before the rounding to float32 wherever
  that could matter: correctly rounded except in the subnormal range. fma.f64 rounds twice (numpy has no fused one).
* rz, rm, rp of f32: computed likewise and rounded in that direction; exact except for fma in the subnormal range.
* approx forms (rcp, rsqrt, sqrt, div, lg2, sin, cos, tanh): numpy's float32 function, at most about 1 ulp off; ex2:
  rounded from float64. The hardware's own tables differ in the last bits.
* .ftz flushes subnormal inputs and outputs to zero, keeping the sign. Without it, min and max follow numpy on signed
  zeros, and NaN payloads are those of the operands.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..codegen import BlockBuilder
from ..errors import UnknownInstruction
from ..formats import round_f32
from ..module import Instruction
from ..registry import emits, helper, required_type
from ..wave import Group

_ROUNDINGS = ("rz", "rm", "rp")
_SIGNS = {"add": "+", "sub": "-", "mul": "*"}


def _operands(b: BlockBuilder, i: Instruction, count: int) -> tuple[str, list[str]]:
    """The numpy dtype of the instruction and its source operands in it, flushed if it says so."""
    kind = required_type(i)
    values = [b.read(o, kind.numpy) for o in i.operands[1 : 1 + count]]
    if "ftz" in i.parts:
        values = [b.assign(f"flush({v})") for v in values]
    return kind.numpy, values


def _finish(b: BlockBuilder, i: Instruction, expression: str, dtype: str) -> None:
    if "ftz" in i.parts:
        expression = f"flush({expression})"
    if "sat" in i.parts:
        expression = f"saturate_unit({expression})"
    b.write(i.operands[0], expression, dtype)


def _rounding(i: Instruction) -> str | None:
    return next((r for r in _ROUNDINGS if r in i.parts), None)


def _directed(name: str, x: str, y: str, rounding: str) -> str:
    """add, sub or mul of two float32 expressions."""
    x, y = f"{x}.astype(float64)", f"{y}.astype(float64)"
    if name == "mul":
        return f"directed({x} * {y}, {rounding!r})"
    return f"sum_f32({x}, {'-' if name == 'sub' else ''}{y}, {rounding!r})"


@emits("add", "sub", "mul", types="f32 f64", modifiers="rn rz rm rp ftz sat")
def arithmetic(b: BlockBuilder, i: Instruction) -> None:
    dtype, (x, y) = _operands(b, i, 2)
    rounding = _rounding(i)
    if rounding is None:
        expression = f"{x} {_SIGNS[i.parts[0]]} {y}"
    elif dtype == "float32":
        expression = _directed(i.parts[0], x, y, rounding)
    else:
        raise UnknownInstruction(i.opcode)
    _finish(b, i, expression, dtype)


@emits("fma", "mad", types="f32 f64", modifiers="rn rz rm rp ftz sat")
def fused_multiply_add(b: BlockBuilder, i: Instruction) -> None:
    dtype, (x, y, z) = _operands(b, i, 3)
    rounding = _rounding(i)
    if dtype == "float64":
        if rounding:
            raise UnknownInstruction(i.opcode)
        expression = f"{x} * {y} + {z}"
    else:
        expression = f"fma_f32({x}, {y}, {z}, {rounding or 'rn'!r})"
    _finish(b, i, expression, dtype)


@emits("min", "max", types="f32 f64", modifiers="ftz NaN xorsign abs")
def min_max(b: BlockBuilder, i: Instruction) -> None:
    """Of two or three operands; a NaN operand is ignored unless .NaN asks to keep it."""
    dtype, values = _operands(b, i, len(i.operands) - 1)
    name = f"{i.parts[0]}imum" if "NaN" in i.parts else f"f{i.parts[0]}"
    if "xorsign" in i.parts:
        x, y = values
        expression = (
            f"copysign({name}(abs({x}), abs({y})), where(signbit({x}) != signbit({y}), -1.0, 1.0)).astype({dtype})"
        )
    else:
        if "abs" in i.parts:
            values = [f"abs({v})" for v in values]
        expression = values[0]
        for value in values[1:]:
            expression = f"{name}({expression}, {value})"
    _finish(b, i, expression, dtype)


@emits("abs", "neg", types="f32 f64", modifiers="ftz")
def sign(b: BlockBuilder, i: Instruction) -> None:
    dtype, (x,) = _operands(b, i, 1)
    _finish(b, i, f"abs({x})" if i.parts[0] == "abs" else f"-{x}", dtype)


@emits("copysign", types="f32 f64", modifiers="")
def copy_sign(b: BlockBuilder, i: Instruction) -> None:
    dtype, (x, y) = _operands(b, i, 2)
    b.write(i.operands[0], f"copysign({y}, {x})", dtype)


@emits("div", types="f32 f64", modifiers="approx full rn rz rm rp ftz")
def divide(b: BlockBuilder, i: Instruction) -> None:
    dtype, (x, y) = _operands(b, i, 2)
    if _rounding(i):
        expression = f"directed({x}.astype(float64) / {y}.astype(float64), {_rounding(i)!r})"
    else:
        expression = f"{x} / {y}"
    _finish(b, i, expression, dtype)


_FUNCTIONS = {
    "rcp": "reciprocal",
    "sqrt": "sqrt",
    "rsqrt": "reciprocal_sqrt",
    "ex2": "two_to_the",
    "lg2": "log2",
    "sin": "sine",
    "cos": "cosine",
    "tanh": "tangent_hyperbolic",
}


@emits(*_FUNCTIONS, types="f32 f64", modifiers="approx rn rz rm rp ftz")
def unary(b: BlockBuilder, i: Instruction) -> None:
    dtype, (x,) = _operands(b, i, 1)
    name = _FUNCTIONS[i.parts[0]]
    if _rounding(i):
        expression = f"directed({name}({x}.astype(float64)), {_rounding(i)!r})"
    else:
        expression = f"{name}({x})"
    _finish(b, i, expression, dtype)


@emits("add", "sub", "fma", types="f32.f16 f32.bf16", modifiers="rn rz rm rp sat")
def mixed(b: BlockBuilder, i: Instruction) -> None:
    """sm_100's mixed precision: every operand but the last is f16 or bf16 and widened, the last and the result f32."""
    half = "bf16" if "bf16" in i.parts else "f16"
    narrow = [
        f"widen_bf16({b.read(o, 'uint16')})" if half == "bf16" else f"{b.read(o, 'float16')}.astype(float32)"
        for o in i.operands[1:-1]
    ]
    values = [*map(b.assign, narrow), b.read(i.operands[-1], "float32")]
    rounding = _rounding(i)
    if i.parts[0] == "fma":
        expression = f"fma_f32({', '.join(values)}, {rounding or 'rn'!r})"
    elif rounding:
        expression = _directed(i.parts[0], values[0], values[1], rounding)
    else:
        expression = f" {_SIGNS[i.parts[0]]} ".join(values)
    _finish(b, i, expression, "float32")


@emits("testp", types="f32 f64", modifiers="finite infinite number notanumber normal subnormal")
def test_property(b: BlockBuilder, i: Instruction) -> None:
    _, (x,) = _operands(b, i, 1)
    b.write(i.operands[0], f"has_property({x}, {i.parts[1]!r})", "bool")


@emits("add", "sub", "mul", "fma", types="f32x2", modifiers="rn rz rm rp ftz")
def packed(b: BlockBuilder, i: Instruction) -> None:
    """Two f32 in a 64-bit register, each as its scalar instruction would do it."""
    values = [f"lanes_f32(G, {b.read(o, 'uint64')})" for o in i.operands[1:]]
    rounding = _rounding(i) or "rn"
    b.write(
        i.operands[0], f"packed_f32({i.parts[0]!r}, {rounding!r}, {'ftz' in i.parts}, {', '.join(values)})", "uint64"
    )


# ---- helpers


@helper
def flush(x: Any) -> Any:
    """Subnormals to zero of the same sign."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, x * x.dtype.type(0), x)


@helper
def two_to_the(x: Any) -> Any:
    """2^x, through float64: correctly rounded float32 results, as exact simulations of a kernel compute them."""
    return np.exp2(x.astype(np.float64)).astype(x.dtype)


@helper
def saturate_unit(x: Any) -> Any:
    """Clamps to [0, 1]; NaN becomes 0."""
    return np.fmin(np.fmax(x, x.dtype.type(0)), x.dtype.type(1))


@helper
def directed(x: Any, rounding: str) -> Any:
    return round_f32(x, rounding)


_DROPPED_BITS = np.uint64(0x1FFF_FFFF)  # of float64, by float32
_HALFWAY = np.uint64(0x1000_0000)
_NONE = np.uint64(0)


@helper
def sum_f32(x: Any, y: Any, rounding: str) -> Any:
    """x + y of float64, rounded once to float32 (in the normal range).

    The sum may be rounded in float64 first. That changes the final result only if it lands where the final rounding
    changes its mind, on a midpoint of two float32 ("rn") or on a float32 (the directed modes), so only such sums are
    corrected by the sign of what the rounding dropped.
    """
    total = x + y
    critical = (total.view(np.uint64) & _DROPPED_BITS) == (_HALFWAY if rounding == "rn" else _NONE)
    if critical.any():
        back = total - x
        dropped = (x - (total - back)) + (y - back)
        nudged = np.nextafter(total, np.where(dropped > 0, np.inf, -np.inf))
        total = np.where(critical & (dropped != 0) & np.isfinite(total), nudged, total)
    return total.astype(np.float32) if rounding == "rn" else round_f32(total, rounding)


@helper
def fma_f32(x: Any, y: Any, z: Any, rounding: str) -> Any:
    """x * y + z: the product is exact in float64."""
    return sum_f32(x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64), rounding)


@helper
def reciprocal(x: Any) -> Any:
    return x.dtype.type(1) / x


@helper
def reciprocal_sqrt(x: Any) -> Any:
    return (1.0 / np.sqrt(x.astype(np.float64))).astype(x.dtype)


@helper
def sine(x: Any) -> Any:
    return np.sin(x)


@helper
def cosine(x: Any) -> Any:
    return np.cos(x)


@helper
def tangent_hyperbolic(x: Any) -> Any:
    return np.tanh(x)


@helper
def has_property(x: Any, name: str) -> Any:
    magnitude, tiny = np.abs(x), np.finfo(x.dtype).tiny
    return {
        "finite": lambda: np.isfinite(x),
        "infinite": lambda: np.isinf(x),
        "number": lambda: ~np.isnan(x),
        "notanumber": lambda: np.isnan(x),
        "normal": lambda: np.isfinite(x) & (magnitude >= tiny),
        "subnormal": lambda: (magnitude < tiny) & (magnitude > 0),
    }[name]()


@helper
def lanes_f32(group: Group, x: Any) -> Any:
    return group.spread(x).view(np.float32)


@helper
def packed_f32(name: str, rounding: str, ftz: bool, *values: Any) -> Any:
    if ftz:
        values = tuple(flush(v) for v in values)
    if name == "fma":
        x, y, z = values
        result = fma_f32(x, y, z, rounding)
    else:
        x, y = (v.astype(np.float64) for v in values)
        result = round_f32(x * y, rounding) if name == "mul" else sum_f32(x, -y if name == "sub" else y, rounding)
    return (flush(result) if ftz else result).view(np.uint64)
