"""cvt among integers of all widths, f16, bf16, f32, f64, tf32, and packed f16x2, bf16x2, e4m3x2, e5m2x2.

Every conversion rounds once, to nearest even unless told otherwise; float to integer saturates and turns NaN into 0.
cvt.rs (stochastic rounding) and the 4- and 6-bit formats are other families' business.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..codegen import BlockBuilder
from ..errors import UnknownInstruction
from ..formats import (
    bf16_to_f32,
    f32_to_bf16,
    f32_to_f16,
    f32_to_fp8,
    f32_to_tf32,
    float_to_int,
    fp8_to_f32,
    pack_bf16x2,
    round_f32,
)
from ..module import Instruction
from ..registry import emits, helper
from ..types import PtxType, ptx_type
from ..wave import Group

_PACKED = {"f16x2": "f16", "bf16x2": "bf16", "e4m3x2": "e4m3", "e5m2x2": "e5m2"}
_INTEGER_ROUNDINGS = ("rni", "rzi", "rmi", "rpi")
_FLOATS = ("f16", "bf16", "f32", "f64")


def _kinds(i: Instruction) -> tuple[PtxType, PtxType]:
    kinds = [k for p in i.parts[1:] if (k := ptx_type(p)) is not None]
    if len(kinds) != 2 or "rs" in i.parts:
        raise UnknownInstruction(i.opcode)
    return kinds[0], kinds[1]


def _refuse_roundings(i: Instruction, dest: PtxType) -> None:
    """Forms that no encoder here has: directed rounding to a narrow float, and a tf32 that saturates."""
    narrow = dest.name in _PACKED or dest.name in ("f16", "bf16", "tf32")
    if narrow and ("rm" in i.parts or "rp" in i.parts):
        raise UnknownInstruction(i.opcode)
    if dest.name == "tf32" and "satfinite" in i.parts:
        raise UnknownInstruction(i.opcode)


@emits("cvt", modifiers="rn rz rm rp rna rni rzi rmi rpi ftz sat satfinite relu")
def cvt(b: BlockBuilder, i: Instruction) -> None:
    dest, source = _kinds(i)
    _refuse_roundings(i, dest)
    if dest.name in _PACKED:
        _to_packed(b, i, dest, source)
    elif dest.name == "tf32":
        x = b.read(i.operands[1], "float32")
        rounding = next((r for r in ("rna", "rn", "rz") if r in i.parts), "rna")
        b.write(i.operands[0], f"to_tf32({x}, {rounding!r}, {'relu' in i.parts})", "uint32")
    elif dest.kind in "us" and source.kind in "us":
        _integer_to_integer(b, i, dest, source)
    elif dest.kind in "us":
        mode = next((m for m in _INTEGER_ROUNDINGS if m in i.parts), "rni")
        x = _float_source(b, i, i.operands[1], source)
        b.write(i.operands[0], f"to_integer({x}, {dest.numpy}, {mode!r})", dest.numpy)
    elif dest.name in _FLOATS and source.kind in "us":
        _integer_to_float(b, i, dest, source)
    elif dest.name in _FLOATS and source.name in _FLOATS:
        _float_to_float(b, i, dest, source)
    else:
        raise UnknownInstruction(i.opcode)


def _float_source(b: BlockBuilder, i: Instruction, operand: str, kind: PtxType) -> str:
    """A floating operand as float32 or float64 expression, exact."""
    if kind.name == "bf16":
        return f"widen_bf16({b.read(operand, 'uint16')})"
    if kind.name == "f16":
        return f"{b.read(operand, 'float16')}.astype(float32)"
    value = b.read(operand, kind.numpy)
    return f"flush({value})" if "ftz" in i.parts and kind.name == "f32" else value


def _rounding(i: Instruction) -> str:
    return next((r for r in ("rn", "rz", "rm", "rp") if r in i.parts), "rn")


def _integer_to_integer(b: BlockBuilder, i: Instruction, dest: PtxType, source: PtxType) -> None:
    x = b.read(i.operands[1], source.numpy)
    if "sat" in i.parts:
        b.write(i.operands[0], f"saturate_integer({x}, {dest.numpy})", dest.numpy)
    elif dest.numpy == source.numpy:
        b.write(i.operands[0], x, dest.numpy)
    else:
        b.write(i.operands[0], f"{x}.astype({dest.numpy})", dest.numpy)


def _integer_to_float(b: BlockBuilder, i: Instruction, dest: PtxType, source: PtxType) -> None:
    x = b.read(i.operands[1], source.numpy)
    rounding = _rounding(i)
    if dest.name in ("f32", "f64") and rounding == "rn":
        b.write(i.operands[0], f"{x}.astype({dest.numpy})", dest.numpy)
    else:
        b.write(i.operands[0], f"from_integer({x}, {dest.name!r}, {rounding!r})", dest.carrier)


def _float_to_float(b: BlockBuilder, i: Instruction, dest: PtxType, source: PtxType) -> None:
    x = _float_source(b, i, i.operands[1], source)
    integral = next((m for m in _INTEGER_ROUNDINGS if m in i.parts), None)
    if integral is not None:
        x = f"{({'rni': 'rint', 'rzi': 'trunc', 'rmi': 'floor', 'rpi': 'ceil'})[integral]}({x})"
    if "relu" in i.parts:
        x = f"maximum({x}, {b.constant(0, 'float64' if source.name == 'f64' else 'float32')})"
    if "sat" in i.parts:
        x = f"saturate_unit({x})"
    if dest.name in ("f16", "bf16"):
        b.write(i.operands[0], f"to_half({x}, {dest.name!r}, {_rounding(i)!r}, {'satfinite' in i.parts})", "uint16")
    elif source.name == "f64" and dest.name == "f32":
        narrow = f"to_f32({x}, {_rounding(i)!r})"
        b.write(i.operands[0], f"flush({narrow})" if "ftz" in i.parts else narrow, "float32")
    elif dest.name == "f64":
        b.write(i.operands[0], f"{x}.astype(float64)", "float64")
    else:
        b.write(i.operands[0], x, "float32")


def _to_packed(b: BlockBuilder, i: Instruction, dest: PtxType, source: PtxType) -> None:
    """cvt.rn.f16x2.f32 d, a, b: a becomes the high half, b the low one; packed sources keep their order."""
    element = _PACKED[dest.name]
    relu, finite, rounding = "relu" in i.parts, "satfinite" in i.parts, _rounding(i)
    if source.name == "f32":
        high, low = (_float_source(b, i, o, source) for o in i.operands[1:3])
        if element == "bf16" and rounding == "rn" and not relu and not finite:
            b.write(i.operands[0], f"two_bf16({high}, {low})", "uint32")
            return
        expression = f"pack_floats(G, {element!r}, {rounding!r}, {relu}, {finite}, {high}, {low})"
    elif source.name in _PACKED:
        register = b.read(i.operands[1], source.carrier)
        expression = f"repack(G, {_PACKED[source.name]!r}, {element!r}, {relu}, {finite}, {register})"
    else:
        raise UnknownInstruction(i.opcode)
    b.write(i.operands[0], expression, dest.carrier)


# ---- helpers


@helper
def two_bf16(high: Any, low: Any) -> Any:
    return pack_bf16x2(high, low)


@helper
def to_tf32(x: Any, rounding: str, relu: bool) -> Any:
    return f32_to_tf32(np.maximum(x, np.float32(0)) if relu else x, rounding)


@helper
def to_integer(x: Any, dtype: Any, mode: str) -> Any:
    return float_to_int(x, dtype, mode)


@helper
def saturate_integer(x: Any, dtype: Any) -> Any:
    info = np.iinfo(dtype)
    have = np.iinfo(x.dtype)
    return np.clip(x, max(info.min, have.min), min(info.max, have.max)).astype(dtype)


@helper
def from_integer(x: Any, dest: str, rounding: str) -> Any:
    """Integer -> f16, bf16, or a directed rounding to f32; 64-bit integers go through float64."""
    wide = np.asarray(x).astype(np.float64)
    if dest == "f32":
        return round_f32(wide, rounding).view(np.uint32)
    if dest == "f64":
        return wide.view(np.uint64)
    return to_half(wide, dest, rounding, False)


@helper
def to_half(x: Any, dest: str, rounding: str, finite: bool) -> Any:
    """float32/float64 -> uint16 patterns of f16 or bf16. finite: overflow and infinity give the largest number."""
    if dest == "bf16":
        bits, largest = f32_to_bf16(x, rounding), np.uint16(0x7F7F)
        infinity = np.uint16(0x7F80)
    else:
        bits, largest = np.asarray(f32_to_f16(x, rounding)).view(np.uint16), np.uint16(0x7BFF)
        infinity = np.uint16(0x7C00)
    if finite:
        bits = np.where((bits & np.uint16(0x7FFF)) == infinity, (bits & np.uint16(0x8000)) | largest, bits)
    return bits


@helper
def to_f32(x: Any, rounding: str) -> Any:
    return round_f32(x, rounding)


def _encode(x: Any, element: str, rounding: str, relu: bool, finite: bool) -> Any:
    if relu:
        x = np.maximum(x, x.dtype.type(0))
    if element in ("e4m3", "e5m2"):
        return f32_to_fp8(x, element)
    return to_half(x, element, rounding, finite)


def _decode(bits: Any, element: str) -> Any:
    if element in ("e4m3", "e5m2"):
        return fp8_to_f32(bits, element)
    return bf16_to_f32(bits) if element == "bf16" else bits.view(np.float16).astype(np.float32)


@helper
def pack_floats(group: Group, element: str, rounding: str, relu: bool, finite: bool, high: Any, low: Any) -> Any:
    parts = [_encode(group.spread(v), element, rounding, relu, finite) for v in (low, high)]
    wide = np.dtype(f"uint{16 * parts[0].dtype.itemsize}")
    return parts[0].astype(wide) | parts[1].astype(wide) << wide.type(wide.itemsize * 4)


@helper
def repack(group: Group, source: str, dest: str, relu: bool, finite: bool, register: Any) -> Any:
    narrow = np.uint8 if source in ("e4m3", "e5m2") else np.uint16
    values = _decode(group.spread(register).view(narrow), source)
    encoded = np.ascontiguousarray(_encode(values, dest, "rn", relu, finite))
    return encoded.view(np.uint16 if dest in ("e4m3", "e5m2") else np.uint32)
