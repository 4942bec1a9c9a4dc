"""The device that the emulator pretends to be: limits and attributes of one architecture."""

from __future__ import annotations

from dataclasses import dataclass

from cute_attn.arch import ARCHS

__all__ = ["MULTIPROCESSORS", "Device", "device_for"]

MULTIPROCESSORS = 4
"""Streaming multiprocessors of the pretended device, unless another number is set. Small on purpose: a persistent
kernel launches one CTA per multiprocessor, and with few of them each CTA has several tiles to go through, which is what
there is to get wrong."""

_KIB = 1024
_DEFAULT_DYNAMIC_SHARED = 48 * _KIB  # more has to be asked for, per kernel (CUDA C++ Programming Guide, shared memory)


@dataclass(frozen=True)
class Device:
    """Limits of one device, from the CUDA C++ Programming Guide's table of technical specifications.

    capability:         compute capability (major, minor)
    shared_optin_bytes: most shared memory, static and dynamic, of one CTA
    multiprocessors:    how many there are
    """

    capability: tuple[int, int]
    shared_optin_bytes: int
    multiprocessors: int = MULTIPROCESSORS

    max_threads = 1024
    max_block = (1024, 1024, 64)
    max_grid = (2**31 - 1, 65535, 65535)
    default_shared_bytes = _DEFAULT_DYNAMIC_SHARED
    l2_bytes = 1024 * _KIB  # small on purpose: benchmarks allocate multiples of it to keep the cache cold
    warp_size = 32
    registers = 65536  # per CTA, and per multiprocessor

    @property
    def max_cluster(self) -> int:
        """Most CTAs of a cluster without the kernel's consent to a size that not every GPU has; 1: no clusters."""
        return 8 if self.capability >= (9, 0) else 1

    @property
    def threads_per_multiprocessor(self) -> int:
        return 2048 if self.capability in ((8, 0), (9, 0), (10, 0)) else 1536

    @property
    def shared_per_multiprocessor(self) -> int:
        """Bytes: one KiB more than a CTA can have, which the system reserves per CTA."""
        return self.shared_optin_bytes + _KIB

    def resident_ctas(self, threads: int, shared_bytes: int) -> int:
        """CTAs that one multiprocessor holds, as far as threads and shared memory limit them (registers may, too)."""
        by_threads = self.threads_per_multiprocessor // (-(-threads // self.warp_size) * self.warp_size)
        return min(by_threads, self.shared_per_multiprocessor // (shared_bytes + _KIB))

    def attribute(self, number: int) -> int:
        """Value of a cudaDeviceAttr. Raises KeyError for one that no program has asked for yet."""
        return _attributes(self)[number]


def _attributes(device: Device) -> dict[int, int]:
    """cudaDeviceAttr (CUdevice_attribute has the same numbers) to value."""
    clusters = int(device.max_cluster > 1)
    return {
        1: device.max_threads,
        2: device.max_block[0],
        3: device.max_block[1],
        4: device.max_block[2],
        5: device.max_grid[0],
        6: device.max_grid[1],
        7: device.max_grid[2],
        8: device.default_shared_bytes,
        10: device.warp_size,
        12: device.registers,  # per CTA
        16: device.multiprocessors,
        38: device.l2_bytes,
        39: device.threads_per_multiprocessor,
        75: device.capability[0],
        76: device.capability[1],
        81: device.shared_per_multiprocessor,
        82: device.registers,  # per multiprocessor
        95: 1,  # cooperative launch
        97: device.shared_optin_bytes,
        111: _KIB,  # shared memory reserved by the system per CTA
        120: clusters,  # cluster launch
    }


def device_for(arch: str, multiprocessors: int = MULTIPROCESSORS) -> Device:
    """The device that code for ``arch`` ("sm_80", "sm_90", "sm_90a" ...) is made for. Raises ValueError if unknown."""
    for known in ARCHS.values():
        if known.name.rstrip("af") == arch.rstrip("af"):
            return Device(known.capability, known.shared_bytes, multiprocessors)
    raise ValueError(f"the emulator knows no device for arch {arch!r}; it knows {', '.join(ARCHS)}")
