"""How launches are run: an object that a launch takes, and the one that holds for a period of a thread's time."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from .device import MULTIPROCESSORS

if TYPE_CHECKING:
    from .trace import Recorder

__all__ = ["Settings", "current_settings", "settings"]


@dataclass(frozen=True)
class Settings:
    """How launches are run; the same results are right under all of them, but for rounding under `accumulation`.

    seed:                 order in which warps and CTAs are stepped, and when asynchronous work completes; None is the
                          fixed order, in which that is as late as the program's waits allow
    uninitialized_shared: a read of shared memory that nobody wrote is an "error", or gives "poison" (NaN), for programs
                          that load rows and never use them
    accumulation:         tensor cores sum in "float32", or as the "hardware" does (see `tensor_core`; slower)
    races:                look for accesses to shared memory that nothing orders (see `races`)
    multiprocessors:      how many the pretended device has, by which persistent kernels size their grid; None: as many
                          as suit, `device.MULTIPROCESSORS` for programs of others
    profile:              measure seconds per instruction family (slower)
    traffic:              count the bytes of global memory that instructions move, `LaunchRecord.traffic` (slower)
    trace:                record what warps do and wait for (see `trace`)
    """

    seed: int | None = None
    uninitialized_shared: Literal["error", "poison"] = "error"
    accumulation: Literal["float32", "hardware"] = "float32"
    races: bool = True
    multiprocessors: int | None = None
    profile: bool = False
    traffic: bool = False
    trace: Recorder | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for what a launch could not do, where it is asked for."""
        if self.seed is not None and not (isinstance(self.seed, Integral) and self.seed >= 0):
            raise ValueError(f"seed={self.seed!r}: a number from 0 on, or None for the fixed order")
        wanted = self.multiprocessors
        if wanted is not None and not (isinstance(wanted, Integral) and wanted > 0):
            raise ValueError(f"multiprocessors={wanted!r}: a positive number, or None for the usual one")
        for name, known in (("uninitialized_shared", ("error", "poison")), ("accumulation", ("float32", "hardware"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: one of {', '.join(map(repr, known))}")
        if self.trace is not None and not hasattr(self.trace, "begin"):
            raise ValueError(f"trace={self.trace!r}: a Recorder; emulator.trace(path) makes one and writes the file")

    @property
    def device_multiprocessors(self) -> int:
        """Of the pretended device."""
        return MULTIPROCESSORS if self.multiprocessors is None else self.multiprocessors


_USUAL = Settings()
_settings = contextvars.ContextVar("settings", default=_USUAL)


def current_settings() -> Settings:
    """The settings that a launch of this thread would run under now."""
    return _settings.get()


@contextlib.contextmanager
def settings(**changes: Any) -> Iterator[None]:
    """A period in which this thread's launches are run with some of the `Settings` changed."""
    token = _settings.set(dataclasses.replace(_settings.get(), **changes))
    try:
        yield
    finally:
        _settings.reset(token)
