"""An example: a kernel with a bug that the emulator finds, and the same kernel without it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
import torch
from cutlass import Constexpr
from cutlass.cute.runtime import from_dlpack

from cute_attn.emulator.errors import EmulatorError

_GAP = 4096
"""Bytes around each tensor that are nobody's: what findings say of an address must not depend on the allocator."""


@dataclass(frozen=True)
class Example:
    """A kernel whose last argument says whether the bug is fixed.

    error: what the emulator raises while it is not. arguments: copies of these are the kernel's tensors. host: the
    function that launches it. sizes: what the launch takes, or whatever else `host` wants to know.
    """

    error: type[EmulatorError]
    kernel: Callable[..., Any]
    arguments: tuple[torch.Tensor, ...]
    host: Callable[..., Any]
    sizes: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def source(self) -> str:
        """Path of the file that defines the kernel."""
        return inspect.getsourcefile(inspect.unwrap(self.kernel)) or ""

    def run(self, fixed: bool) -> EmulatorError | None:
        """Compiles the kernel and runs it on the emulator; what was found."""
        tensors = tuple(from_dlpack(_apart(tensor), assumed_align=16) for tensor in self.arguments)
        try:
            self.host(self.kernel, tensors, fixed, self.sizes)
        except EmulatorError as finding:
            return finding
        return None


def _apart(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor with a gap before and after it."""
    gap = _GAP // tensor.itemsize
    whole = torch.zeros(tensor.numel() + 2 * gap, dtype=tensor.dtype)
    return whole[gap : gap + tensor.numel()].view(tensor.shape).copy_(tensor)


EXAMPLES: list[Example] = []
"""In the order of their definition."""


@cute.jit
def launch(kernel: Constexpr, tensors: tuple, fixed: Constexpr, sizes: Constexpr):
    """Most kernels need no more than this on the host."""
    kernel(*tensors, fixed).launch(**sizes)


def example(
    error: type[EmulatorError],
    *arguments: torch.Tensor,
    host: Callable[..., Any] = launch,
    grid: int = 1,
    block: int = 128,
    **sizes: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes an example of a kernel."""

    def keep(kernel: Callable[..., Any]) -> Callable[..., Any]:
        EXAMPLES.append(
            Example(error, kernel, arguments, host, {"grid": (grid, 1, 1), "block": (block, 1, 1), **sizes})
        )
        return kernel

    return keep
