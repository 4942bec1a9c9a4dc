"""What an instruction family keeps per wave, such as the counts of its barriers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from .wave import Wave

S = TypeVar("S", bound="WaveState")


class WaveState:
    """Base of such state: one object of each subclass for a wave, made at its first use."""

    def __init__(self, wave: Wave) -> None:
        raise NotImplementedError

    @classmethod
    def of(cls: type[S], wave: Wave) -> S:
        """The wave's, made now if it has none yet."""
        found: S | None = cls.known(wave)
        if found is None:
            found = wave.state[cls] = cls(wave)
        return found

    @classmethod
    def known(cls: type[S], wave: Wave) -> S | None:
        """The wave's, if it has one."""
        return wave.state.get(cls)

    @classmethod
    def calling(cls, method: str) -> Callable[[Wave], Any]:
        """Calls a method of a wave's, if it has one: for the functions that `registry` lists, such as WAKERS."""

        def call(wave: Wave) -> Any:
            found = cls.known(wave)
            return [] if found is None else getattr(found, method)()

        return call
