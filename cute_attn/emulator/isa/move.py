"""mov, with vector packing and unpacking, and cvta between the address windows."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import registry
from ..codegen import BlockBuilder
from ..memory import LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW
from ..module import Instruction
from ..registry import emits, helper, instruction_type
from ..types import carrier_dtype
from ..wave import Group

_WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAMETER_WINDOW}


@emits("mov", modifiers="")
def mov(b: BlockBuilder, i: Instruction) -> None:
    kind = instruction_type(i.opcode)
    assert kind is not None
    dest, source = i.operands
    if source.startswith("{"):
        _pack(b, dest, b.vector(source), kind.bits)
    elif dest.startswith("{"):
        _unpack(b, b.vector(dest), source, kind.bits)
    elif b.guard is None and b.is_register(source):
        b.copy(dest, source)
    else:
        b.write(dest, b.read(source, kind.carrier), kind.carrier)


def _pack(b: BlockBuilder, dest: str, elements: list[str], bits: int) -> None:
    width = bits // len(elements)
    wide, narrow = carrier_dtype(bits), carrier_dtype(width)
    terms = []
    for n, element in enumerate(elements):
        term = f"{b.read(element, narrow)}.astype({wide})"
        terms.append(f"({term} << {b.constant(n * width, wide)})" if n else term)
    b.write(dest, " | ".join(terms), wide)


def _unpack(b: BlockBuilder, elements: list[str], source: str, bits: int) -> None:
    width = bits // len(elements)
    wide, narrow = carrier_dtype(bits), carrier_dtype(width)
    for n, element in enumerate(elements):
        if element != "_":
            value = b.read(source, wide)
            shifted = f"({value} >> {b.constant(n * width, wide)})" if n else value
            b.write(element, f"{shifted}.astype({narrow})", narrow)


@emits("cvta")
def cvta(b: BlockBuilder, i: Instruction) -> None:
    """Generic addresses of shared, local and parameter memory are offsets in windows; global ones are themselves.

    What `mov` gives for a variable or parameter is the offset.
    """
    parts = i.parts
    to_space = parts[1] == "to"
    space = parts[2] if to_space else parts[1]
    window = _WINDOWS.get(space.split("@")[0], 0)
    value = b.read(i.operands[1], "uint64")
    if window:
        value = f"{value} {'-' if to_space else '+'} {b.constant(window, 'uint64')}"
    b.write(i.operands[0], value, "uint64")


@emits("isspacep")
def isspacep(b: BlockBuilder, i: Instruction) -> None:
    address = b.read(i.operands[1], "uint64")
    window = _WINDOWS.get(i.parts[1].split("@")[0])
    if window is None:
        b.write(i.operands[0], f"{address} < {b.constant(SHARED_WINDOW, 'uint64')}", "bool")
    else:
        b.write(
            i.operands[0], f"({address} & {b.constant(7 << 56, 'uint64')}) == {b.constant(window, 'uint64')}", "bool"
        )


@helper
def special(group: Group, name: str) -> Any:
    return registry.SPECIALS[name](group)


@helper
def constant_address(group: Group, name: str) -> np.uint64:
    return np.uint64(group.wave.constants[name])
