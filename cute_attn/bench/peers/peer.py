"""What most peers have in common."""

from __future__ import annotations

import torch

from cute_attn.bench.contender import Formats
from cute_attn.dispatch import Support
from cute_attn.problem import Problem

__all__ = ["Fp8Peer", "Peer", "to_e4m3"]

_LARGEST = 448.0  # of E4M3


class Peer:
    """A `Contender` that is always there, computes every problem in 16 bits, and can be captured in a CUDA graph.

    A peer says what differs.
    """

    name: str
    ours = False
    capturable = True
    quantises = False

    def __init__(self, capability: tuple[int, int]) -> None:
        self._capability = capability

    def formats(self, problem: Problem) -> Formats:
        return Formats(problem.dtype, problem.dtype)

    def available(self) -> Support:
        return Support()

    def supports(self, problem: Problem) -> Support:
        return Support()


class Fp8Peer(Peer):
    """Takes Q, K and V in E4M3 and has no quantiser of its own: what is counted as quantisation is PyTorch's."""

    quantises = True

    def formats(self, problem: Problem) -> Formats:
        return Formats("e4m3", "e4m3")


def to_e4m3(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 elements with one scale for all of ``dims``, and the scales, float32, whose extents are 1 there."""
    scale = x.abs().amax(dims, keepdim=True).float().clamp(min=1e-30) / _LARGEST
    return (x / scale).to(torch.float8_e4m3fn), scale
