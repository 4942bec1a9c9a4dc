"""Compiles what a run will need beforehand, in several processes: one after the other it would take most of the run."""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cute_attn import jit, kernel_calls
from cute_attn.arch import ARCHS
from cute_attn.bench.ours import Ours
from cute_attn.problem import Problem

__all__ = ["compile_ahead", "kernels_needed"]


@dataclass(frozen=True)
class _Kernel:
    """Arguments of `jit.build`."""

    kernel_class: type
    config: Any
    arch: str


def kernels_needed(problems: Sequence[Problem], contenders: Sequence[Any]) -> list[_Kernel]:
    """Every kernel that ours launch for these problems, once."""
    found = {
        _Kernel(kernel_class, config, ours.arch): None
        for ours in contenders
        if isinstance(ours, Ours)
        for problem in problems
        if ours.supports(problem)
        for kernel_class, config in kernel_calls.kernels_of(
            problem, ours.recipe, ARCHS[ours.arch], ours.config(problem)
        ).values()
    }
    return list(found)


def compile_ahead(kernels: Sequence[_Kernel], jobs: int, done: Callable[[], object]) -> None:
    """Build the kernels into the disk cache, ``done`` after each. A kernel that fails is left to its row to report."""
    if not kernels:
        return
    # Children start afresh: a process that has used CUDA must not be forked.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(jobs, len(kernels)), mp_context=context) as pool:
        for future in concurrent.futures.as_completed([pool.submit(_build, kernel) for kernel in kernels]):
            if error := future.exception():
                logging.getLogger("cute_attn").warning("compiling ahead failed: %s", error)
            if isinstance(error, concurrent.futures.BrokenExecutor):
                return  # every other one would say the same
            done()


def _build(kernel: _Kernel) -> None:
    jit.build(kernel.kernel_class, kernel.config, kernel.arch)
