"""Runs the PTX of CuTe DSL programs on the CPU, launched by the programs' own compiled host code.

`runtime_library` is what the host code is linked against, `register` makes a program known, `call` runs it on CPU
tensors, `settings` changes how, `launches` tells what ran, `trace` draws it. Errors are subclasses of `EmulatorError`.
"""

from cute_attn.emulator.capture import call, clear_launches, launches, register
from cute_attn.emulator.errors import EmulatorError
from cute_attn.emulator.runtime import runtime_library
from cute_attn.emulator.settings import settings
from cute_attn.emulator.trace import Recorder, trace

__all__ = [
    "EmulatorError",
    "Recorder",
    "call",
    "clear_launches",
    "launches",
    "register",
    "runtime_library",
    "settings",
    "trace",
]
