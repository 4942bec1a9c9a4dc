"""mov, with vector packing and unpacking, and cvta between the address windows."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import registry
from ..codegen import BlockBuilder
from ..errors import UnknownInstruction
from ..memory import CLUSTER_SHIFT, LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW, Array
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
    if source in b.kernel.arguments:
        raise UnknownInstruction(i.text)  # its address would be one in the kernel's own parameter space
    if kind.bits == 128 and (source.startswith("{") or dest.startswith("{")):
        _move_pair(b, dest, source)
    elif source.startswith("{"):
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


def _move_pair(b: BlockBuilder, dest: str, source: str) -> None:
    """b128 from and to two b64."""
    if source.startswith("{"):
        low, high = (b.read(element, "uint64") for element in b.vector(source))
        b.write(dest, f"join_pair(G, {low}, {high})", "complex128")
        return
    halves = b.assign(f"split_pair(G, {b.read(source, 'complex128')})")
    for n, element in enumerate(b.vector(dest)):
        b.write(element, f"{halves}[{n}]", "uint64")


@emits("cvta", types="u32 u64", modifiers="to global shared shared::cta shared::cluster local param param::entry const")
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


@emits("isspacep.global", "isspacep.const", "isspacep.local", "isspacep.param", "isspacep.shared", modifiers="")
@emits("isspacep.shared::cta", "isspacep.shared::cluster", "isspacep.param::entry", modifiers="")
def isspacep(b: BlockBuilder, i: Instruction) -> None:
    """Constants live among the global addresses, so they are in both spaces."""
    address = b.read(i.operands[1], "uint64")
    window = _WINDOWS.get(i.parts[1].split("@")[0])
    if i.parts[1] in ("shared", "shared@cta"):
        b.write(i.operands[0], f"in_own_shared(G, {address})", "bool")
    elif window is None:
        b.write(i.operands[0], f"{address} < {b.constant(SHARED_WINDOW, 'uint64')}", "bool")
    else:
        b.write(
            i.operands[0], f"({address} & {b.constant(7 << 56, 'uint64')}) == {b.constant(window, 'uint64')}", "bool"
        )


@helper
def join_pair(group: Group, low: Any, high: Any) -> Array:
    pairs = np.empty((group.size, 2), np.uint64)
    pairs[:, 0], pairs[:, 1] = low, high
    return pairs.view(np.complex128).reshape(-1)


@helper
def split_pair(group: Group, value: Any) -> Array:
    """[2, lanes]"""
    return np.ascontiguousarray(group.spread(value).view(np.uint64).reshape(-1, 2).T)


@helper
def in_own_shared(group: Group, address: Any) -> Any:
    """Whether generic addresses lie in the shared memory of the lane's own CTA."""
    offset = address - np.uint64(SHARED_WINDOW)
    cta = offset >> np.uint64(CLUSTER_SHIFT)
    own = (group.cta % group.wave.cluster_size + 1).astype(np.uint64)
    return (cta == np.uint64(0)) | (cta == own)


@helper
def special(group: Group, name: str) -> Any:
    return registry.SPECIALS[name](group)


@helper
def constant_address(group: Group, name: str) -> np.uint64:
    return np.uint64(group.wave.constants[name])
