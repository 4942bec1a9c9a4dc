"""How calls are timed against each other. Knows no clock: a `Timer` brings it.

Contenders take turns, a sample each in every round, and every second round goes backwards: what drifts during a run
(clocks, temperature, other users of the chip) meets all of them alike. Before every sample caches are cold. Before the
first round all calls run until the chip has been busy for a while, so that its clocks have settled.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Pace", "Timer", "Timing", "measure", "said"]


class Timer(Protocol):
    """A clock, and what has to be done to a device before it is read."""

    def ready(self, call: Callable[[], Any], capturable: bool) -> tuple[Callable[[], Any], str]:
        """Run ``call`` until nothing of it is first-time work. Returns what is to be timed, and how it is launched:
        "graph", a replay of its captured launches, or "stream", the call itself."""
        ...

    def cold(self) -> None:
        """Empty the device's caches."""
        ...

    def seconds(self, call: Callable[[], Any]) -> float:
        """Time of one ``call`` on the device."""
        ...


@dataclass(frozen=True)
class Timing:
    """Seconds of the samples of one call; ``launch`` as `Timer.ready` says."""

    median: float
    quartile_1: float
    quartile_3: float
    fastest: float
    samples: int
    launch: str

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        return (self.quartile_3 - self.quartile_1) / 2 / self.median


@dataclass(frozen=True)
class Pace:
    """How much is measured of one problem.

    seconds: of device time for all samples together; there are never fewer than `fewest` rounds, nor more than `most`
    warm_up: seconds for which the device is busy before the first sample
    """

    seconds: float = 4.0
    warm_up: float = 0.5
    fewest: int = 5
    most: int = 100


def measure(
    calls: Mapping[str, tuple[Callable[[], Any], bool]],
    timer: Timer,
    pace: Pace,
    after_sample: Callable[[], object] = lambda: None,
) -> dict[str, Timing | str]:
    """The timing of every call, or, of one that raised, what it said.

    calls: name to (call, whether it can be captured in a graph)
    """
    results: dict[str, Timing | str] = {}
    ready: dict[str, tuple[Callable[[], Any], str]] = {}

    def make_ready(name: str, call: Callable[[], Any], capturable: bool) -> None:
        try:
            ready[name] = timer.ready(call, capturable)
        except Exception as error:  # a peer that fails must not end the run
            results[name] = said(error)

    for name, (call, capturable) in calls.items():
        make_ready(name, call, capturable)
    samples: dict[str, list[float]] = {name: [] for name in ready}

    def sample(name: str) -> float:
        """One sample of a call, 0 if it raised; then it is left out from now on."""
        try:
            timer.cold()
            return timer.seconds(ready[name][0])
        except Exception as error:
            results[name] = said(error)
            del samples[name]
            return 0.0

    busy, once = 0.0, 0.0
    while samples and (not busy or busy < pace.warm_up):
        once = sum(sample(name) for name in list(samples))
        busy += once
        if not once:
            break
    rounds = min(max(math.floor(pace.seconds / once) if once else 0, pace.fewest), pace.most)
    for number in range(rounds):
        names = list(samples)
        for name in names if number % 2 == 0 else reversed(names):
            seconds = sample(name)
            if name in samples:
                samples[name].append(seconds)
            after_sample()
    for name, taken in samples.items():
        results[name] = _timing(taken, ready[name][1])
    return results


def said(error: Exception) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _timing(seconds: list[float], launch: str) -> Timing:
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return Timing(statistics.median(seconds), quartiles[0], quartiles[2], min(seconds), len(seconds), launch)
