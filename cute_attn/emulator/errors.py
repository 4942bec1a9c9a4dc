"""What the emulator reports, one class per kind of finding.

Every error is an `EmulatorError`; its message names the instruction, the kernel, the CTA, the thread and, where an
address is involved, the nearest tensor. `instruction`, `kernel`, `cta` and `thread` hold the same facts for programs.
"""

from __future__ import annotations


class EmulatorError(RuntimeError):
    """Base of all findings.

    Attributes: `instruction` (PTX text), `kernel` (entry name), `cta` and `thread` (x, y, z) of the first offending
    lane; None where a finding has no such thing.
    """

    instruction: str | None = None
    kernel: str | None = None
    cta: tuple[int, int, int] | None = None
    thread: tuple[int, int, int] | None = None


class ParseError(EmulatorError):
    """The PTX text is not what the parser understands."""


class UnknownInstruction(EmulatorError):
    """An instruction (or a form of one) that no family of `cute_attn.emulator.isa` implements was reached."""


class InvalidLaunch(EmulatorError):
    """Grid, block, shared memory or parameters do not fit the kernel or the hardware."""


class OutOfBounds(EmulatorError):
    """An access outside every tensor that was passed in, or outside the CTA's shared or the thread's local memory."""


class Misaligned(EmulatorError):
    """An address that is not a multiple of the access size."""


class UninitializedShared(EmulatorError):
    """A read of shared memory that nobody wrote."""


class DivergentWarp(EmulatorError):
    """A warp-wide instruction executed by a part of a warp, or with a member mask that names absent lanes."""


class InvalidOperand(EmulatorError):
    """An operand value that the instruction does not allow, such as a cp.async source size above the copy size."""


class Deadlock(EmulatorError):
    """Every thread that has not exited waits for something that nobody is left to do."""


class ExitedCta(EmulatorError):
    """An access to the shared memory of a CTA of the cluster that has exited: its memory may belong to another CTA."""


class BarrierMismatch(EmulatorError):
    """Arrivals or bytes at a barrier that do not add up to what it expects, or a barrier used without its init."""


class UnknownAccumulation(EmulatorError):
    """The hardware's accumulation was asked for where nobody has published how that tensor core sums."""


class AccumulatorInFlight(EmulatorError):
    """A register that a wgmma has yet to write is used for anything but a move or the next wgmma of the same shape."""


class DataRace(EmulatorError):
    """Two accesses to the same shared memory, one of them a write, that nothing orders.

    Attribute: `other`, the PTX text of the earlier one; `instruction` is the later one.
    """

    other: str | None = None


class MissingProxyFence(EmulatorError):
    """Shared memory written through the generic proxy and accessed by the async proxy without a fence between them.

    Attribute: `other`, the PTX text of the write.
    """

    other: str | None = None


class RegisterInFlight(EmulatorError):
    """A register that a wgmma in flight reads or writes is overwritten before the wait for that wgmma."""


class MissingFence(EmulatorError):
    """A wgmma without a wgmma.fence between it and what wrote its registers."""


class UninitializedRegister(EmulatorError):
    """An address, branch, stored value or other operand that depends on a register or local memory never written."""


class EmulatorFault(EmulatorError):
    """No finding about the kernel: the emulator itself failed at the instruction; `__context__` is that failure."""
