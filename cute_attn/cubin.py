"""What a cubin's ELF says about its kernels: registers, stack frame, static shared memory."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["KernelResources", "kernel_resources"]

# Attributes of the .nv.info sections (EIATTR_*), as `cuobjdump -elf` names them.
_REGISTER_COUNT, _FRAME_SIZE = 0x2F, 0x11
_FORMAT_SIZED = 4  # the attribute's value is the number of payload bytes that follow
_SYMBOL_TABLE = 2  # SHT_SYMTAB


@dataclass(frozen=True)
class KernelResources:
    """Per thread: ``registers``, ``stack_bytes``; per CTA: ``static_shared_bytes``."""

    registers: int
    stack_bytes: int
    static_shared_bytes: int


@dataclass(frozen=True)
class _Section:
    name: str
    kind: int
    offset: int
    size: int
    link: int


def kernel_resources(cubin: bytes) -> dict[str, KernelResources]:
    """Resources by kernel name. Raises ValueError if the bytes are no 64-bit ELF file."""
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("a cubin is a 64-bit ELF file, this is not one")
    sections = _sections(cubin)
    symbols = _symbols(cubin, sections)
    shared = {s.name.removeprefix(".nv.shared."): s.size for s in sections if s.name.startswith(".nv.shared.")}
    found: dict[str, dict[int, int]] = {}
    for section in sections:
        if section.name == ".nv.info":
            for attribute, payload in _attributes(cubin, section):
                if attribute in (_REGISTER_COUNT, _FRAME_SIZE):
                    symbol, value = struct.unpack("<II", payload)
                    found.setdefault(symbols[symbol], {})[attribute] = value
    kernels = [s.name.removeprefix(".text.") for s in sections if s.name.startswith(".text.")]
    return {
        name: KernelResources(
            registers=found.get(name, {}).get(_REGISTER_COUNT, 0),
            stack_bytes=found.get(name, {}).get(_FRAME_SIZE, 0),
            static_shared_bytes=shared.get(name, 0),
        )
        for name in kernels
    }


def _text(cubin: bytes, offset: int) -> str:
    return cubin[offset : cubin.index(b"\0", offset)].decode()


def _sections(cubin: bytes) -> list[_Section]:
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_bytes, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQII", cubin, table + i * entry_bytes) for i in range(count)]
    names = headers[names_index][4]
    return [
        _Section(_text(cubin, names + name), kind, offset, size, link)
        for name, kind, _flags, _address, offset, size, link, _info in headers
    ]


def _symbols(cubin: bytes, sections: list[_Section]) -> list[str]:
    symbol_bytes = 24
    for section in sections:
        if section.kind == _SYMBOL_TABLE:
            names = sections[section.link].offset
            starts = range(section.offset, section.offset + section.size, symbol_bytes)
            return [_text(cubin, names + struct.unpack_from("<I", cubin, start)[0]) for start in starts]
    return []


def _attributes(cubin: bytes, section: _Section) -> Iterator[tuple[int, bytes]]:
    """The (number, payload) pairs of one .nv.info section."""
    offset, end = section.offset, section.offset + section.size
    while offset < end:
        form, attribute, value = struct.unpack_from("<BBH", cubin, offset)
        offset += 4
        if form == _FORMAT_SIZED:
            yield attribute, cubin[offset : offset + value]
            offset += value
