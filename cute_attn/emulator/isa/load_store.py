"""ld and st: global, shared, local, param, const and generic, scalar and vector, with sign or zero extension.

Cache operators and eviction hints change nothing. A vector access is one element of its whole size, so its alignment
and bounds are those of the whole; one of 32 bytes (.v8.b32, .v4.b64 in global memory, sm_100 and later) moves as two.

A load that may be part of a loop that polls (acquire, relaxed, volatile) ends its block: lanes that find the same
value at the same address as the last time yield.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ..access import (
    active,
    global_elements,
    local_elements,
    position_of,
    require_written,
    shared_elements,
    split_generic,
)
from ..codegen import BlockBuilder
from ..errors import InvalidOperand, OutOfBounds, UnknownInstruction
from ..memory import Array
from ..module import Instruction
from ..registry import emits, helper, instruction_type
from ..types import PtxType
from ..wave import Group

_SPACE_NAMES = "global shared shared::cta shared::cluster local param param::entry const"
_VECTORS = "v2 v4 v8"
_HINTS = """
    ca cg cs lu cv wb wt volatile relaxed weak acquire release cta cluster gpu sys mmio
    L1::evict_normal L1::evict_unchanged L1::evict_first L1::evict_last L1::no_allocate
    L2::cache_hint L2::64B L2::128B L2::256B L2::evict_normal L2::evict_first L2::evict_last
"""
_SPACES = ("global", "shared", "local", "param", "const")


def address_expression(b: BlockBuilder, operand: str, dtype: str) -> str:
    """The address "[%r1+8]" as an expression of `dtype`."""
    match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", operand)
    if match is None:
        raise UnknownInstruction(b.instruction.text)
    base = b.read(match[1], dtype)
    if match[3] is None:
        return base
    offset = b.literal(match[3])
    if offset is None:
        raise UnknownInstruction(b.instruction.text)
    offset = -offset if match[2] == "-" else offset
    return base if offset == 0 else f"{base} + {b.constant(offset, dtype)}"


def state_space(i: Instruction) -> str:
    """Name of the instruction's state space, "generic" if it names none."""
    for part in i.parts[1:]:
        if (space := part.split("@")[0]) in _SPACES:
            return space
    return "generic"


def _type(i: Instruction) -> PtxType:
    kind = instruction_type(i.opcode)
    if kind is None or kind.bits == 1:
        raise UnknownInstruction(i.opcode)
    return kind


def _vector(b: BlockBuilder, i: Instruction, operand: str, kind: PtxType, space: str) -> list[str]:
    """The registers of a scalar or vector operand, as many as the instruction says."""
    registers = b.vector(operand)
    count = next((int(part[1:]) for part in i.parts if part in _VECTORS.split()), 1)
    nbytes = count * kind.bytes
    if len(registers) != count or nbytes > 32 or (nbytes == 32 and space != "global"):
        raise UnknownInstruction(i.text)
    return registers


_LOAD_MODIFIERS = f"{_SPACE_NAMES} {_VECTORS} {_HINTS} nc"


@emits("ld", "ldu", modifiers=_LOAD_MODIFIERS)
def load(b: BlockBuilder, i: Instruction) -> None:
    _load(b, i)


@emits("ld.acquire", "ld.relaxed", "ld.volatile", "ld.mmio", modifiers=_LOAD_MODIFIERS, ends_block=True)
def polling_load(b: BlockBuilder, i: Instruction) -> None:
    b.take_guard()
    address, values = _load(b, i)
    if not address:
        raise UnknownInstruction(i.text)
    b.finish_yielding(b.checked(f"seen_before(G, {address}, {values}, {b.mask}, {i.index})"))


def _load(b: BlockBuilder, i: Instruction) -> tuple[str, str]:
    """Emits the load; (address, name of the loaded values)."""
    kind = _type(i)
    space = state_space(i)
    dests = _vector(b, i, i.operands[0], kind, space)
    if space == "param" and (name := re.match(r"\[\s*([\w$]+)", i.operands[1])) and not b.is_register(name[1]):
        if name[1] not in b.kernel.local:
            _load_parameters(b, i, dests, kind, name[1])
            return "", ""
        space = "local"
    dtype = "uint32" if space in ("shared", "local") else "uint64"
    if space == "const":
        space = "generic"
    address = b.assign(address_expression(b, i.operands[1], dtype))
    values = b.checked(f"load_{space}(G, {address}, {kind.bytes}, {len(dests)}, {b.mask}, {i.index})")
    for n, dest in enumerate(dests):
        item = f"{values}[{n}]" if kind.kind != "s" else f"{values}[{n}].view({kind.numpy})"
        b.write(dest, item, kind.numpy if kind.kind == "s" else kind.carrier)
    return address, values


def _load_parameters(b: BlockBuilder, i: Instruction, dests: list[str], kind: PtxType, name: str) -> None:
    base = b.kernel.parameter_offset(name)
    offset = re.search(r"\+\s*(\w+)", i.operands[1])
    if base is None:
        raise UnknownInstruction(i.text)
    start = base + (int(offset[1], 0) if offset else 0)
    for n, dest in enumerate(dests):
        b.write(dest, f"parameter(G, {start + n * kind.bytes}, {kind.numpy})", kind.numpy)


@emits("st", modifiers=f"{_SPACE_NAMES} {_VECTORS} {_HINTS}")
def store(b: BlockBuilder, i: Instruction) -> None:
    kind = _type(i)
    space = state_space(i)
    if space == "param" and (name := re.match(r"\[\s*([\w$]+)", i.operands[0])) and name[1] in b.kernel.local:
        space = "local"  # an argument of a call
    if space in ("param", "const"):
        raise UnknownInstruction(i.opcode)
    dtype = "uint32" if space in ("shared", "local") else "uint64"
    address = address_expression(b, i.operands[0], dtype)
    values = [b.read(o, kind.carrier) for o in _vector(b, i, i.operands[1], kind, space)]
    b.effect(f"store_{space}(G, {address}, {kind.bytes}, ({', '.join(values)},), {b.mask}, {i.index})")


@emits("st.bulk", modifiers="weak shared::cta")
def store_bulk(b: BlockBuilder, i: Instruction) -> None:
    """st.bulk.shared::cta [a], size, 0: zeros, a multiple of 8 bytes (PTX ISA, "st.bulk")."""
    if b.literal(i.operands[2]) != 0 or state_space(i) != "shared":
        raise UnknownInstruction(i.text)
    address = b.assign(address_expression(b, i.operands[0], "uint32"))
    b.effect(f"store_zeros(G, {address}, {b.read(i.operands[1], 'uint64')}, {b.mask}, {i.index})")


# ---- helpers


@helper
def parameter(group: Group, offset: int, dtype: Any) -> Any:
    size = np.dtype(dtype).itemsize
    return group.wave.parameters[offset : offset + size].view(dtype)[0]


def as_columns(elements: Array, size: int, count: int) -> Any:
    """[n] elements of size * count bytes -> [count][n] of `size` bytes each."""
    if count == 1:
        return elements[None]
    return np.ascontiguousarray(elements.view(f"uint{8 * size}").reshape(-1, count).T)


def scatter_lanes(group: Group, columns: Any, positions: Array | None) -> Any:
    """Loaded values back in the lanes that asked; the others get zeros, which the guard then ignores."""
    if positions is None:
        return columns
    full = np.zeros((len(columns), group.size), columns.dtype)
    full[:, positions] = columns
    return full


def join_lanes(group: Group, values: tuple[Any, ...], size: int, positions: Array | None, unit: Any) -> Array:
    """The registers of the lanes that take part in memory order, lane by lane: a vector in elements of `unit`."""
    picked = [v if v.ndim == 0 or positions is None else v[positions] for v in values]
    count = group.size if positions is None else positions.size
    if len(values) == 1:
        return np.broadcast_to(picked[0], (count,))
    joined = np.empty((count, len(values)), f"uint{8 * size}")
    for n, value in enumerate(picked):
        joined[:, n] = value
    return joined.reshape(-1).view(unit)


@helper
def load_global(group: Group, address: Any, size: int, count: int, mask: Any, index: int) -> Any:
    total = size * count
    if address.ndim == 0 and mask is None:
        # The same address in all lanes: one element, and the result stays uniform.
        elements = global_elements(group, np.atleast_1d(address), total, None, index, "read")
        return as_columns(_take_global(group, elements, total), size, count)[:, 0]
    lanes, positions = active(group, address, mask)
    elements = global_elements(group, lanes, total, positions, index, "read")
    return scatter_lanes(group, as_columns(_take_global(group, elements, total), size, count), positions)


def _take_global(group: Group, elements: Array, total: int) -> Array:
    views = group.wave.memory.views
    if total == 32:
        return views[16].take(_halves(elements))
    return views[total].take(elements)


def _halves(elements: Array) -> Array:
    """Numbers of the two 16-byte elements of each of 32 bytes."""
    return (2 * elements[:, None] + np.arange(2)).reshape(-1)


@helper
def store_global(group: Group, address: Any, size: int, values: tuple[Any, ...], mask: Any, index: int) -> None:
    total = size * len(values)
    lanes, positions = active(group, address, mask)
    elements = global_elements(group, lanes, total, positions, index, "write")
    if total == 32:
        elements = _halves(elements)
    view = group.wave.memory.views[min(total, 16)]
    view[elements] = join_lanes(group, values, size, positions, view.dtype)


@helper
def load_shared(group: Group, address: Any, size: int, count: int, mask: Any, index: int) -> Any:
    total = size * count
    lanes, positions = active(group, address, mask)
    elements, low, high = shared_elements(group, lanes, total, positions, index, "read")
    if (races := group.wave.races) is not None:
        races.read(group, elements, total, positions, index)
    require_written(group, elements, total, low, high, positions, index)
    return scatter_lanes(group, as_columns(group.wave.shared.views[total].take(elements), size, count), positions)


@helper
def store_shared(group: Group, address: Any, size: int, values: tuple[Any, ...], mask: Any, index: int) -> None:
    total = size * len(values)
    lanes, positions = active(group, address, mask)
    elements, low, high = shared_elements(group, lanes, total, positions, index, "write")
    if elements.size:
        view = group.wave.shared.views[total]
        content = join_lanes(group, values, size, positions, view.dtype)
        if (races := group.wave.races) is not None:
            races.write(group, elements, total, positions, index, content)
        view[elements] = content
        group.wave.shared.mark(elements, total, low, high)


@helper
def store_zeros(group: Group, address: Any, size: Any, mask: Any, index: int) -> None:
    """Zeros in each lane's `size` bytes, as so many elements of 8."""
    lanes, positions = active(group, address, mask)
    positions = np.arange(group.size) if positions is None else positions
    nbytes = group.spread(size)[positions].astype(np.int64)
    if (odd := nbytes % 8 != 0).any():
        n = int(np.argmax(odd))
        group.fail(InvalidOperand, index, int(positions[n]), f"st.bulk of {int(nbytes[n])} bytes: no multiple of 8")
    words = nbytes // 8
    number = np.arange(words.sum()) - np.repeat(words.cumsum() - words, words)
    places = np.repeat(lanes, words) + (8 * number).astype(np.uint32)
    owners = np.repeat(positions, words)
    elements, low, high = shared_elements(group, places, 8, owners, index, "write")
    if elements.size:
        content = np.zeros(elements.size, np.uint64)
        if (races := group.wave.races) is not None:
            races.write(group, elements, 8, owners, index, content)
        group.wave.shared.views[8][elements] = content
        group.wave.shared.mark(elements, 8, low, high)


@helper
def load_local(group: Group, address: Any, size: int, count: int, mask: Any, index: int) -> Any:
    total = size * count
    lanes, positions = active(group, address, mask)
    elements = local_elements(group, lanes, total, positions, index, "read")
    return scatter_lanes(group, as_columns(group.wave.local.views[total].take(elements), size, count), positions)


@helper
def store_local(group: Group, address: Any, size: int, values: tuple[Any, ...], mask: Any, index: int) -> None:
    total = size * len(values)
    lanes, positions = active(group, address, mask)
    elements = local_elements(group, lanes, total, positions, index, "write")
    if elements.size:
        local = group.wave.local
        local.views[total][elements] = join_lanes(group, values, size, positions, local.views[total].dtype)
        local.mark(elements, total, int(lanes.min()), int(lanes.max()) + total)


@helper
def local_written(group: Group, address: Any, nbytes: int, mask: Any, index: int) -> Any:
    """Lanes whose bytes of local memory were all written, or that do not take part."""
    lanes, positions = active(group, address, mask)
    elements = local_elements(group, lanes, nbytes, positions, index, "read")
    local = group.wave.local
    if (
        not lanes.size
        or (bad := local.unwritten(elements, nbytes, int(lanes.min()), int(lanes.max()) + nbytes)) is None
    ):
        return np.True_
    written = np.ones(group.size, bool)
    written[slice(None) if positions is None else positions] = ~bad
    return written


@helper
def load_param(group: Group, address: Any, size: int, count: int, mask: Any, index: int) -> Any:
    """A parameter at a computed offset."""
    total = size * count
    lanes, positions = active(group, address, mask)
    if lanes.size and int(lanes.max()) + total > group.wave.kernel.parameter_bytes:
        bad = position_of(positions, int(np.argmax(lanes)))
        group.fail(OutOfBounds, index, bad, "read past the end of the kernel's parameters")
    window = lanes.astype(np.int64)[:, None] + np.arange(total)
    values = group.wave.parameters[window].view(f"uint{8 * size}")
    return scatter_lanes(group, np.ascontiguousarray(values.T), positions)


_LOADS = {"global": load_global, "shared": load_shared, "local": load_local, "param": load_param}
_STORES = {"global": store_global, "shared": store_shared, "local": store_local}


@helper
def load_generic(group: Group, address: Any, size: int, count: int, mask: Any, index: int) -> Any:
    pieces = split_generic(group, address, mask)
    if len(pieces) == 1:
        space, offset, inside = pieces[0]
        return _LOADS[space](group, offset, size, count, inside, index)
    result = np.zeros((count, group.size), f"uint{8 * size}")
    for space, offset, inside in pieces:
        result[:, inside] = _LOADS[space](group, offset, size, count, inside, index)[:, inside]
    return result


@helper
def store_generic(group: Group, address: Any, size: int, values: tuple[Any, ...], mask: Any, index: int) -> None:
    for space, offset, inside in split_generic(group, address, mask):
        if space == "param":
            group.fail(OutOfBounds, index, 0, "kernel parameters cannot be written")
        _STORES[space](group, offset, size, values, inside, index)


@helper
def seen_before(group: Group, address: Any, values: Any, mask: Any, index: int) -> Array:
    """Lanes that loaded the same from the same address when they were here last; those that the guard skips do not."""
    last: dict[int, tuple[Array, Array]] = group.wave.state.setdefault("polled", {})
    shape = (len(values), group.wave.lanes)
    if index not in last:
        last[index] = np.zeros(group.wave.lanes, address.dtype), np.zeros(shape, values.dtype)
    addresses, loaded = last[index]
    now = np.broadcast_to(values.reshape(len(values), -1), (len(values), group.size))
    same = (addresses[group.lanes] == address) & (loaded[:, group.lanes] == now).all(0)
    addresses[group.lanes], loaded[:, group.lanes] = address, now
    return same if mask is None else same & mask
