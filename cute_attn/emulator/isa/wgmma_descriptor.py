"""Shared-memory matrix descriptors of wgmma: where the 16-byte chunks of an operand lie.

Sources: PTX ISA, "Asynchronous warpgroup-level matrix shared memory layout" (descriptor format, strides, swizzling
modes) and the canonical layouts of CUTLASS, `cute/atom/mma_traits_sm90_gmma.hpp`.

An operand of one instruction is 32 bytes of k wide. With T elements in 16 bytes, offsets in bytes:

    K-major, no swizzle      row r, chunk c of k:   r % 8 * 16 + r / 8 * SBO + c * LBO
    K-major, swizzle of S    row r, chunk c of k:   r % 8 * S + r / 8 * SBO + c * 16
    MN-major, no swizzle     chunk c of rows, k:    k % 8 * 16 + k / 8 * LBO + c * SBO
    MN-major, swizzle of S   chunk c of rows, k:    k % 8 * S + k / 8 * SBO + c % (S / 16) * 16 + c / (S / 16) * LBO

and a swizzle exchanges the chunks within the S bytes of a line by the address of their 128-byte line.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..memory import Array

CHUNK = 16
K_BYTES = 32
"""Bytes of k per instruction, whatever the element."""
_SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}


@dataclass(frozen=True)
class MatrixDescriptor:
    """start: address in shared memory. leading, stride: the two byte offsets (LBO, SBO). base_offset: the 128-byte line
    of the swizzling pattern at which the matrix starts. swizzle: 0, 32, 64 or 128 bytes.
    """

    start: int
    leading: int
    stride: int
    base_offset: int
    swizzle: int

    @classmethod
    def decode(cls, bits: int) -> MatrixDescriptor:
        def encoded(shift: int) -> int:
            return (bits >> shift & 0x3FFF) * CHUNK

        return cls(encoded(0), encoded(16), encoded(32), bits >> 49 & 7, _SWIZZLES[bits >> 62 & 3])

    @property
    def lines(self) -> int:
        """128-byte lines after which the swizzling pattern repeats, less one."""
        return max(self.swizzle // CHUNK - 1, 0)

    @property
    def is_aligned(self) -> bool:
        """Whether the matrix starts at the line of the pattern that the base offset says."""
        return (self.start >> 7 ^ self.base_offset) & self.lines == 0


@lru_cache(maxsize=4096)
def chunks(bits: int, rows: int, mn_major: bool, k: int) -> tuple[Array, int, int]:
    """Chunk numbers (address / 16) of an operand, and the lowest and highest byte offset it touches.

    K-major: [rows, 2]; MN-major: [k, rows / 8], of 16-bit elements.
    """
    d = MatrixDescriptor.decode(bits)
    if mn_major:
        at_k, at_chunk = np.arange(k)[:, None], np.arange(rows // 8)[None, :]
        if d.swizzle:
            per_line = d.swizzle // CHUNK
            offset = at_k % 8 * d.swizzle + at_k // 8 * d.stride
            offset = offset + at_chunk % per_line * CHUNK + at_chunk // per_line * d.leading
        else:
            offset = at_k % 8 * CHUNK + at_k // 8 * d.leading + at_chunk * d.stride
    else:
        row, at_chunk = np.arange(rows)[:, None], np.arange(K_BYTES // CHUNK)[None, :]
        line, next_chunk = (d.swizzle, CHUNK) if d.swizzle else (CHUNK, d.leading)
        offset = row % 8 * line + row // 8 * d.stride + at_chunk * next_chunk
    address = offset + d.start
    number = address >> 4 ^ ((address >> 7) - d.base_offset & d.lines)
    number.flags.writeable = False
    return number, int(number.min()) * CHUNK, int(number.max() + 1) * CHUNK
