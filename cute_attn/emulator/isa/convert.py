"""cvt among integers of all widths, f16, bf16, f32, f64, tf32 and pairs of floats of 16, 8, 6 and 4 bits; cvt.pack.

Every conversion rounds once, to nearest even unless told otherwise; float to integer saturates and turns NaN into 0.
NaN as a 6- or 4-bit float is the largest number. To ue8m0, a power of two without sign, the sign is ignored and zero
becomes 2^-127, as in the host functions of CUDA's cuda_fp8.h. cvt.rs (stochastic rounding) is not implemented.
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
    f32_to_narrow,
    f32_to_tf32,
    float_to_int,
    narrow_to_f32,
    pack_bf16x2,
    round_f32,
)
from ..module import Instruction
from ..registry import emits, helper
from ..types import PtxType, ptx_type

_PACKED = {
    "f16x2": "f16",
    "bf16x2": "bf16",
    "e4m3x2": "e4m3",
    "e5m2x2": "e5m2",
    "e3m2x2": "e3m2",
    "e2m3x2": "e2m3",
    "e2m1x2": "e2m1",
    "ue8m0x2": "ue8m0",
}
_WIDE = ("f16x2", "bf16x2")
_PACKED_INTEGERS = {f"{kind}{bits}": (kind, bits) for kind in "us" for bits in (2, 4, 8, 16)}
_INTEGER_ROUNDINGS = ("rni", "rzi", "rmi", "rpi")
_FLOATS = ("f16", "bf16", "f32", "f64")


def _kinds(i: Instruction) -> tuple[PtxType, PtxType]:
    kinds = [k for p in i.parts[1:] if (k := ptx_type(p)) is not None]
    if len(kinds) != 2 or "rs" in i.parts:
        raise UnknownInstruction(i.opcode)
    return kinds[0], kinds[1]


def _refuse_roundings(i: Instruction, dest: PtxType, source: PtxType) -> None:
    """Forms that PTX does not have, or that no encoder here has: directed rounding to f16 and bf16."""
    rounding = _rounding(i)
    if dest.name in _PACKED and dest.name not in _WIDE:
        allowed = ("rz", "rp") if dest.name == "ue8m0x2" else ("rn",)
        sources = ("f32", "bf16x2") if dest.name == "ue8m0x2" else ("f32", *_WIDE)
        saturates = "satfinite" in i.parts or dest.name == "ue8m0x2"
        if rounding not in allowed or source.name not in sources or not saturates:
            raise UnknownInstruction(i.opcode)
    elif dest.name in ("f16x2", "bf16x2", "f16", "bf16", "tf32") and rounding in ("rm", "rp"):
        raise UnknownInstruction(i.opcode)
    if dest.name == "tf32" and "satfinite" in i.parts:
        raise UnknownInstruction(i.opcode)
    if source.name == "ue8m0x2" and dest.name != "bf16x2":
        raise UnknownInstruction(i.opcode)


@emits("cvt", modifiers="rn rz rm rp rna rni rzi rmi rpi ftz sat satfinite relu")
def cvt(b: BlockBuilder, i: Instruction) -> None:
    dest, source = _kinds(i)
    _refuse_roundings(i, dest, source)
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
    """cvt.rn.f16x2.f32 d, a, b: a becomes the high part, b the low one; packed sources keep their order."""
    element = _PACKED[dest.name]
    relu, finite, rounding = "relu" in i.parts, "satfinite" in i.parts, _rounding(i)
    if source.name == "f32":
        high, low = (_float_source(b, i, o, source) for o in i.operands[1:3])
        if element == "bf16" and rounding == "rn" and not relu and not finite:
            b.write(i.operands[0], f"two_bf16({high}, {low})", "uint32")
            return
        expression = f"pack_floats({element!r}, {rounding!r}, {relu}, {finite}, {high}, {low})"
    elif source.name in _PACKED:
        register = b.read(i.operands[1], source.carrier)
        source_element = _PACKED[source.name]
        expression = f"repack({source_element!r}, {element!r}, {rounding!r}, {relu}, {finite}, {register})"
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
    if element in ("f16", "bf16"):
        return to_half(x, element, rounding, finite)
    return f32_to_narrow(x, element, rounding, finite=finite)


def _decode(codes: Any, element: str) -> Any:
    if element == "f16":
        return codes.view(np.float16).astype(np.float32)
    return bf16_to_f32(codes) if element == "bf16" else narrow_to_f32(codes, element)


def _join(high: Any, low: Any, element: str) -> Any:
    """Two codes as one register: 4-bit ones in a byte, the others in a register of twice their bytes."""
    if element == "e2m1":
        return low | high << np.uint8(4)
    wide = np.dtype(f"uint{16 * low.dtype.itemsize}").type
    return low.astype(wide) | high.astype(wide) << wide(8 * low.dtype.itemsize)


def _split(register: Any, element: str) -> tuple[Any, Any]:
    """(high, low) codes of a register."""
    if element == "e2m1":
        return register >> np.uint8(4), register & np.uint8(15)
    bits = 4 * register.dtype.itemsize
    narrow = np.dtype(f"uint{bits}").type
    return (register >> register.dtype.type(bits)).astype(narrow), register.astype(narrow)


@helper
def pack_floats(element: str, rounding: str, relu: bool, finite: bool, high: Any, low: Any) -> Any:
    codes = [_encode(v, element, rounding, relu, finite) for v in (high, low)]
    return _join(codes[0], codes[1], element)


@helper
def repack(source: str, dest: str, rounding: str, relu: bool, finite: bool, register: Any) -> Any:
    high, low = (_decode(codes, source) for codes in _split(register, source))
    return pack_floats(dest, rounding, relu, finite, high, low)


# ---- cvt.pack


@emits("cvt.pack.sat")
def cvt_pack(b: BlockBuilder, i: Instruction) -> None:
    """d = the saturated a and b side by side, a on top; for narrow results c is shifted in above them."""
    parts = i.parts[3:]
    if len(parts) not in (2, 3) or parts[0] not in _PACKED_INTEGERS or parts[1] != "s32":
        raise UnknownInstruction(i.opcode)
    kind, bits = _PACKED_INTEGERS[parts[0]]
    if parts[2:] != (() if bits == 16 else ("b32",)):
        raise UnknownInstruction(i.opcode)
    high, low = (b.read(o, "int32") for o in i.operands[1:3])
    above = b.read(i.operands[3], "uint32") if bits < 16 else "None"
    b.write(i.operands[0], f"pack_integers({kind!r}, {bits}, {high}, {low}, {above})", "uint32")


@helper
def pack_integers(kind: str, bits: int, high: Any, low: Any, above: Any) -> Any:
    smallest = -(1 << bits - 1) if kind == "s" else 0
    largest = smallest + (1 << bits) - 1

    def code(x: Any) -> Any:
        return np.clip(x, smallest, largest).astype(np.uint32) & np.uint32((1 << bits) - 1)

    packed = code(low) | code(high) << np.uint32(bits)
    return packed if above is None else packed | above << np.uint32(2 * bits)
