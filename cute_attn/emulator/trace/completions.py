"""When what warps wait for was over, and what ended it."""

from __future__ import annotations

import numpy as np

from ..memory import Array
from .slices import Operation

_GROUPS_REMEMBERED = 32
"""Closed groups whose ends are kept: a wait that leaves more of them in flight is drawn to the end of a newer one."""


class Meetings:
    """Barriers of one kind: the latest arrival so far and whose it was, and the same of the last complete phase.

    Phases follow one another, so the latest arrival of all is that of the current phase. `operation` holds the copies
    that arrived last, by key.
    """

    def __init__(self, size: int) -> None:
        self.time = np.zeros(size, np.int64)
        self.by = np.full(size, -1)
        self.done = np.zeros(size, np.int64)
        self.done_by = np.full(size, -1)
        self.operation: dict[int, Operation] = {}
        self.done_operation: dict[int, Operation] = {}

    def arrive(self, keys: Array, times: Array, warps: Array) -> None:
        before = self.time[keys]
        np.maximum.at(self.time, keys, times)
        last = (times == self.time[keys]) & (times > before)
        self.by[keys[last]] = warps[last]
        if self.operation:
            for key in keys[last].tolist():
                self.operation.pop(key, None)

    def complete(self, keys: Array) -> None:
        self.done[keys], self.done_by[keys] = self.time[keys], self.by[keys]
        for key in keys.tolist():
            if key in self.operation:
                self.done_operation[key] = self.operation[key]
            else:
                self.done_operation.pop(key, None)


class Groups:
    """Commit groups of one kind, per lane: when all is complete that was issued, and when each closed group is."""

    def __init__(self, lanes: int) -> None:
        self.ready = np.zeros(lanes, np.int64)
        self.closed = np.zeros((_GROUPS_REMEMBERED, lanes), np.int64)

    def close(self, lanes: Array, numbers: Array) -> None:
        self.closed[numbers % _GROUPS_REMEMBERED, lanes] = self.ready[lanes]

    def end(self, lanes: Array, numbers: Array) -> Array:
        """When the lanes' groups of these numbers are complete; 0 for numbers below 0, which are before the first."""
        return np.where(numbers < 0, 0, self.closed[numbers % _GROUPS_REMEMBERED, lanes])
