"""What a PTX module declares: variables, constants, parameters, and the directives of an entry."""

from __future__ import annotations

import re
import struct

from .errors import ParseError
from .module import Kernel, Parameter, Variable, round_up
from .ptx_text import split_operands
from .types import ptx_type

VARIABLE = re.compile(
    r"(?P<extern>\.extern\s+)?(?:\.(?:visible|weak)\s+)?\.(?P<space>shared|local|param)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>[a-z]\d+)\s+(?P<name>[\w$]+)\s*(?P<dims>(?:\[\d*\])*)"
)
_CONSTANT = re.compile(
    r"(?:\.(?:visible|weak)\s+)?\.(?:global|const)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>[a-z]\d+)\s+"
    r"(?P<name>[\w$]+)\s*(?P<dims>(?:\[\d*\])*)\s*(?:=\s*\{?(?P<values>[^;}]*)\}?)?\s*;"
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.([a-z]\d+)\s+"
    r"(?:\.ptr\s+)?(?:\.(?:global|const|shared|local)\s+)?(?:\.align\s+\d+\s+)?([\w$]+)(?:\[(\d+)\])?"
)


def declare_variable(kernel: Kernel, match: re.Match[str], name: str) -> None:
    element = ptx_type(match["type"])
    assert element is not None
    count = 1
    for dim in re.findall(r"\[(\d*)\]", match["dims"]):
        count *= int(dim or 0)
    size, align = element.bytes * count, int(match["align"] or element.bytes)
    if match["space"] in ("local", "param"):
        kernel.local[name] = Variable(round_up(kernel.local_bytes, align), size)
        kernel.local_bytes = kernel.local[name].offset + size
    elif match["extern"] or size == 0:
        kernel.dynamic_shared.append(name)
        kernel.dynamic_shared_align = max(kernel.dynamic_shared_align, align)
    else:
        kernel.shared[name] = Variable(round_up(kernel.static_shared_bytes, align), size)
        kernel.static_shared_bytes = kernel.shared[name].offset + size


def parse_parameters(text: str) -> tuple[list[Parameter], int]:
    parameters, offset = [], 0
    for item in split_operands(text):
        match = _PARAMETER.match(item)
        element = ptx_type(match[2]) if match else None
        if match is None or element is None:
            raise ParseError(f"cannot parse the kernel parameter {item!r}")
        size = element.bytes * int(match[4] or 1)
        offset = round_up(offset, int(match[1] or element.bytes))
        parameters.append(Parameter(match[3], offset, size))
        offset += size
    return parameters, offset


def parse_constants(text: str) -> dict[str, bytes]:
    """Module-scope .global and .const variables with numeric initial values, as the bytes they start with."""
    found = {}
    for match in _CONSTANT.finditer(text):
        element = ptx_type(match["type"])
        if element is None:
            continue
        dims = [int(d) for d in re.findall(r"\[(\d+)\]", match["dims"])]
        values = [v.strip() for v in (match["values"] or "").split(",") if v.strip()]
        if not all(re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?|0[fFdD][0-9a-fA-F]+", v) for v in values):
            continue
        data = b"".join(_constant_bytes(v, element.bytes) for v in values)
        size = element.bytes
        for dim in dims:
            size *= dim
        found[match["name"]] = data.ljust(max(size, len(data)), b"\0")
    return found


def _constant_bytes(value: str, size: int) -> bytes:
    number = int(value[2:], 16) if value[:2].lower() in ("0f", "0d") else int(value.rstrip("U"), 0)
    return struct.pack("<Q", number & 0xFFFF_FFFF_FFFF_FFFF)[:size]


def block_shape(head: str, directive: str) -> tuple[int, int, int] | None:
    match = re.search(rf"\.{directive}\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", head)
    if match is None:
        return None
    return int(match[1]), int(match[2] or 1), int(match[3] or 1)


def number(head: str, directive: str) -> int | None:
    match = re.search(rf"\.{directive}\s+(\d+)", head)
    return int(match[1]) if match else None
