"""Device memory that a program allocates by itself (cudaMalloc and its kin): memory of the process, by address."""

from __future__ import annotations

import ctypes
from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from cute_attn.emulator.errors import EmulatorError, OutOfBounds
from cute_attn.emulator.memory import Span, aligned_bytes

__all__ = ["Heap"]

_ALIGNMENT = 256  # of cudaMalloc (CUDA C++ Programming Guide, device memory accesses)


class Heap:
    """Allocations by address. What a program never frees lives as long as the process, as on a device."""

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[NDArray[np.uint8], Span]] = {}
        self._count = 0

    def spans(self) -> list[Span]:
        """Every allocation that is not freed."""
        return [span for _, span in self._blocks.values()]

    def allocate(self, nbytes: int) -> int:
        """Address of new memory of 0xFF bytes, which are NaN as floating-point numbers; 0 for no bytes, as in CUDA."""
        if not nbytes:
            return 0
        memory = aligned_bytes(nbytes + _ALIGNMENT, 0xFF)
        address = -(-memory.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        self._count += 1
        self._blocks[address] = memory, Span(address, nbytes, f"allocation {self._count}")
        return address

    def free(self, address: int) -> None:
        """Give an allocation back; address 0 is nothing. Raises EmulatorError for what `allocate` did not return."""
        if address and self._blocks.pop(address, None) is None:
            raise EmulatorError(f"cudaFree({address:#x}): the program has no allocation there, or freed it before")

    def fill(self, address: int, value: int, nbytes: int) -> None:
        """cudaMemset."""
        self._check("cudaMemset", address, nbytes)
        ctypes.memset(address, value, nbytes)

    def fill_words(self, address: int, value: int, count: int) -> None:
        """cuMemsetD32: ``count`` words of 32 bits."""
        self._check("cuMemsetD32", address, 4 * count)
        np.ctypeslib.as_array((ctypes.c_uint32 * count).from_address(address))[:] = value

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """cudaMemcpy, in any direction: host memory cannot be checked, allocations are."""
        self._check("cudaMemcpy to", target, nbytes)
        self._check("cudaMemcpy from", source, nbytes)
        ctypes.memmove(target, source, nbytes)

    def _check(self, call: str, address: int, nbytes: int) -> None:
        starts = sorted(self._blocks)
        at = bisect_right(starts, address) - 1
        if at < 0:
            return
        span = self._blocks[starts[at]][1]
        if span.start <= address < span.end < address + nbytes:
            beyond = address + nbytes - span.end
            raise OutOfBounds(f"{call} {address:#x}: reaches {beyond} bytes past {span.name} of {span.nbytes} bytes")
