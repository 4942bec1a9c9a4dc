"""cuTensorMapEncodeTiled: tensor maps that a program makes through the CUDA driver, in the hardware's format.

The numbers of types, swizzles and the rest are those of the CUDA driver API; the format is described in `tensor_map`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import EmulatorError
from .tensor_map import ELEMENTS, MAP_BYTES, InvalidTensorMap, decode

_TYPES = (
    *("u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f64", "bf16", "f32.ftz", "tf32", "tf32.ftz"),
    *("b4x16", "b4x16_p64", "b6x16_p32"),
)
"""CUtensorMapDataType."""
_SWIZZLES = {0: (0, 0), 1: (1, 0), 2: (2, 0), 3: (3, 0), 4: (3, 1), 5: (3, 2), 6: (3, 3)}
"""CUtensorMapSwizzle to mode and atomicity."""
_TILED = 2
_FILLS_NAN, _IS_TF32 = 1 << 15, 1 << 16


@dataclass(frozen=True)
class TiledMap:
    """The arguments of cuTensorMapEncodeTiled. Dimension 0 comes first, and has no stride; strides are in bytes."""

    data_type: int
    address: int
    sizes: Sequence[int]
    strides: Sequence[int]
    box: Sequence[int]
    steps: Sequence[int]
    interleave: int = 0
    swizzle: int = 0
    promotion: int = 0
    fill: int = 0


def encode(wanted: TiledMap) -> bytes:
    """The 128 bytes of a map. Raises EmulatorError for what the driver would refuse, and for what is not modelled."""
    rank = len(wanted.sizes)
    problem = None
    if not 0 <= wanted.data_type < len(_TYPES):
        problem = f"CUtensorMapDataType {wanted.data_type} is not known"
    elif wanted.swizzle not in _SWIZZLES or wanted.interleave:
        problem = f"CUtensorMapSwizzle {wanted.swizzle} with interleave {wanted.interleave} is not modelled"
    elif not 1 <= rank <= 5:
        problem = f"a tensor of {rank} dimensions"
    elif not all(1 <= size <= 2**32 for size in wanted.sizes):
        problem = f"sizes {tuple(wanted.sizes)} are not within 1 and 2^32"
    elif not all(1 <= extent <= 256 for extent in wanted.box) or not all(1 <= step <= 8 for step in wanted.steps):
        problem = f"box {tuple(wanted.box)} with steps {tuple(wanted.steps)}: 256 and 8 are the largest"
    elif any(stride % 16 or not 0 <= stride < 2**40 for stride in wanted.strides):
        problem = f"strides {tuple(wanted.strides)} are no multiples of 16 bytes below 2^40"
    if problem is None:
        content = _pack(wanted)
        try:
            decode(content)
            return content
        except InvalidTensorMap as error:
            problem = str(error)
    raise EmulatorError(f"cuTensorMapEncodeTiled: {problem}")


def _pack(wanted: TiledMap) -> bytes:
    name, (mode, atomicity) = _TYPES[wanted.data_type], _SWIZZLES[wanted.swizzle]
    number = [element.name for element in ELEMENTS].index(name.removeprefix("t"))
    words = np.zeros(MAP_BYTES // 4, np.uint64)
    words[:2] = wanted.address & 0xFFFFFFFF, wanted.address >> 32
    flags = _TILED | (len(wanted.sizes) - 1) << 4 | number << 7 | mode << 13 | wanted.promotion << 17 | atomicity << 19
    words[2] = flags | (_FILLS_NAN if wanted.fill else 0) | (_IS_TF32 if name.startswith("t") else 0)
    for d, stride in enumerate(wanted.strides):
        words[3 + d] = stride >> 4 & 0xFFFFFFFF
        words[7] |= np.uint64(stride >> 36 << 4 * d)
    for d, (size, extent, step) in enumerate(zip(wanted.sizes, wanted.box, wanted.steps, strict=True)):
        words[8 + d] = size - 1
        words[13] |= np.uint64(step - 1 << 3 * d)
        words[13 if d == 0 else 14] |= np.uint64(extent - 1 << (24 if d == 0 else 8 * (d - 1)))
    return words.astype(np.uint32).tobytes()
