"""The product of wgmma.mma_async: operands from shared memory and registers, the sum, accumulators to registers.

Fragments (PTX ISA, "Register fragments and shared memory matrix layouts"; w = warp of the warpgroup, g = lane / 4,
t = lane % 4): register r of A holds the bytes 16 * (r / 2) + 4t .. + 3 of k of row 16w + 8 * (r % 2) + g, whatever the
element. Accumulator registers come in fours for every eight columns: columns 2t and 2t + 1 of row 16w + g, then of row
16w + g + 8; with f16 accumulators the two columns share a register.

Instructions that continue one sum are multiplied together, their k side by side. Numerics are those of `matrix`: exact
products and float32 sums, exact integers, a rounding per instruction for f16 accumulators; or the hardware's own order
and truncation (`tensor_core`), one instruction at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..formats import NARROW_VALUES
from ..memory import Array
from ..tensor_core import dot, model_for
from ..wave import Wave
from .matrix_kind import longest_chain
from .wgmma_descriptor import chunks

WARPGROUP = 128
ROWS = 64
_F16_VALUES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


@dataclass(frozen=True)
class WgmmaKind:
    """Columns, k, element types of A, B and the accumulator ("f32", "f16", "s32"), and the modifiers of one form.

    negative: the product is subtracted. a_major_mn, b_major_mn: that operand in shared memory is M- or N-major.
    """

    n: int
    k: int
    a: str
    b: str
    accumulator: str
    saturate: bool
    a_in_registers: bool
    negative: bool
    a_major_mn: bool
    b_major_mn: bool

    @property
    def registers(self) -> int:
        """Accumulator registers of a thread."""
        return self.n // 4 if self.accumulator == "f16" else self.n // 2

    @property
    def longest_chain(self) -> int:
        """How many instructions may be summed before the accumulator is added, without changing what they mean."""
        return 1 if self.saturate else longest_chain(self.accumulator, self.k, self.a, self.b)

    def shares_accumulator(self, other: WgmmaKind) -> bool:
        """Whether accesses to the accumulator are ordered without a fence or wait: instructions of the same shape."""
        return (self.n, self.k, self.accumulator) == (other.n, other.k, other.accumulator)


def decode(raw: Array, element: str) -> Array:
    """16-byte chunks (complex128 [..., m]) -> float32 [..., elements] in the order of memory."""
    if element == "f16":
        return _F16_VALUES.take(raw.view(np.uint16))
    if element == "bf16":
        return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if element == "tf32":
        return (raw.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    if element in ("s8", "u8"):
        return raw.view(np.int8 if element == "s8" else np.uint8).astype(np.float32)
    return NARROW_VALUES[element].take(raw.view(np.uint8))


# ---- operands


@lru_cache(maxsize=1024)
def _chunks_along_k(descriptors: tuple[int, ...], rows: int, mn_major: bool, k: int) -> tuple[Array, int, int]:
    """Chunk numbers of several instructions' operand, k side by side, and the lowest and highest byte offset."""
    parts = [chunks(bits, rows, mn_major, k) for bits in descriptors]
    table = np.concatenate([part[0] for part in parts], axis=0 if mn_major else 1)
    table.flags.writeable = False
    return table, min(low for _, low, _ in parts), max(high for _, _, high in parts)


Unwritten = Callable[[int, int], None]
"""Reports a read of unwritten shared memory by (instruction of the chain, warpgroup)."""


def shared_operand(
    wave: Wave,
    ctas: Array,
    descriptors: Array,
    rows: int,
    mn_major: bool,
    element: str,
    k: int,
    unwritten: Unwritten,
) -> tuple[Array, Array]:
    """The matrices that descriptors [instructions, warpgroups] describe, each only once.

    ctas: of the warpgroups. Returns float32 [matrices, rows, instructions * k], and [warpgroups] which is whose.
    """
    if (descriptors == descriptors[:, :1]).all():
        distinct, which = descriptors[:, :1], np.zeros(len(ctas), np.int64)
    else:
        distinct, which = np.unique(descriptors, axis=1, return_inverse=True)
    count = distinct.shape[1]
    matrices, owner = np.unique(ctas * count + which, return_inverse=True)
    columns = [tuple(column) for column in distinct.T.tolist()]
    tables = [_chunks_along_k(column, rows, mn_major, k) for column in columns]
    table = tables[0][0] if count == 1 else np.stack([t[0] for t in tables])[matrices % count]
    elements = table + wave.shared.base(matrices // count, 16)[:, None, None]
    low, high = min(t[1] for t in tables), max(t[2] for t in tables)
    if not wave.poison and (bad := wave.shared.unwritten(elements, 16, low, high)) is not None:
        matrix, first, second = np.unravel_index(int(np.argmax(bad)), bad.shape)
        instruction = int(first) // k if mn_major else int(second) // 2
        unwritten(instruction, int(np.argmax(owner == matrix)))
    values = decode(wave.shared.views[16].take(elements), element)
    return (values.swapaxes(1, 2) if mn_major else values), owner


def register_operand(fragments: Sequence[Sequence[Array]], element: str) -> Array:
    """A from four registers per instruction, [warpgroups * 128] -> float32 [warpgroups, 64, instructions * k]."""
    warpgroups = fragments[0][0].size // WARPGROUP
    raw = np.empty((warpgroups, 4, 2, 8, len(fragments), 2), np.complex128)
    for s, fragment in enumerate(fragments):
        for r, register in enumerate(fragment):
            quads = np.ascontiguousarray(register).view(np.complex128).reshape(warpgroups, 4, 8)
            raw[:, :, r % 2, :, s, r // 2] = quads
    return decode(raw.reshape(warpgroups, ROWS, -1), element)


# ---- accumulators


def to_registers(matrix: Array) -> Array:
    """[warpgroups, 64, n] of 32-bit elements -> [n / 2, warpgroups * 128]."""
    warpgroups, _, n = matrix.shape
    parts = matrix.reshape(warpgroups, 4, 2, 8, n // 8, 4, 2)
    return np.ascontiguousarray(parts.transpose(4, 2, 6, 0, 1, 3, 5)).reshape(n // 2, -1)


def to_matrix(registers: Array) -> Array:
    """[n / 2, warpgroups * 128] of 32-bit elements -> [warpgroups, 64, n]."""
    count, lanes = registers.shape
    parts = registers.reshape(count // 4, 2, 2, lanes // WARPGROUP, 4, 8, 4)
    return np.ascontiguousarray(parts.transpose(3, 4, 1, 5, 0, 6, 2)).reshape(-1, ROWS, 2 * count)


def to_f16_registers(matrix: Array) -> Array:
    """float16 [warpgroups, 64, n] -> uint32 [n / 4, warpgroups * 128]."""
    warpgroups, _, n = matrix.shape
    pairs = np.ascontiguousarray(matrix).view(np.uint32).reshape(warpgroups, 4, 2, 8, n // 8, 4)
    return np.ascontiguousarray(pairs.transpose(4, 2, 0, 1, 3, 5)).reshape(n // 4, -1)


def to_f16_matrix(registers: Array) -> Array:
    """uint32 [n / 4, warpgroups * 128] -> float16 [warpgroups, 64, n]."""
    count, lanes = registers.shape
    pairs = registers.reshape(count // 2, 2, lanes // WARPGROUP, 4, 8, 4)
    return np.ascontiguousarray(pairs.transpose(2, 3, 1, 4, 0, 5)).view(np.float16).reshape(-1, ROWS, 4 * count)


def _multiply(left: Array, right: Array, owner: Array) -> Array:
    """[warpgroups, 64, n]: left [warpgroups, 64, k] by right [matrices, n, k], of which `owner` says whose is which.

    Always one product per warpgroup, of row-major operands: BLAS sums in another order for other numbers of rows.
    """
    warpgroups, matrices = len(left), len(right)
    columns = np.ascontiguousarray(right.swapaxes(1, 2))
    each = warpgroups // matrices
    if each * matrices == warpgroups and (owner == np.repeat(np.arange(matrices), each)).all():
        product = left.reshape(matrices, each, ROWS, -1) @ columns[:, None]
        return product.reshape(warpgroups, ROWS, -1)
    return left @ columns[owner]


def accumulate(wave: Wave, kind: WgmmaKind, left: Array, right: Array, owner: Array, c: Array | None) -> Array:
    """D's registers, uint32 [registers, lanes], from A [warpgroups, 64, k], B [matrices, n, k] and C's registers.

    owner: which matrix each warpgroup multiplies by. k is that of one instruction or of several.
    """
    if kind.negative:
        left = -left
    if wave.accumulation == "hardware" and kind.accumulator != "s32":
        return _accumulate_as_hardware(wave, kind, left, right[owner], c)
    product = _multiply(left, right, owner)
    if kind.accumulator == "f16":
        total = product if c is None else product + to_f16_matrix(c).astype(np.float32)
        return to_f16_registers(total.astype(np.float16))
    if kind.accumulator == "f32":
        result = to_registers(product)
        return (result if c is None else np.add(result, c.view(np.float32), out=result)).view(np.uint32)
    exact = to_registers(product.astype(np.int32))
    if c is None:
        return exact.view(np.uint32)
    if kind.saturate:
        wide = exact.astype(np.int64) + c.view(np.int32)
        return np.clip(wide, -(2**31), 2**31 - 1).astype(np.int32).view(np.uint32)
    return (exact + c.view(np.int32)).view(np.uint32)


def _accumulate_as_hardware(wave: Wave, kind: WgmmaKind, left: Array, right: Array, c: Array | None) -> Array:
    model = model_for(wave.kernel.target, "wgmma", kind.a, kind.b, kind.accumulator, k=kind.k)
    total: Any
    if c is None:
        total = np.zeros((len(left), ROWS, kind.n), np.float32)
    elif kind.accumulator == "f16":
        total = to_f16_matrix(c).astype(np.float32)
    else:
        total = to_matrix(c.view(np.float32))
    for first in range(0, left.shape[2], kind.k):
        step = slice(first, first + kind.k)
        total = dot(left[:, :, step], right[:, :, step], total, model)
    if kind.accumulator == "f16":
        return to_f16_registers(total.astype(np.float16))
    return to_registers(total).view(np.uint32)
