"""atom and red: read-modify-write of global and shared memory, scalar and vector (PTX ISA, "atom" and "red").

Lanes that hit one address in an instruction are served in order of lane, so atom returns what a sequential loop over
the lanes would, and a sum of floats is rounded after each addend. Vectors and packed types are atomic element by
element. f32 sums in global memory flush subnormal numbers, those in shared memory do not.

Somebody may loop until an atom finds another value: lanes whose atom changed nothing in memory yield.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..access import active, global_elements, require_written, shared_elements, split_generic
from ..codegen import BlockBuilder
from ..errors import OutOfBounds, UnknownInstruction
from ..memory import Array
from ..module import Instruction
from ..registry import emits, helper, instruction_type
from ..types import PtxType
from ..wave import Group
from .load_store import address_expression, join_lanes, state_space
from .read_modify_write import compare_and_swap, element_dtype, has_tiny, in_order, reduction_step, same_bits

_SPACES = "global shared shared::cta shared::cluster"
_ORDER = "relaxed acquire release acq_rel cta cluster gpu sys L2::cache_hint"
_OPERATIONS = {
    "add": "u32 s32 u64 s64 f32 f64",
    "add.noftz": "f16 f16x2 bf16 bf16x2",
    "min": "u32 s32 u64 s64",
    "max": "u32 s32 u64 s64",
    "inc": "u32",
    "dec": "u32",
    "and": "b32 b64",
    "or": "b32 b64",
    "xor": "b32 b64",
    "exch": "b32 b64 b128",
    "cas": "b16 b32 b64 b128",
}
"""Types of the scalar forms."""
_VECTORS = {
    "add": {"f32": "v2 v4"},
    "add.noftz": {"f16": "v2 v4 v8", "bf16": "v2 v4 v8", "f16x2": "v2 v4", "bf16x2": "v2 v4"},
}
"""Vector forms, in global memory; min.noftz and max.noftz exist as vectors only."""
_VECTORS["min.noftz"] = _VECTORS["max.noftz"] = _VECTORS["add.noftz"]


def _operation(i: Instruction, kind: PtxType, vector: str | None) -> str:
    """ "add", "cas" ...; raises UnknownInstruction for a combination that the ISA does not have."""
    names = [part for part in i.parts if part in _OPERATIONS]
    if len(names) != 1:
        raise UnknownInstruction(i.opcode)
    full = f"{names[0]}.noftz" if "noftz" in i.parts else names[0]
    if vector is None:
        known = kind.name in _OPERATIONS.get(full, "").split()
    else:
        known = vector in _VECTORS.get(full, {}).get(kind.name, "").split()
        known = known and state_space(i) in ("global", "generic")
    if not known:
        raise UnknownInstruction(i.opcode)
    return names[0]


@emits("atom", modifiers=f"{_SPACES} {_ORDER} add min max inc dec and or xor exch cas noftz v2 v4 v8", ends_block=True)
def atom(b: BlockBuilder, i: Instruction) -> None:
    """atom.op d, [a], b {, c} {, policy}"""
    b.take_guard()
    old, kind = _update(b, i, i.operands[1:])
    for n, dest in enumerate(b.vector(i.operands[0])):
        b.write(dest, f"{old}[0][{n}]", kind.carrier)
    b.finish_yielding(f"{old}[1]")


@emits("red", modifiers=f"{_SPACES} {_ORDER} add min max inc dec and or xor noftz v2 v4 v8")
def red(b: BlockBuilder, i: Instruction) -> None:
    """red.op [a], b {, policy}"""
    _update(b, i, i.operands)


def _update(b: BlockBuilder, i: Instruction, operands: tuple[str, ...]) -> tuple[str, PtxType]:
    """(name of what `atomic_update` returns, type of a register)"""
    kind = instruction_type(i.opcode)
    vectors = [part for part in i.parts if part in ("v2", "v4", "v8")]
    if kind is None or len(vectors) > 1:
        raise UnknownInstruction(i.opcode)
    name = _operation(i, kind, vectors[0] if vectors else None)
    space = state_space(i)
    address = address_expression(b, operands[0], "uint32" if space == "shared" else "uint64")
    values = [b.read(o, kind.carrier) for o in b.vector(operands[1])]
    if vectors and len(values) != int(vectors[0][1:]):
        raise UnknownInstruction(i.text)
    swap = b.read(operands[2], kind.carrier) if name == "cas" else "None"
    element = kind.name.removesuffix("x2")
    return (
        b.checked(
            f"atomic_update(G, {space!r}, {name!r}, {element!r}, {address}, ({', '.join(values)},), {swap}, "
            f"{b.mask}, {i.index})"
        ),
        kind,
    )


# ---- execution


@helper
def atomic_update(
    group: Group,
    space: str,
    name: str,
    element: str,
    address: Any,
    values: tuple[Any, ...],
    swap: Any,
    mask: Any,
    index: int,
) -> tuple[Array, Array]:
    """(old values [registers of the vector, lanes], whether memory is now what it was [lanes]).

    Lanes whose guard is off have zeros and False.
    """
    pieces = split_generic(group, address, mask) if space == "generic" else [(space, address, mask)]
    olds: Array = np.zeros((len(values), group.size), values[0].dtype)
    idle = np.zeros(group.size, bool)
    for window, offset, inside in pieces:
        if window not in ("global", "shared"):
            group.fail(OutOfBounds, index, 0, f"atomic operation on {window} memory")
        offset = offset.astype(np.uint32) if window == "shared" else offset
        lanes, positions = active(group, offset, inside)
        view, where = _place(group, window, lanes, positions, values, element_dtype(element), index)
        operand = _elements(group, values, positions, view.dtype)
        before = view[where]
        if name == "cas":
            old = compare_and_swap(view, where, operand, _elements(group, (swap,), positions, view.dtype))
        else:
            flushed = window == "global" and name == "add" and element == "f32"
            step = reduction_step(name, element, flushed and (has_tiny(operand) or has_tiny(before)))
            old = in_order(view, where, operand, step)
        at = slice(None) if positions is None else positions
        olds[:, at] = old.view(values[0].dtype).reshape(lanes.size, len(values)).T
        idle[at] = same_bits(view[where], before).reshape(lanes.size, -1).all(1)
    return olds, idle


def _place(
    group: Group,
    space: str,
    lanes: Array,
    positions: Array | None,
    values: tuple[Any, ...],
    dtype: Any,
    index: int,
) -> tuple[Array, Array]:
    """(memory as elements of `dtype`, numbers of the elements of each lane one after another); checked."""
    total = values[0].dtype.itemsize * len(values)
    if space == "shared":
        elements, low, high = shared_elements(group, lanes, total, positions, index, "atomic access")
        if (races := group.wave.races) is not None:
            races.update(group, elements, total, positions, index)
        require_written(group, elements, total, low, high, positions, index)
        views = group.wave.shared.views
    else:
        elements = global_elements(group, lanes, total, positions, index, "atomic access")
        views = group.wave.memory.views
    count = total // dtype.itemsize
    where = (elements[:, None] * count + np.arange(count)).reshape(-1)
    return views[dtype.itemsize].view(dtype), where


def _elements(group: Group, values: tuple[Any, ...], positions: Array | None, dtype: Any) -> Array:
    """Operand registers of the lanes that take part as elements in memory order, lane by lane."""
    return np.ascontiguousarray(join_lanes(group, values, values[0].dtype.itemsize, positions, dtype)).view(dtype)
