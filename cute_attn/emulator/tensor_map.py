"""Tensor maps: the 128-byte objects that tell a bulk tensor copy where a box of a tensor lies and how it is swizzled.

The format is the hardware's, as the CuTe DSL's host code writes it and as ptxas edits it for tensormap.replace (each
field below was read off that code). In 32-bit words:

    0, 1    address of the element at coordinates (0, ..., 0)
    2       bits 0-3: 2, for a tiled map; 4-6: rank - 1; 7-10: element type; 11-12: interleaving; 13-14: swizzle of 0,
            32, 64, 128 bytes; 15: fill with NaN; 16: elements are TF32; 17-18: L2 promotion; 19-20: atomicity of the
            swizzle; 21: how far beyond the tensor may be fetched; 22: swizzle of 96 bytes
    3-6     strides of dimensions 1-4 in units of 16 bytes, bits 0-31; word 7: bits 32-35 of each
    8-12    sizes - 1
    13      bits 0-14: traversal strides - 1, three bits each; 24-31: size of the box along dimension 0, - 1
    14      sizes of the box along dimensions 1-4, - 1, a byte each

A box goes to shared memory row by row (a row is what lies along dimension 0), the first dimensions fastest. What is
said about elements, boxes and swizzles is in the PTX ISA, "Tensors".
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from .memory import UNIT, Array

MAP_BYTES = 128
MAP_ALIGNMENT = 64
"""Of a map in memory (CUDA driver API, cuTensorMapEncodeTiled)."""
SHARED_ALIGNMENT = 128
"""Of a box in shared memory."""
PATTERN = 1024
"""Bytes of shared memory after which every swizzle repeats."""
FILL_NAN = np.uint16(0x7FF7)
"""What a map that fills with NaN puts outside the tensor, in each 16 bits; the ISA names the value and not its bits."""


class InvalidTensorMap(ValueError):
    """The bytes are no tensor map, or one of a kind that is not modelled."""


@dataclass(frozen=True)
class Element:
    """Type of a tensor's elements.

    bits: in global memory, without gaps. packed, slot: 16 elements of `packed` bytes occupy `slot` bytes of shared
    memory; the rest of the slot is padding that is not written. (16, 16) for types that are copied as they are.
    """

    name: str
    bits: int
    packed: int = 16
    slot: int = 16

    @property
    def is_padded(self) -> bool:
        """Whether the copy leaves gaps in shared memory."""
        return self.packed != self.slot


ELEMENTS = (
    Element("u8", 8),
    Element("u16", 16),
    Element("u32", 32),
    Element("s32", 32),
    Element("u64", 64),
    Element("s64", 64),
    Element("f16", 16),
    Element("f32", 32),
    Element("f32.ftz", 32),
    Element("f64", 64),
    Element("bf16", 16),
    Element("b4x16", 4),
    Element("b4x16_p64", 4, packed=8),
    Element("b6x16_p32", 6, packed=12),
)
_TF32 = {"f32": Element("tf32", 32), "f32.ftz": Element("tf32.ftz", 32)}


@dataclass(frozen=True)
class Swizzle:
    """A permutation of shared addresses: bits `mask` are XORed with those `shift` above, bit 3 with bit 7 if `flip`."""

    span: int = 0
    mask: int = 0
    shift: int = 0
    flip: bool = False

    def apply(self, address: Array) -> Array:
        swizzled = address ^ ((address >> self.shift) & self.mask)
        return swizzled ^ ((address >> 4) & 8) if self.flip else swizzled


_SWIZZLES = {
    (0, 0): Swizzle(),
    (1, 0): Swizzle(32, 0x10, 3),
    (2, 0): Swizzle(64, 0x30, 3),
    (3, 0): Swizzle(128, 0x70, 3),
    (3, 1): Swizzle(128, 0x60, 2),
    (3, 2): Swizzle(128, 0x60, 2, flip=True),
    (3, 3): Swizzle(128, 0x40, 1),
}
"""By mode and atomicity (of 16, 32, 32 with halves of 16 bytes flipped, 64 bytes)."""


@dataclass(frozen=True)
class Places:
    """Where boxes lie in global memory, in units of `unit` bytes.

    start: uint64 addresses [boxes, 1]; offsets: int64 bytes from there to each unit, [units]; inside: bool [boxes,
    units], or None where no box leaves the tensor. The addresses of units outside the tensor mean nothing.
    """

    unit: int
    start: Array
    offsets: Array
    inside: Array | None


@dataclass(frozen=True)
class TensorMap:
    """A decoded map. Dimension 0 is the contiguous one.

    sizes: of the tensor, in elements. strides: bytes from one element to the next in dimensions 1, 2, ...
    box: elements that are copied along each dimension. steps: distance between them, in elements of the tensor.
    """

    address: int
    element: Element
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    swizzle: Swizzle
    fills_nan: bool

    @property
    def rank(self) -> int:
        return len(self.sizes)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row of the box in global memory."""
        return self.box[0] * self.element.bits // 8

    @cached_property
    def rows(self) -> int:
        return math.prod(self.box[1:])

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a box, elements outside the tensor included and padding not: what a load reports to its mbarrier."""
        return self.rows * self.row_bytes

    @cached_property
    def pitch(self) -> int:
        """Bytes from row to row in shared memory: a row of a swizzled box has the whole span of the swizzle."""
        return max(self.row_bytes // self.element.packed * self.element.slot, self.swizzle.span)

    @cached_property
    def largest_unit(self) -> int:
        """Bytes that stay together on the way to shared memory."""
        packed = self.element.packed
        return min(packed & -packed, 8 if self.swizzle.flip else 16)

    @cached_property
    def _deltas(self) -> Array:
        """[rows, rank - 1] int64: coordinates of the box's rows relative to its first."""
        shape = self.box[:0:-1]
        grid = np.indices(shape, np.int64).reshape(len(shape), self.rows)
        return grid[::-1].T * np.array(self.steps[1:], np.int64)

    @cached_property
    def _shared(self) -> dict[tuple[int, int, int], Array]:
        return {}

    def places(self, coordinates: Array) -> Places:
        """Where the boxes at int64 `coordinates` [boxes, rank] lie; addresses wrap like the hardware's."""
        column = coordinates[:, 0] * self.element.bits >> 3
        width = self.sizes[0] * self.element.bits >> 3
        crosses = bool((column < 0).any() or (column + self.row_bytes > width).any())
        # The largest power of two that divides everything at which a copied row or the tensor ends.
        ends = int(np.bitwise_or.reduce(column)) | (width if crosses else 0) | self.largest_unit
        unit = ends & -ends
        inner = np.arange(0, self.row_bytes, unit)
        strides = np.array(self.strides, np.int64)
        origin = column + coordinates[:, 1:] @ strides + np.uint64(self.address).astype(np.int64)
        offsets = ((self._deltas @ strides)[:, None] + inner).reshape(-1)
        start = origin[:, None].view(np.uint64)
        return Places(unit, start, offsets, self._inside(coordinates, column, width, inner))

    def _inside(self, coordinates: Array, column: Array, width: int, inner: Array) -> Array | None:
        last = np.array([(n - 1) * step for n, step in zip(self.box, self.steps, strict=True)], np.int64)
        if (coordinates >= 0).all() and (coordinates + last < np.array(self.sizes)).all():
            return None
        at = column[:, None] + inner
        columns: Array = np.logical_and(at >= 0, at < width)
        beyond = coordinates[:, None, 1:] + self._deltas
        rows = np.logical_and.reduce((beyond >= 0) & (beyond < np.array(self.sizes[1:])), axis=2)
        return (rows[:, :, None] & columns[:, None, :]).reshape(len(coordinates), -1)

    def shared_offsets(self, offset: Array, unit: int, rows: int) -> tuple[Array, Array]:
        """Where the units of `rows` rows lie that begin at shared `offset` [boxes]: the sum of two int64 arrays.

        The first is [boxes], the second [units] or, where the swizzle is in different phases, [boxes, units].
        """
        phase = offset % PATTERN
        if phase.size and (phase == phase[0]).all():
            return offset - phase, self._shared_table(int(phase[0]), unit, rows)
        kinds, which = np.unique(phase, return_inverse=True)
        tables = [self._shared_table(int(kind), unit, rows) for kind in kinds]
        return offset - phase, np.stack(tables)[which] if tables else np.zeros((0, 0), np.int64)

    def _shared_table(self, phase: int, unit: int, rows: int) -> Array:
        key = (phase, unit, rows)
        if key not in self._shared:
            inner = np.arange(0, self.row_bytes, unit)
            packed, slot = self.element.packed, self.element.slot
            row = phase + np.arange(rows)[:, None] * self.pitch
            self._shared[key] = self.swizzle.apply((row + inner // packed * slot + inner % packed).reshape(-1))
        return self._shared[key]

    def fill(self, unit: int) -> Array:
        """One unit of what a load puts outside the tensor."""
        pattern = np.full(8, FILL_NAN if self.fills_nan else 0, np.uint16)
        return pattern.view(np.uint8)[:unit].view(UNIT[unit])[0]


@lru_cache(maxsize=4096)
def decode(content: bytes) -> TensorMap:
    """The map in these 128 bytes. Raises InvalidTensorMap."""
    words = struct.unpack_from("<16I", content)
    flags = words[2]
    rank = (flags >> 4 & 7) + 1
    number, interleave, mode, atomicity = flags >> 7 & 15, flags >> 11 & 3, flags >> 13 & 3, flags >> 19 & 3
    if flags & 15 != 2 or flags >> 23 or rank > 5 or number >= len(ELEMENTS) or words[15]:
        raise InvalidTensorMap(f"these bytes are no tiled tensor map: word 2 is {flags:#x}")
    if interleave:
        raise InvalidTensorMap("interleaved layouts are not modelled")
    if flags >> 22 & 1:
        raise InvalidTensorMap("swizzles of 96 bytes are not modelled")
    if (mode, atomicity) not in _SWIZZLES:
        raise InvalidTensorMap("an atomicity of more than 16 bytes goes with a swizzle of 128 bytes only")
    element = ELEMENTS[number]
    if flags >> 16 & 1:
        if element.name not in _TF32:
            raise InvalidTensorMap(f"TF32 is a kind of f32, and the elements are {element.name}")
        element = _TF32[element.name]
    boxes = [words[13] >> 24, *words[14].to_bytes(4, "little")]
    # The traversal stride of dimension 0 is ignored without interleaving (cuTensorMapEncodeTiled).
    steps = (1, *((words[13] >> 3 * d & 7) + 1 for d in range(1, rank)))
    found = TensorMap(
        address=words[0] | words[1] << 32,
        element=element,
        sizes=tuple(size + 1 for size in words[8 : 8 + rank]),
        strides=tuple((words[3 + d] | (words[7] >> 4 * d & 15) << 32) * 16 for d in range(rank - 1)),
        box=tuple(-(-(n + 1) // step) for n, step in zip(boxes, steps, strict=False)),
        steps=steps,
        swizzle=_SWIZZLES[mode, atomicity],
        fills_nan=bool(flags >> 15 & 1),
    )
    _check(found)
    return found


def _check(found: TensorMap) -> None:
    """The rules of cuTensorMapEncodeTiled, and those of the PTX ISA, "Restriction on Tensor Copy instructions"."""
    element, span = found.element, found.swizzle.span
    padded = element.is_padded
    row = found.box[0] * element.bits
    alignment = 32 if padded else 16
    if found.address % alignment:
        raise InvalidTensorMap(f"the tensor's address {found.address:#x} is not a multiple of {alignment}")
    if any(stride % alignment for stride in found.strides):
        raise InvalidTensorMap(f"strides {found.strides} are not multiples of {alignment} bytes")
    if row % 128:
        raise InvalidTensorMap(f"a row of the box has {row / 8:g} bytes, which is no multiple of 16")
    if span and row // 8 // element.packed * element.slot > span:
        raise InvalidTensorMap(f"a row of the box has {row // 8} bytes, the swizzle's span is {span}")
    if padded and (found.box[0] != 128 or found.sizes[0] % 128):
        raise InvalidTensorMap(f"boxes and tensors of {element.name} have 128 elements, or multiples, in dimension 0")
    if padded and (span not in (0, 128) or found.swizzle.flip):
        raise InvalidTensorMap(f"{element.name} goes without a swizzle or with one of 128 bytes that flips nothing")
    if found.fills_nan and element.name[:2] not in ("f1", "f3", "f6", "bf", "tf"):
        raise InvalidTensorMap(f"elements of {element.name} cannot be filled with NaN")
    if element.bits == 4 and found.sizes[0] % 2:
        raise InvalidTensorMap("dimension 0 of a tensor of 4-bit elements has an odd size")
