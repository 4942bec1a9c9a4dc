"""What a time means: operations per second, a share of the chip's peak, a ratio to the best peer."""

from __future__ import annotations

import math
from collections.abc import Iterable

from cute_attn.bench.results import Row
from cute_attn.bench.timing import Timing
from cute_attn.gpus import gpu_named, peak_tops

__all__ = ["MODES", "best_peer", "of_peak", "timing", "tops"]

MODES = ("attention", "whole")
"""Attention alone, and with quantisation: attributes of a `Row`."""

_EQUAL = 1.05
"""Errors that differ by less count as equal: two implementations of the same arithmetic round in another order."""


def timing(row: Row, mode: str) -> Timing | None:
    """A contender that does not quantise takes as long with its quantisation as without."""
    return row.attention if mode == "attention" or not row.quantises else row.whole


def tops(row: Row, mode: str) -> float | None:
    """10¹² operations per second at the median time, as `Problem.flops` counts them; None if not measured."""
    found = timing(row, mode)
    return None if found is None else row.problem.flops / found.median / 1e12


def of_peak(row: Row, mode: str, device_name: str) -> float | None:
    """Share of the tensor cores' peak in the contender's formats; None for a GPU or format that has no known peak."""
    gpu, measured = gpu_named(device_name), tops(row, mode)
    if gpu is None or measured is None:
        return None
    peak = peak_tops(gpu, row.formats.qk, row.formats.pv, row.formats.accumulate)
    return None if peak is None else measured / peak


def best_peer(row: Row, rows: Iterable[Row], mode: str, *, any_accuracy: bool = False) -> tuple[float, str] | None:
    """How many times as fast as the fastest peer ``row`` is on the same problem, and that peer's name.

    Only peers whose error (relative L2) is as large as the row's, or larger, count: to be faster than something more
    accurate proves little. With ``any_accuracy`` all count that are finite. None where there is none, or nothing was
    measured.
    """
    ours, mine = row.errors, timing(row, mode)
    if ours is None or mine is None:
        return None
    rivals = [
        (theirs.median, peer.contender)
        for peer in rows
        if not peer.ours and peer.problem == row.problem
        if peer.errors is not None and math.isfinite(peer.errors.rel_l2)
        if (theirs := timing(peer, mode)) is not None
        if any_accuracy or peer.errors.rel_l2 * _EQUAL >= ours.rel_l2
    ]
    if not rivals:
        return None
    fastest, name = min(rivals)
    return fastest / mine.median, name
