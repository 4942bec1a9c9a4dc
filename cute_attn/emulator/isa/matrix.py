"""mma.sync: m16n8k8/k16/k32 of f16, bf16, tf32, s8, u8, e4m3 and e5m2 with f16, f32 or s32 accumulators.

Fragments (PTX ISA, "Matrix Fragments for mma"; g = lane / 4, t = lane % 4): a 32-bit register of A holds consecutive
elements of row g (even registers) or g + 8 (odd ones), starting at k = t times the elements per register; each further
pair of registers moves on by four registers' worth of k. B is the same for column g. C and D hold columns 2t and 2t + 1
of row g in registers 0 and 1, of row g + 8 in registers 2 and 3.

The sum over k may be taken in any order as long as A and B agree, and the rows of B may be permuted if D's columns are
read back accordingly. Both freedoms are used here so that all data moves as the 16 bytes of four neighbouring lanes.

Numerics: products are exact and summed in float32 by the BLAS, then added to C in float32. Hardware aligns the products
of a group to the largest and truncates (details differ by architecture), so results agree to about the last bits of
float32 and not bit by bit. A chain of mma that only accumulate is one sum (see `matrix_fusion`). Integer results are
exact: sums of products stay below 2^24, and C is added in 32 bits with wraparound, or clamped by .satfinite.
With f16 accumulators every mma rounds its result to f16.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..codegen import BlockBuilder
from ..errors import UnknownInstruction
from ..formats import NARROW_VALUES
from ..memory import Array
from ..module import Instruction
from ..registry import emits, helper
from ..wave import Group
from .ldmatrix import MatrixRows

_ELEMENT_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8, "e4m3": 8, "e5m2": 8}
_LARGEST = {"s8": 128, "u8": 255}


@dataclass(frozen=True)
class MmaKind:
    """Element types of A, B, the accumulator ("f32", "f16", "s32"), k, and .satfinite."""

    a: str
    b: str
    accumulator: str
    k: int
    saturate: bool

    @property
    def registers(self) -> int:
        """Registers of B; A has twice as many."""
        return self.k * _ELEMENT_BITS[self.a] // 128

    @property
    def carrier(self) -> str:
        """The dtype in which accumulator registers are read and written."""
        return {"f32": "float32", "s32": "int32", "f16": "uint32"}[self.accumulator]

    @property
    def longest_chain(self) -> int:
        """How many mma may be summed before the accumulator is added, without changing what the result means."""
        if self.accumulator == "f16" or self.saturate:
            return 1
        if self.accumulator == "s32":
            return (2**24 - 1) // (self.k * _LARGEST[self.a] * _LARGEST[self.b])
        return 1 << 20


@dataclass(frozen=True)
class MmaNode:
    """One mma of a basic block by the names of its values; `index` is the instruction's."""

    kind: MmaKind
    a: tuple[str, ...]
    b: tuple[str, ...]
    c: tuple[str, ...]
    d: tuple[str, ...]
    index: int


def _kind(i: Instruction) -> MmaKind:
    pattern = (
        r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col(?:\.kind::f8f6f4)?(\.satfinite)?"
        r"\.(f32|f16|s32)\.(\w+)\.(\w+)\.(f32|f16|s32)"
    )
    match = re.fullmatch(pattern, i.opcode)
    if match is None or match[4] not in _ELEMENT_BITS or match[5] not in _ELEMENT_BITS or match[3] != match[6]:
        raise UnknownInstruction(i.opcode)
    kind = MmaKind(match[4], match[5], match[3], int(match[1]), match[2] is not None)
    if _ELEMENT_BITS[kind.a] != _ELEMENT_BITS[kind.b] or kind.registers not in (1, 2):
        raise UnknownInstruction(i.opcode)
    return kind


@emits("mma.sync.aligned")
def mma(b: BlockBuilder, i: Instruction) -> None:
    kind = _kind(i)
    dests, a, bb, c = (b.vector(o) for o in i.operands[:4])
    if len(a) != 2 * kind.registers or len(bb) != kind.registers or i.guard is not None:
        raise UnknownInstruction(i.opcode)

    def names(operands: list[str], dtype: str) -> tuple[str, ...]:
        return tuple(b.read(o, dtype) for o in operands)

    node = MmaNode(
        kind,
        names(a, "uint32"),
        names(bb, "uint32"),
        names(c, kind.carrier),
        tuple(b.new_name() for _ in dests),
        i.index,
    )
    b.operation("", node.d, reads=(*node.a, *node.b, *node.c), pure=False, payload=node)
    for dest, name in zip(dests, node.d, strict=True):
        b.bind(dest, name, kind.carrier)


# ---- execution


def _decode(raw: Array, element: str) -> Array:
    """complex128 [..., m] of packed elements -> float32 [..., elements]; A and B come out in the same order of k."""
    shape = (*raw.shape[:-1], -1)
    if element in ("bf16", "tf32"):
        words = raw.view(np.uint32)
        if element == "tf32":
            return (words & np.uint32(0xFFFFE000)).view(np.float32)
        half = words.shape[-1]
        values = np.empty((*words.shape[:-1], 2 * half), np.uint32)
        np.left_shift(words, np.uint32(16), out=values[..., :half])
        np.bitwise_and(words, np.uint32(0xFFFF0000), out=values[..., half:])
        return values.view(np.float32)
    if element == "f16":
        return _decode_f16(raw.view(np.uint32))
    if element in ("s8", "u8"):
        return raw.view(np.int8 if element == "s8" else np.uint8).astype(np.float32)
    return NARROW_VALUES[element].take(raw.view(np.uint8)).reshape(shape)


_F16_SCALE = np.float32(2.0**112)


def _decode_f16(words: Array) -> Array:
    """f16 pairs -> float32: exponent and mantissa moved into place, the exponent's bias put right by a product.

    Three times as fast as numpy's conversion; infinity and NaN, which come out as 2^16 and above, are redone.
    """
    half = words.shape[-1]
    bits = np.empty((*words.shape[:-1], 2 * half), np.uint32)
    low, high = bits[..., :half], bits[..., half:]
    np.left_shift(words, np.uint32(16), out=low)
    np.bitwise_and(words, np.uint32(0xFFFF0000), out=high)
    signs = bits & np.uint32(0x80000000)
    np.bitwise_and(bits, np.uint32(0x7FFFFFFF), out=bits)
    np.right_shift(bits, np.uint32(3), out=bits)
    special = bits >= np.uint32(0x0F800000)
    values = bits.view(np.float32)
    np.multiply(values, _F16_SCALE, out=values)
    if special.any():
        bits[special] = (bits[special] & np.uint32(0x007FFFFF)) | np.uint32(0x7F800000)
    np.bitwise_or(bits, signs, out=bits)
    return values


Fragments = tuple[tuple[tuple[Any, ...], ...], ...]
"""Registers (or `MatrixRows`) by tile, then by mma along k, then by register of the fragment."""


def _quads(group: Group, register: Any, owners: int) -> Array:
    """[owners, 8 rows] with the four lanes of a row as one 16-byte element."""
    if isinstance(register, MatrixRows):
        return register.rows if len(register.rows) == owners else register.by_warp(owners)
    return np.ascontiguousarray(group.spread(register)).view(np.complex128).reshape(owners, 8)


def _rows_of_a(group: Group, tiles: Fragments, kind: MmaKind, warps: int) -> Array:
    """float32 [warps, 16 * tiles, k]: row order tile, half (g or g + 8), g."""
    raw = np.empty((warps, len(tiles), 2, 8, len(tiles[0]), kind.registers), np.complex128)
    for r, tile in enumerate(tiles):
        for s, fragment in enumerate(tile):
            for n, register in enumerate(fragment):
                raw[:, r, n % 2, :, s, n // 2] = _quads(group, register, warps)
    return _decode(raw.reshape(warps, 16 * len(tiles), -1), kind.a)


def _columns_of_b(group: Group, tiles: Fragments, kind: MmaKind, owners: int) -> Array:
    """float32 [owners, 8 * tiles, k]: column order tile, parity, t, so that the columns of a parity are neighbours."""
    raw = np.empty((owners, len(tiles), 2, 4, len(tiles[0]), kind.registers), np.complex128)
    for c, tile in enumerate(tiles):
        for s, fragment in enumerate(tile):
            for n, register in enumerate(fragment):
                quads = _quads(group, register, owners).reshape(owners, 4, 2)
                raw[:, c, 0, :, s, n] = quads[:, :, 0]
                raw[:, c, 1, :, s, n] = quads[:, :, 1]
    return _decode(raw.reshape(owners, 8 * len(tiles), -1), kind.b)


def _owners_of_b(tiles: Fragments, warps: int) -> int:
    """The number of CTAs if every fragment is the same in all warps of a CTA, else the number of warps."""
    first = tiles[0][0][0]
    if not isinstance(first, MatrixRows) or not first.per_cta:
        return warps
    every = (register for tile in tiles for fragment in tile for register in fragment)
    uniform = all(isinstance(register, MatrixRows) and register.per_cta for register in every)
    return len(first.rows) if uniform else warps


def _product(left: Array, right: Array) -> Array:
    """[warps, rows, columns]; one product per warp, also where the warps of a CTA share the right side."""
    warps, owners = len(left), len(right)
    if warps == owners:
        return left @ right.swapaxes(1, 2)
    grouped = left.reshape(owners, warps // owners, *left.shape[1:])
    return (grouped @ right.swapaxes(1, 2)[:, None]).reshape(warps, left.shape[1], right.shape[1])


def _cached(group: Group, key: tuple[int, str], tiles: Fragments, make: Any) -> Array:
    """The unpacked fragments of this call site, made anew only if a register holds another array than last time.

    The number of lanes counts too: a register that is the same in all lanes is one scalar for every group.
    """
    cache = group.wave.state.setdefault("fragments", {})
    registers = [register for tile in tiles for fragment in tile for register in fragment]
    size, known, unpacked = cache.get(key, (0, (), None))
    if size == group.size and all(map(operator.is_, known, registers)):
        return unpacked
    unpacked = make()
    cache[key] = (group.size, registers, unpacked)
    return unpacked


@helper
def mma_tiles(
    group: Group,
    kind: MmaKind,
    a: Fragments,
    b: Fragments,
    c: tuple[tuple[Any, ...], ...],
    keep: tuple[bool, bool],
    index: int,
) -> tuple[Any, ...]:
    """All products of row tiles `a` with column tiles `b`, plus `c`; D's registers tile by tile, rows outermost.

    keep: whether A's (B's) fragments come from outside the block and are worth remembering.
    """
    warps = group.require_whole_warps(index)

    def rows() -> Array:
        return _rows_of_a(group, a, kind, warps)

    def columns() -> Array:
        return _columns_of_b(group, b, kind, _owners_of_b(b, warps))

    left = _cached(group, (index, "a"), a, rows) if keep[0] else rows()
    right = _cached(group, (index, "b"), b, columns) if keep[1] else columns()
    product = _product(left, right)
    # [warps, tile, half, g, tile, parity] with the four t as one element
    quads = product.view(np.complex128).reshape(warps, len(a), 2, 8, len(b), 2)
    results: list[Any] = []
    for r in range(len(a)):
        for n in range(len(b)):
            parts = [
                np.ascontiguousarray(quads[:, r, half, :, n, parity]).view(np.float32).reshape(-1)
                for half in (0, 1)
                for parity in (0, 1)
            ]
            results += _accumulate(group, kind, parts, c[r * len(b) + n])
    return tuple(results)


def _accumulate(group: Group, kind: MmaKind, parts: list[Array], c: tuple[Any, ...]) -> list[Any]:
    """D's registers from the four products of a tile and C's registers."""
    if kind.accumulator == "f32":
        return [p + v for p, v in zip(parts, c, strict=True)]
    if kind.accumulator == "s32":
        if kind.saturate:
            wide = [p.astype(np.int64) + v for p, v in zip(parts, c, strict=True)]
            return [np.clip(w, -(2**31), 2**31 - 1).astype(np.int32) for w in wide]
        return [p.astype(np.int32) + v for p, v in zip(parts, c, strict=True)]
    results = []
    for half in (0, 1):
        pair = group.spread(c[half]).view(np.float16).reshape(-1, 2).astype(np.float32)
        total = np.stack(parts[2 * half : 2 * half + 2], axis=1) + pair
        results.append(np.ascontiguousarray(total.astype(np.float16)).view(np.uint32).reshape(-1))
    return results
