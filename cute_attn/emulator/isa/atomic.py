"""atom and red: read-modify-write of global and shared memory, scalar and vector (PTX ISA, "atom" and "red").

Lanes that hit one address in an instruction are served in order of lane, so atom returns what a sequential loop over
the lanes would, and a sum of floats is rounded after each addend. Vectors and packed types are atomic element by
element. f32 sums in global memory flush subnormal numbers, those in shared memory do not.

Somebody may loop until an atom finds another value: lanes whose atom changed nothing in memory yield.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..access import active, global_elements, require_written, shared_elements, split_generic
from ..codegen import BlockBuilder
from ..errors import OutOfBounds, UnknownInstruction
from ..formats import bf16_to_f32, f32_to_bf16
from ..memory import Array
from ..module import Instruction
from ..registry import emits, helper, instruction_type
from ..types import PtxType
from ..wave import Group
from .floating import flush
from .load_store import address_expression, join_lanes, state_space

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

Step = Callable[[Array, Array], Array]

_DTYPES = {"bf16": "uint16", "b128": "complex128"}


def element_dtype(element: str) -> Any:
    """numpy dtype of an element type in memory."""
    kinds = {"b": "uint", "u": "uint", "s": "int", "f": "float"}
    return np.dtype(_DTYPES.get(element) or kinds[element[0]] + element[1:])


def _in_f32(ufunc: np.ufunc) -> Step:
    return lambda old, value: f32_to_bf16(ufunc(bf16_to_f32(old), bf16_to_f32(value)))


_UFUNCS = {"add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_ZERO, _ONE = np.uint32(0), np.uint32(1)
_STEPS: dict[str, Step] = {
    "inc": lambda old, limit: np.where(old >= limit, _ZERO, old + _ONE),
    "dec": lambda old, limit: np.where((old == _ZERO) | (old > limit), limit, old - _ONE),
    "exch": lambda old, value: value,
}


def reduction_step(name: str, element: str, flushed: bool) -> Step:
    """(memory, operand) -> memory. A ufunc where there is one for it."""
    if name in _STEPS:
        return _STEPS[name]
    floating = element in ("bf16", "f16", "f32", "f64")
    smaller_larger = {"min": np.fmin, "max": np.fmax} if floating else {"min": np.minimum, "max": np.maximum}
    ufunc = {**_UFUNCS, **smaller_larger}[name]
    if element == "bf16":
        return _in_f32(ufunc)
    if flushed:
        return lambda old, value: flush(flush(old) + flush(value))
    return ufunc


def _has_tiny(values: Array) -> bool:
    """Whether sums of these may be subnormal: above 2^-102, bits of f32 numbers end above the smallest normal one."""
    magnitude = np.abs(values)
    return bool(((magnitude < np.float32(2.0**-102)) & (magnitude > 0)).any())


def _same_bits(a: Array, b: Array) -> Array:
    if a.dtype != np.complex128:
        return a == b
    return (np.ascontiguousarray(a).view(np.uint64) == np.ascontiguousarray(b).view(np.uint64)).reshape(-1, 2).all(1)


def in_order(view: Array, where: Array, operand: Array, step: Step) -> Array:
    """Applies `operand[n]` to `view[where[n]]` for n = 0, 1, ...; the old values.

    Elements are dealt with in rounds: the first lane of every address, then the second, and so on.
    """
    order = np.argsort(where, kind="stable")
    ordered = where[order]
    is_first = np.ones(ordered.size, bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(is_first)
    if starts.size == ordered.size:
        old = view[where]
        view[where] = step(old, operand)
        return old
    if starts.size == 1 and isinstance(step, np.ufunc):
        running = step.accumulate(np.concatenate([view[where[:1]], operand]), dtype=view.dtype)
        view[where[0]] = running[-1]
        return running[:-1]
    rank = np.arange(ordered.size) - np.repeat(starts, np.diff(np.append(starts, ordered.size)))
    rounds = np.split(order[np.argsort(rank, kind="stable")], np.cumsum(np.bincount(rank))[:-1])
    olds = np.empty(where.size, view.dtype)
    for lanes in rounds:
        at = where[lanes]
        olds[lanes] = old = view[at]
        view[at] = step(old, operand[lanes])
    return olds


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
            old = _compare_and_swap(view, where, operand, _elements(group, (swap,), positions, view.dtype))
        else:
            flushed = window == "global" and name == "add" and element == "f32"
            step = reduction_step(name, element, flushed and (_has_tiny(operand) or _has_tiny(before)))
            old = in_order(view, where, operand, step)
        at = slice(None) if positions is None else positions
        olds[:, at] = old.view(values[0].dtype).reshape(lanes.size, len(values)).T
        idle[at] = _same_bits(view[where], before).reshape(lanes.size, -1).all(1)
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


def _compare_and_swap(view: Array, where: Array, expected: Array, new: Array) -> Array:
    """cas takes two operands: the rounds run over positions, and each position knows both."""
    olds = np.empty_like(expected)

    def step(old: Array, lanes: Array) -> Array:
        olds[lanes] = old
        return np.where(_same_bits(old, expected[lanes]), new[lanes], old)

    in_order(view, where, np.arange(where.size), step)
    return olds
