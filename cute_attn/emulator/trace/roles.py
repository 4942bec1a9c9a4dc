"""What warps are called: after a method of the kernel in which not all warps spend their time, or after their work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..module import Kernel
from .source import Definition, Function, kernel_definition

Roles = Mapping[int | tuple[int, int], str] | Callable[[int], str | None]
"""Names of warps: by number, by half-open range of numbers, or by a function; those left out are inferred."""

_RARER = 10
"""How many times as much time as some other warp a warp spends in a method that is its role."""

_ISSUES = {
    "wgmma": "consumer (wgmma)",
    "mma.sync": "mma",
    "TMA load": "producer (TMA)",
    "cp.async": "producer (cp.async)",
    "TMA store": "store (TMA)",
    "TMA reduce": "store (TMA)",
}
"""Roles by the work that a warp does, the most telling first."""


@dataclass
class Activity:
    """What a warp did: units of time by function, and the kinds of work in which it took part."""

    functions: Counter[Function]
    works: set[str]


def _given(roles: Roles | None, warp: int) -> str | None:
    if roles is None:
        return None
    if callable(roles):
        return roles(warp)
    for key, name in roles.items():
        if key == warp or (isinstance(key, tuple) and key[0] <= warp < key[1]):
            return name
    return None


def _is_role(function: Function, entry: Definition) -> bool:
    """Whether it is a method that the kernel calls."""
    kernel = entry.function
    return (function.file, function.owner) == (kernel.file, kernel.owner) and function.name in entry.calls


def name_roles(warps: Mapping[int, Activity], kernel: Kernel, roles: Roles | None = None) -> dict[int, str]:
    """The roles of a CTA's warps, by number."""
    entry = kernel_definition(kernel)

    def is_special(function: Function, spent: int) -> bool:
        return min(a.functions[function] for a in warps.values()) * _RARER < spent

    names = {}
    for warp, activity in warps.items():
        own = {f: n for f, n in activity.functions.items() if entry and _is_role(f, entry) and is_special(f, n)}
        role = max(own, key=own.__getitem__).name if own else ""
        kinds = {w.split()[0] if w.startswith("wgmma") else w for w in activity.works}
        inferred = next((role for kind, role in _ISSUES.items() if kind in kinds), "other")
        names[warp] = _given(roles, warp) or role or inferred
    return names
