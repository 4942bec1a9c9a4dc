"""What atomics and reductions do to elements of memory, one operand after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..formats import bf16_to_f32, f32_to_bf16
from ..memory import Array
from .floating import flush

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


def has_tiny(values: Array) -> bool:
    """Whether sums of these may be subnormal: above 2^-102, bits of f32 numbers end above the smallest normal one."""
    magnitude = np.abs(values)
    return bool(((magnitude < np.float32(2.0**-102)) & (magnitude > 0)).any())


def same_bits(a: Array, b: Array) -> Array:
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


def compare_and_swap(view: Array, where: Array, expected: Array, new: Array) -> Array:
    """cas takes two operands: the rounds run over positions, and each position knows both."""
    olds = np.empty_like(expected)

    def step(old: Array, lanes: Array) -> Array:
        olds[lanes] = old
        return np.where(same_bits(old, expected[lanes]), new[lanes], old)

    in_order(view, where, np.arange(where.size), step)
    return olds
