"""Tensor maps for the tests: an encoder of its own, and what a box looks like in shared memory, element by element."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

TYPES = [
    "u8",
    "u16",
    "u32",
    "s32",
    "u64",
    "s64",
    "f16",
    "f32",
    "f32.ftz",
    "f64",
    "bf16",
    "b4x16",
    "b4x16_p64",
    "b6x16_p32",
]
SWIZZLES = {
    "none": (0, 0),
    "32": (1, 0),
    "64": (2, 0),
    "128": (3, 0),
    "128/32": (3, 1),
    "flip": (3, 2),
    "128/64": (3, 3),
}
# Order of the 16-byte pieces in the lines of 128 bytes after which a pattern repeats: PTX ISA, "Swizzling Modes".
PATTERNS = {
    "none": ["01234567"],
    "32": ["01234567", "10325476"],
    "64": ["01234567", "10325476", "23016745", "32107654"],
    "128": ["01234567", "10325476", "23016745", "32107654", "45670123", "54761032", "67452301", "76543210"],
    "128/32": ["01234567", "23016745", "45670123", "67452301"],
    "128/64": ["01234567", "45670123"],
}


def encode(
    address: int,
    kind: str,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    *,
    swizzle: str = "none",
    steps: Sequence[int] | None = None,
    nan: bool = False,
    interleave: int = 0,
) -> np.ndarray:
    """The 128 bytes of a tiled map; sizes, byte strides of dimensions 1, 2, ... and box, dimension 0 first."""
    tf32 = kind.startswith("tf32")
    number = TYPES.index(kind.replace("tf32", "f32"))
    mode, atomicity = SWIZZLES[swizzle]
    map_ = np.zeros(32, np.uint32)
    map_[:2] = address & 0xFFFFFFFF, address >> 32
    map_[2] = 2 | len(sizes) - 1 << 4 | number << 7 | interleave << 11 | mode << 13 | nan << 15 | tf32 << 16
    map_[2] |= 2 << 17 | atomicity << 19
    for d, stride in enumerate(strides):
        map_[3 + d] = (stride >> 4) & 0xFFFFFFFF
        map_[7] |= (stride >> 36) << 4 * d
    for d, (size, extent) in enumerate(zip(sizes, box, strict=True)):
        map_[8 + d] = size - 1
        map_[13 if d == 0 else 14] |= extent - 1 << (24 if d == 0 else 8 * (d - 1))
    for d, step in enumerate(steps or []):
        map_[13] |= step - 1 << 3 * d
    return map_.view(np.uint8)


def encode_array(array: np.ndarray, kind: str, box: Sequence[int], **options: Any) -> np.ndarray:
    """The map of an array whose last axis is contiguous (dimension 0)."""
    return encode(array.ctypes.data, kind, array.shape[::-1], array.strides[-2::-1], box, **options)


def swizzled(offset: int, swizzle: str) -> int:
    """Where the byte that lies at shared address `offset` without a swizzle lies with it."""
    line, piece, rest = offset // 128, offset // 16 % 8, offset % 16
    pattern = PATTERNS["128/32" if swizzle == "flip" else swizzle]
    if swizzle == "flip" and line % 2:
        rest = (rest + 8) % 16
    return line * 128 + pattern[line % len(pattern)].index(str(piece)) * 16 + rest


def elements(
    box: Sequence[int],
    first: Sequence[int],
    start: int,
    size: int,
    *,
    swizzle: str = "none",
    steps: Sequence[int] | None = None,
) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """(index into the tensor, shared addresses of its bytes) of each element of a box that lies at address `start`."""
    counts = [math.ceil(n / s) for n, s in zip(box, steps or [1] * len(box), strict=True)]
    span = 0 if swizzle == "none" else int(swizzle) if swizzle.isdigit() else 128
    pitch = max(counts[0] * size, span)
    for number, outer in enumerate(itertools.product(*(range(n) for n in counts[:0:-1]))):
        rows = [f + k * s for f, k, s in zip(first[1:], outer[::-1], (steps or [1] * 5)[1:], strict=False)]
        for column in range(counts[0]):
            at = start + number * pitch + column * size
            yield (*rows[::-1], first[0] + column), [swizzled(at + k, swizzle) for k in range(size)]


def is_inside(place: Sequence[int], shape: Sequence[int]) -> bool:
    return all(0 <= p < n for p, n in zip(place, shape, strict=True))


def boxed(
    array: np.ndarray,
    box: Sequence[int],
    first: Sequence[int],
    start: int,
    shared: np.ndarray,
    *,
    outside: bytes | None = None,
    **options: Any,
) -> None:
    """Writes into `shared` (bytes) what a load of a box to address `start` writes.

    first: coordinates, dimension 0 first. outside: the fill of an element, zeros if None.
    """
    for place, addresses in elements(box, first, start, array.itemsize, **options):
        content = array[place].tobytes() if is_inside(place, array.shape) else outside or bytes(array.itemsize)
        shared[addresses] = np.frombuffer(content, np.uint8)
