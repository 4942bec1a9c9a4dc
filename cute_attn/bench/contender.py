"""What is measured: an implementation of attention, ours or a peer's."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from cute_attn.dispatch import Support
from cute_attn.problem import Problem

__all__ = ["Contender", "Formats", "Prepared", "installed", "top_left_refusal"]


@dataclass(frozen=True)
class Formats:
    """Operand formats of Q·Kᵀ and P·V and the accumulator of P·V, in the words of `Recipe`."""

    qk: str
    pv: str
    accumulate: str = "float32"


def _as_it_is(out: torch.Tensor) -> torch.Tensor:
    return out


@dataclass(frozen=True)
class Prepared:
    """The calls to time, on operands that are ready; each can be repeated and may be captured in a CUDA graph.

    The operands of all contenders are held at the same time. What a call returns is better made by the call: captured
    calls share the memory of that.

    attention: attention alone, on operands quantised beforehand; None where it cannot be called by itself
    whole:     quantisation and attention; None where nothing is quantised, for then that is `attention`
    output:    what a call returned as [B, H, S, D]; not timed
    """

    attention: Callable[[], torch.Tensor] | None
    whole: Callable[[], torch.Tensor] | None = None
    output: Callable[[torch.Tensor], torch.Tensor] = _as_it_is


class Contender(Protocol):
    """An implementation of attention.

    name:       as tables and ``--peers`` call it
    ours:       whether it is of this package
    capturable: whether its launches can be captured in a CUDA graph; otherwise its calls are timed as they are
    quantises:  whether it has a quantisation to count
    """

    name: str
    ours: bool
    capturable: bool
    quantises: bool

    def formats(self, problem: Problem) -> Formats: ...

    def available(self) -> Support:
        """Whether it is installed and runs on this device, and if not, why."""
        ...

    def supports(self, problem: Problem) -> Support:
        """Whether it computes this problem, and if not, why."""
        ...

    def prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Prepared:
        """The calls for q, k, v [B, H, S, D], contiguous. May raise anything: the row then says what."""
        ...


def installed(module: str, package: str, how: str) -> Support:
    """Whether ``module`` can be imported; ``package`` and ``how`` say what is missing and how one gets it."""
    if importlib.util.find_spec(module) is None:
        return Support(f"{package} is not installed: {how}")
    return Support()


def top_left_refusal(problem: Problem) -> Support:
    """Peers that align a causal mask top-left compute something else where there are more keys than queries."""
    if problem.causal and problem.seq_q != problem.seq_k:
        return Support("aligns a causal mask top-left: with other lengths of Q and K that is another problem")
    return Support()
