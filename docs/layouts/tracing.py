"""Atoms, layouts and register tensors exist only while a kernel is traced: reading facts off them there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

import cutlass.cute as cute

__all__ = ["while_tracing"]

Facts = TypeVar("Facts")


class _Read(Exception):
    """Ends a trace of which nothing is to be compiled."""


def while_tracing(read: Callable[[], Facts], arch: str = "sm_80") -> Facts:
    """What ``read`` returns when it is called inside of a kernel that is being traced for ``arch``."""
    found: list[Facts] = []

    @cute.kernel
    def kernel() -> None:
        found.append(read())

    @cute.jit
    def host() -> None:
        kernel().launch(grid=(1, 1, 1), block=(32, 1, 1))
        raise _Read

    with contextlib.suppress(_Read):
        cute.compile(host, options=f"--gpu-arch {arch}")
    return found[0]
