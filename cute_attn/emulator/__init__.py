"""Runs the PTX of CuTe DSL programs on the CPU, launched by the programs' own compiled host code.

`runtime_library` is what the host code is linked against, `register` makes a program known, `call` runs it on CPU
tensors, `launches` tells what ran. Errors are subclasses of `EmulatorError`.
"""

from typing import Any

from cute_attn.emulator.errors import EmulatorError
from cute_attn.emulator.runtime import runtime_library

__all__ = ["EmulatorError", "call", "clear_launches", "launches", "register", "runtime_library"]


def __getattr__(name: str) -> Any:
    if name in ("call", "clear_launches", "launches", "register"):
        from cute_attn.emulator import capture

        return getattr(capture, name)
    raise AttributeError(name)
