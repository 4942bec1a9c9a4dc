"""mma.sync m16n8: the instruction, and the products of tiles that `matrix_fusion` makes of many.

Fragments (PTX ISA, "Matrix Fragments for mma"; g = lane / 4, t = lane % 4): a 32-bit register of A holds consecutive
elements of row g (even registers) or g + 8 (odd ones), starting at k = t times the elements per register; each further
pair of registers moves on by four registers' worth of k. B is the same for column g. C and D hold columns 2t and 2t + 1
of row g in registers 0 and 1, of row g + 8 in registers 2 and 3.

The sum over k may be taken in any order as long as A and B agree, and the rows of B may be permuted if D's columns are
read back accordingly. Both freedoms are used here so that all data moves as the 16 bytes of four neighbouring lanes.

Numerics: products are exact and summed in float32 by the BLAS, then added to C in float32. Hardware aligns the products
of a group to the largest and truncates, so results agree to about the last bits of float32 and not bit by bit; with
`accumulation="hardware"` its sums are made as `tensor_core` describes. A chain of mma that only accumulate is one sum
(see `matrix_fusion`). Integer results are exact: sums of products stay below 2^24, and C is added in 32 bits with
wraparound, or clamped by .satfinite. With f16 accumulators every mma rounds its result to f16.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import tensor_core
from ..codegen import BlockBuilder
from ..errors import UnknownInstruction
from ..memory import Array
from ..module import Instruction
from ..registry import HELPERS, emits, helper
from ..wave import Group
from .block_scaled import scale_operands, scale_values, scaled, scales_of
from .ldmatrix import MatrixRows
from .matrix_elements import decode
from .matrix_kind import MmaKind, parse


@dataclass(frozen=True)
class MmaNode:
    """One mma of a basic block by the names of its values; `index` is the instruction's.

    a, b: the elements' registers; then, if the kind has scales, their register, byte-id and thread-id.
    """

    kind: MmaKind
    a: tuple[str, ...]
    b: tuple[str, ...]
    c: tuple[str, ...]
    d: tuple[str, ...]
    index: int


def kind_name(kind: MmaKind) -> str:
    """A name by which generated code reaches the kind."""
    name = f"MMA_{kind.a}_{kind.b}_{kind.accumulator}_{kind.k}_{kind.bits}_{kind.scale}_{kind.scales}_{kind.saturate}"
    HELPERS[name] = kind
    return name


@emits("mma.sync.aligned")
def mma(b: BlockBuilder, i: Instruction) -> None:
    kind = parse(i.opcode)
    dests, a, bb, c = (b.vector(o) for o in i.operands[:4])
    accumulators = 2 if kind.accumulator == "f16" else 4
    if (len(a), len(bb), len(c), len(dests)) != (2 * kind.registers, kind.registers, accumulators, accumulators):
        raise UnknownInstruction(i.opcode)
    a_names, b_names = (tuple(b.read(o, "uint32") for o in operands) for operands in (a, bb))
    c_names = tuple(b.read(o, kind.carrier) for o in c)
    if kind.scale is not None:
        of_a, of_b = scale_operands(b, i)
        a_names, b_names = a_names + of_a, b_names + of_b
    if b.guard is not None:
        name = b.new_name()
        fragments = ", ".join(f"({', '.join(names)},)" for names in (a_names, b_names, c_names))
        code = f"{name} = guarded_mma(G, {b.guard}, {kind_name(kind)}, {fragments}, {i.index})"
        b.operation(code, (name,), pure=False)
        for n, dest in enumerate(dests):
            b.write(dest, f"{name}[{n}]", kind.carrier)
        return
    node = MmaNode(kind, a_names, b_names, c_names, tuple(b.new_name() for _ in dests), i.index)
    reads = tuple(name for name in (*node.a, *node.b, *node.c) if name not in b.constants)
    b.operation("", node.d, reads=reads, pure=False, payload=node)
    for dest, name in zip(dests, node.d, strict=True):
        b.bind(dest, name, kind.carrier)


# ---- fragments


Fragments = tuple[tuple[tuple[Any, ...], ...], ...]
"""Registers (or `MatrixRows`) by tile, then by mma along k, then by register of the fragment, scale operands last."""


def _same_in_all_warps(group: Group, fragments: list[tuple[Any, ...]], registers: int) -> bool:
    """Whether each CTA's warps hold the same B, scales included, so that one of them can stand for all."""
    per_cta = group.warps_per_cta
    if per_cta == 1:
        return False
    for fragment in fragments:
        for n, register in enumerate(fragment):
            if isinstance(register, MatrixRows):
                if not register.per_cta:
                    return False
            elif register.ndim and n <= registers:
                table = register.reshape(-1, per_cta, 32)
                if not (table[:, 1:] == table[:, :1]).all():
                    return False
            elif register.ndim:
                return False  # a selector that is not a constant
    return True


def _quads(group: Group, register: Any, owners: int) -> Array:
    """[owners, 8 rows] with the four lanes of a row as one 16-byte element."""
    if isinstance(register, MatrixRows):
        return register.rows if len(register.rows) == owners else register.by_warp(owners)
    lanes = group.spread(register).reshape(owners, -1, 32)[:, 0]
    return np.ascontiguousarray(lanes).view(np.complex128)


def _rows_of_a(group: Group, tiles: Fragments, kind: MmaKind, warps: int) -> Array:
    """Packed [warps, 16 * tiles, mma * registers]: row order tile, half (g or g + 8), g."""
    raw = np.empty((warps, len(tiles), 2, 8, len(tiles[0]), kind.registers), np.complex128)
    for r, tile in enumerate(tiles):
        for s, fragment in enumerate(tile):
            for n, register in enumerate(fragment[: 2 * kind.registers]):
                raw[:, r, n % 2, :, s, n // 2] = _quads(group, register, warps)
    return raw.reshape(warps, 16 * len(tiles), -1)


def _columns_of_b(group: Group, tiles: Fragments, kind: MmaKind, owners: int) -> Array:
    """Packed [owners, 8 * tiles, mma * registers]: column order tile, parity, t, so that a parity's are neighbours."""
    raw = np.empty((owners, len(tiles), 2, 4, len(tiles[0]), kind.registers), np.complex128)
    for c, tile in enumerate(tiles):
        for s, fragment in enumerate(tile):
            for n, register in enumerate(fragment[: kind.registers]):
                quads = _quads(group, register, owners).reshape(owners, 4, 2)
                raw[:, c, 0, :, s, n] = quads[:, :, 0]
                raw[:, c, 1, :, s, n] = quads[:, :, 1]
    return raw.reshape(owners, 8 * len(tiles), -1)


def _scales(group: Group, tiles: Fragments, kind: MmaKind, side: str, owners: int, index: int) -> Array:
    """float32 [owners, rows of A or columns of B in the order above, mma * scales]."""
    registers, rows = (2 * kind.registers, 16) if side == "a" else (kind.registers, 8)
    codes = np.empty((owners, len(tiles), rows, len(tiles[0]), kind.scales), np.uint8)
    step = group.size // 32 // owners
    for n, tile in enumerate(tiles):
        for s, fragment in enumerate(tile):
            codes[:, n, :, s] = scales_of(group, kind, side, fragment[registers:], index)[::step]
    if side == "b":
        codes = codes.reshape(owners, len(tiles), 4, 2, -1).swapaxes(2, 3)
    return scale_values(np.ascontiguousarray(codes).reshape(owners, rows * len(tiles), -1), kind)


@dataclass(frozen=True)
class _Operand:
    """Values of A or B, [owners, rows, k]. scales: not yet applied, [owners, rows, scales], for the hardware's sums."""

    values: Array
    scales: Array | None = None


def _operand(group: Group, kind: MmaKind, tiles: Fragments, side: str, index: int) -> _Operand:
    hardware = group.wave.accumulation == "hardware"
    warps = group.size // 32
    if side == "a":
        owners, packed = warps, _rows_of_a(group, tiles, kind, warps)
    else:
        alike = _same_in_all_warps(group, [fragment for tile in tiles for fragment in tile], kind.registers)
        owners = warps // group.warps_per_cta if alike else warps
        packed = _columns_of_b(group, tiles, kind, owners)
    values = decode(packed, kind.a if side == "a" else kind.b, kind.bits, in_order=hardware)
    if kind.scale is None:
        return _Operand(values)
    scales = _scales(group, tiles, kind, side, owners, index)
    return _Operand(values, scales) if hardware else _Operand(scaled(values, scales))


def _cached(group: Group, key: tuple[int, str], tiles: Fragments, make: Any) -> _Operand:
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


# ---- products


def _product(left: Array, right: Array) -> Array:
    """float32 [warps, rows, columns], also where the warps of a CTA share the right side.

    Always one product per warp, of row-major operands: BLAS sums in another order for other numbers of rows, and a
    result must not depend on which warps happen to run together. (It is no slower than one product per CTA.)
    """
    warps, owners = len(left), len(right)
    columns = np.ascontiguousarray(right.swapaxes(1, 2))
    product = left.reshape(owners, warps // owners, *left.shape[1:]) @ columns[:, None]
    return product.reshape(warps, left.shape[1], right.shape[1]).astype(np.float32, copy=False)


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

    def operand(side: str, tiles: Fragments, kept: bool) -> _Operand:
        def make() -> _Operand:
            return _operand(group, kind, tiles, side, index)

        return _cached(group, (index, side), tiles, make) if kept else make()

    left, right = operand("a", a, keep[0]), operand("b", b, keep[1])
    hardware = group.wave.accumulation == "hardware" and kind.accumulator != "s32"
    if hardware:
        product = _hardware_sum(group, kind, left, right, _accumulators(group, kind, c, len(a), len(b)), len(a[0]))
    else:
        product = _product(left.values, right.values)
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
            if hardware:
                results += _pairs_of_f16(parts) if kind.accumulator == "f16" else parts
            else:
                results += _accumulate(group, kind, parts, c[r * len(b) + n])
    return tuple(results)


@helper
def guarded_mma(
    group: Group,
    guard: Any,
    kind: MmaKind,
    a: tuple[Any, ...],
    b: tuple[Any, ...],
    c: tuple[Any, ...],
    index: int,
) -> list[Array]:
    """D of one mma by the warps whose guard is true, which it must be in all lanes of a warp or in none."""
    chosen = group.spread(guard)
    results = [np.zeros(group.size, kind.carrier) for _ in c]
    if chosen.any():
        a, b, c = (tuple(v[chosen] if v.ndim else v for v in values) for values in (a, b, c))
        part = mma_tiles(group.part(chosen), kind, ((a,),), ((b,),), (c,), (False, False), index)
        for result, values in zip(results, part, strict=True):
            result[chosen] = values
    return results


def _f16_parts(group: Group, register: Any) -> Array:
    """The two halves of an accumulator register as float32 [2, lanes]."""
    return group.spread(register).view(np.float16).reshape(-1, 2).T.astype(np.float32)


def _pairs_of_f16(parts: list[Array]) -> list[Array]:
    """Registers from float32 sums in the order low, high, low, high."""
    halves = [p.astype(np.float16).view(np.uint16).astype(np.uint32) for p in parts]
    return [low | high << np.uint32(16) for low, high in (halves[:2], halves[2:])]


def _accumulate(group: Group, kind: MmaKind, parts: list[Array], c: tuple[Any, ...]) -> list[Any]:
    """D's registers from the four products of a tile and C's registers."""
    if kind.accumulator == "f32":
        return [p + v for p, v in zip(parts, c, strict=True)]
    if kind.accumulator == "f16":
        addends = [*_f16_parts(group, c[0]), *_f16_parts(group, c[1])]
        return _pairs_of_f16([p + v for p, v in zip(parts, addends, strict=True)])
    if kind.saturate:
        wide = [p.astype(np.int64) + v for p, v in zip(parts, c, strict=True)]
        return [np.clip(w, -(2**31), 2**31 - 1).astype(np.int32) for w in wide]
    return [p.astype(np.int32) + v for p, v in zip(parts, c, strict=True)]


# ---- the hardware's sums


def _accumulators(group: Group, kind: MmaKind, c: tuple[tuple[Any, ...], ...], rows: int, columns: int) -> Array:
    """float32 [warps, 16 * rows, 8 * columns] of C, rows and columns in the order of the operands."""
    warps = group.size // 32
    table = np.empty((warps, rows, 2, 8, columns, 2, 4), np.float32)
    for n, registers in enumerate(c):
        if kind.accumulator == "f16":
            parts = [part for register in registers for part in _f16_parts(group, register)]
        else:
            parts = [group.spread(register) for register in registers]
        for m, part in enumerate(parts):
            table[:, n // columns, m // 2, :, n % columns, m % 2] = part.reshape(warps, 8, 4)
    return table.reshape(warps, 16 * rows, 8 * columns)


def _hardware_sum(group: Group, kind: MmaKind, left: _Operand, right: _Operand, c: Array, steps: int) -> Array:
    """C and the products of `steps` mma, one after the other, as the tensor cores of the kernel's target sum."""
    model = tensor_core.model_for(
        group.wave.kernel.target, "mma", kind.a, kind.b, kind.accumulator, k=kind.k, scale=kind.scale
    )
    warps = len(left.values)

    def part(x: Array | None, step: int) -> Array | None:
        """What mma `step` takes of an operand, for every warp."""
        if x is None:
            return None
        chosen = x.reshape(*x.shape[:2], steps, -1)[:, :, step]
        return np.repeat(chosen, warps // len(chosen), axis=0)

    for step in range(steps):
        a, b, scale_a, scale_b = (part(x, step) for x in (left.values, right.values, left.scales, right.scales))
        assert a is not None and b is not None
        c = tensor_core.dot(a, b, c, model, scale_a, scale_b)
    return c
