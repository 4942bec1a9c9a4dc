"""Calls that the parser does not expand: the functions of the CUDA runtime library that programs print and assert with.

`vprintf` formats as C's printf does and writes to standard output, in order of lane. Its arguments lie in local memory,
one after another, each aligned to its size.
"""

from __future__ import annotations

import re
import sys
from typing import Any, NoReturn

import numpy as np

from ..codegen import BlockBuilder
from ..errors import InvalidOperand, UnknownInstruction
from ..memory import Array
from ..module import Instruction
from ..ptx_text import split_operands
from ..registry import emits, helper
from ..wave import Group
from .load_store import load_generic


@emits("call", modifiers="uni")
def call(b: BlockBuilder, i: Instruction) -> None:
    """call (result), function, (arguments), where all are variables in .param space."""
    operands = list(i.operands)
    results = split_operands(operands.pop(0)[1:-1]) if operands[0].startswith("(") else []
    arguments = split_operands(operands[1][1:-1]) if len(operands) > 1 else []
    variables = [b.kernel.local[name] for name in (*arguments, *results)]
    values = [
        b.checked(f"load_local(G, {b.constant(v.offset, 'uint32')}, {v.size}, 1, {b.mask}, {i.index})[0]")
        for v in variables[: len(arguments)]
    ]
    if operands[0] == "vprintf" and len(values) == 2 and len(results) == 1:
        count = b.checked(f"device_printf(G, {values[0]}, {values[1]}, {b.mask}, {i.index})")
        offset = b.constant(variables[2].offset, "uint32")
        b.effect(f"store_local(G, {offset}, 4, ({count},), {b.mask}, {i.index})")
    elif operands[0] == "__assertfail" and len(values) == 5:
        b.effect(f"device_assert(G, {', '.join(values[:4])}, {b.mask}, {i.index})")
    else:
        raise UnknownInstruction(i.text)


@helper
def device_printf(group: Group, text: Any, arguments: Any, mask: Any, index: int) -> Array:
    """Prints, and gives the number of arguments."""
    text, arguments = group.spread(text), group.spread(arguments)
    taking = group.taking(mask)
    counts = np.zeros(group.size, np.uint32)
    printed: list[str] = [""] * group.size
    for pointer in np.unique(text[taking]):
        lanes = taking & (text == pointer)
        pieces = _pieces(_string(group, pointer, index))
        columns = _columns(group, pieces, arguments, lanes, index)
        for lane in np.flatnonzero(lanes):
            values = [column[lane] for column in columns]
            printed[lane] = _formatted(group, pieces, values, index)
        counts[lanes] = len(columns)
    sys.stdout.write("".join(printed))
    return counts


_CONVERSION = re.compile(
    r"%(?P<flags>[-+ #0]*)(?P<width>\*|\d+)?(?:\.(?P<precision>\*|\d*))?(?P<length>hh|h|ll|l|j|z|t|L)?"
    r"(?P<kind>[diouxXcspfFeEgGaA%])"
)


def _pieces(text: str) -> list[str | re.Match[str]]:
    """Literal text and conversions, in order."""
    pieces: list[str | re.Match[str]] = []
    position = 0
    for match in _CONVERSION.finditer(text):
        pieces += [text[position : match.start()], match]
        position = match.end()
    return [*pieces, text[position:]]


def _columns(group: Group, pieces: list[Any], arguments: Array, lanes: Array, index: int) -> list[Array]:
    """The arguments of the conversions, [lanes of the group] each; a `*` takes one too."""
    columns, offset = [], 0
    for piece in pieces:
        if isinstance(piece, str) or piece["kind"] == "%":
            continue
        kind, length = piece["kind"], piece["length"] or ""
        stars = [piece["width"], piece["precision"]].count("*")
        if kind in "fFeEgGaA":
            dtype: Any = np.float64
        elif kind in "sp" or length in ("l", "ll", "j", "z", "t"):
            dtype = np.int64 if kind in "di" else np.uint64
        else:
            narrow = {"hh": "8", "h": "16"}.get(length, "32")
            dtype = np.dtype(f"{'int' if kind in 'di' else 'uint'}{narrow}").type
        for each in [np.int32] * stars + [dtype]:
            size = max(np.dtype(each).itemsize, 4)
            offset = -(-offset // size) * size
            raw = load_generic(group, arguments + np.uint64(offset), size, 1, lanes, index)[0]
            columns.append(raw.view(each)[:: raw.dtype.itemsize // np.dtype(each).itemsize])
            offset += size
    return columns


def _formatted(group: Group, pieces: list[Any], values: list[Any], index: int) -> str:
    remaining = iter(values)
    result = []
    for piece in pieces:
        if isinstance(piece, str):
            result.append(piece)
            continue
        kind = piece["kind"]
        if kind == "%":
            result.append("%")
            continue
        width = str(next(remaining)) if piece["width"] == "*" else piece["width"] or ""
        precision = str(next(remaining)) if piece["precision"] == "*" else piece["precision"]
        value: Any = next(remaining).item()
        point = "" if precision is None else f".{precision}"
        if kind == "s":
            value = _string(group, value, index)
        elif kind == "p":
            kind, value = "s", f"{value:#x}"
        elif kind in "aA":
            kind, value = "s", value.hex() if kind == "a" else value.hex().upper()
        result.append(f"%{piece['flags']}{width}{point}{kind}" % value)
    return "".join(result)


def _string(group: Group, pointer: Any, index: int) -> str:
    """The bytes at a global address up to the first zero."""
    memory = group.wave.memory
    address, found = np.array([pointer], np.uint64), bytearray()
    while memory.outside(address, 1) is None:
        byte = int(memory.views[1][memory.index(address, 1)][0])
        if byte == 0:
            return found.decode("utf-8", "replace")
        found.append(byte)
        address += np.uint64(1)
    group.fail(InvalidOperand, index, 0, f"no string at {int(pointer):#x}: it does not end inside a tensor or constant")


@helper
def device_assert(group: Group, message: Any, file: Any, line: Any, function: Any, mask: Any, index: int) -> None:
    taking = group.taking(mask)
    if taking.any():
        _report(group, [group.spread(v) for v in (message, file, line, function)], int(np.argmax(taking)), index)


def _report(group: Group, values: list[Array], position: int, index: int) -> NoReturn:
    message, file, function = (_string(group, values[n][position], index) for n in (0, 1, 3))
    what = f"assertion failed: {message}, at {file}:{int(values[2][position])} in {function}"
    group.fail(InvalidOperand, index, position, what)
