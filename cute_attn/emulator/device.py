"""The device that the emulator pretends to be: limits and attributes of one architecture."""

from __future__ import annotations

from dataclasses import dataclass

from cute_attn.arch import ARCHS

__all__ = ["MULTIPROCESSORS", "Device", "device_for"]

MULTIPROCESSORS = 4
"""Streaming multiprocessors of the pretended device. Small on purpose: a persistent kernel launches one CTA per
multiprocessor, and with few of them each CTA has several tiles to go through, which is what there is to get wrong."""

_KIB = 1024
_DEFAULT_DYNAMIC_SHARED = 48 * _KIB  # more has to be asked for, per kernel (CUDA C++ Programming Guide, shared memory)


@dataclass(frozen=True)
class Device:
    """Limits of one device, from the CUDA C++ Programming Guide's table of technical specifications.

    capability:         compute capability (major, minor)
    shared_optin_bytes: most shared memory, static and dynamic, of one CTA
    """

    capability: tuple[int, int]
    shared_optin_bytes: int

    max_threads = 1024
    max_block = (1024, 1024, 64)
    max_grid = (2**31 - 1, 65535, 65535)
    default_shared_bytes = _DEFAULT_DYNAMIC_SHARED

    def attribute(self, number: int) -> int:
        """Value of a cudaDeviceAttr. Raises KeyError for one that no program has asked for yet."""
        return _attributes(self)[number]


def _attributes(device: Device) -> dict[int, int]:
    """cudaDeviceAttr to value."""
    threads_per_multiprocessor = 2048 if device.capability in ((8, 0), (9, 0), (10, 0)) else 1536
    return {
        1: device.max_threads,
        2: device.max_block[0],
        3: device.max_block[1],
        4: device.max_block[2],
        5: device.max_grid[0],
        6: device.max_grid[1],
        7: device.max_grid[2],
        8: device.default_shared_bytes,
        10: 32,  # warp size
        12: 65536,  # registers per CTA
        16: MULTIPROCESSORS,
        39: threads_per_multiprocessor,
        75: device.capability[0],
        76: device.capability[1],
        81: device.shared_optin_bytes + _KIB,  # per multiprocessor: one KiB more, which the system reserves per CTA
        82: 65536,  # registers per multiprocessor
        95: 0,  # cooperative launch
        97: device.shared_optin_bytes,
        111: _KIB,  # shared memory reserved by the system per CTA
    }


def device_for(arch: str) -> Device:
    """The device that code for ``arch`` ("sm_80", "sm_90", "sm_90a" ...) is made for. Raises ValueError if unknown."""
    for known in ARCHS.values():
        if known.name.rstrip("af") == arch.rstrip("af"):
            return Device(known.capability, known.shared_bytes)
    raise ValueError(f"the emulator knows no device for arch {arch!r}; it knows {', '.join(ARCHS)}")
