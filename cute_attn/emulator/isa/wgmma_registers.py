"""Registers of wgmma that other instructions touch too early or without a fence.

* Between a wgmma.mma_async and the wait for it, its accumulator and its A registers must not be written (PTX ISA,
  "wgmma.mma_async"). Moving an accumulator that is in flight to other registers renames it, and frees the old ones.
* A wgmma.fence must stand before a warpgroup's first wgmma, and between any write of an accumulator or A register and
  the wgmma that uses it (PTX ISA, "wgmma.fence"); instructions of one shape that share an accumulator need none.
  A constant in an accumulator needs none either: LLVM moves the zeroing past the fence that the program wrote after it,
  in NVIDIA's own kernels too, and ptxas puts it where it belongs.

Which registers a block writes is known when it is compiled. So a wgmma behind a fence in its own block costs nothing,
and otherwise times are compared, of the last fence and of the last run of each block. What is in flight is compared
with the writes of each block before it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..assembly import BlockCode, RegisterWrite
from ..codegen import BlockBuilder
from ..errors import MissingFence, RegisterInFlight
from ..memory import Array
from ..module import Kernel
from ..registers import Split
from ..registry import WATCHERS, helper
from ..wave import Group, Wave
from ..wave_state import WaveState
from .wgmma_accumulators import InFlight
from .wgmma_flight import Flight, Multiplication

if TYPE_CHECKING:
    from ..program import Program


@dataclass(frozen=True)
class WgmmaNote:
    """A wgmma.mma_async of a block: its index and its accumulator and A registers."""

    index: int
    d: tuple[int, ...]
    a: tuple[int, ...]


@dataclass(frozen=True)
class FenceNote:
    """A wgmma.fence of a block."""

    index: int


def _by_wgmma(code: BlockCode) -> set[int]:
    return {note.index for note in code.notes if isinstance(note, WgmmaNote)}


def _is_constant(kernel: Kernel, writer: int) -> bool:
    instruction = kernel.instructions[writer]
    return instruction.parts[0] == "mov" and instruction.operands[-1][0].isdigit()


def _since_fence(code: BlockCode) -> tuple[dict[int, int], dict[int, int], bool]:
    """After the last fence of a block so far, or in all of it: registers written, with the instruction; registers that
    are copies of ones not written here, with their source; and whether there is a fence.
    """
    fence = max((note.index for note in code.notes if isinstance(note, FenceNote)), default=-1)
    own = _by_wgmma(code)
    written: dict[int, int] = {}
    copied: dict[int, int] = {}
    for write in code.writes:
        if write.instruction < fence or write.instruction in own:
            continue
        written.pop(write.register, None)
        origin = copied.pop(write.register, None)
        if write.source is None:
            written[write.register] = write.instruction
        elif write.source in written:
            written[write.register] = written[write.source]
        else:
            origin = copied.get(write.source, write.source)
            if origin != write.register:
                copied[write.register] = origin
    return written, copied, fence >= 0


def check_fence(b: BlockBuilder, note: WgmmaNote) -> None:
    """Appends what finds a missing fence before this wgmma: nothing, where the block itself shows that it is there."""
    written, _, fenced = _since_fence(b.code)
    for register in (*note.d, *note.a):
        if register in written and not (register in note.d and _is_constant(b.kernel, written[register])):
            b.effect(f"wgmma_unfenced(G, {register}, {written[register]}, {note.index})")
            return
    if not fenced:
        b.effect(f"wgmma_fence_before(G, {b.constant(note)})")


@helper
def wgmma_unfenced(group: Group, register: int, writer: int, index: int) -> None:
    kernel = group.wave.kernel
    name = next(name for name, number in kernel.registers.items() if number == register)
    text = f"no wgmma.fence since {name} was written by {kernel.instructions[writer].place}"
    group.fail(MissingFence, index, 0, text)


@helper
def wgmma_fence_before(group: Group, note: WgmmaNote) -> None:
    """The fence of a wgmma that has none in its own block."""
    steps = _Steps.of(group.wave)
    warpgroups = group.warpgroups
    fenced = steps.fenced[warpgroups]
    if (fenced < 0).any():
        position = int(np.argmax(group.wave.warpgroup_of_lane[group.lane_numbers] == warpgroups[np.argmin(fenced)]))
        group.fail(MissingFence, note.index, position, "no wgmma.fence before the first wgmma of the warpgroup")
    for register in (*note.d, *note.a):
        for block, writer in steps.registers.writers(register).items():
            if register in note.d and _is_constant(group.wave.kernel, writer):
                continue
            if (steps.ran[block, warpgroups] >= fenced).any():
                wgmma_unfenced(group, register, writer, note.index)


class _ProgramRegisters:
    """What the blocks of a program write, as far as it concerns wgmma."""

    def __init__(self, program: Program) -> None:
        self.codes = [program.code(block) for block in range(len(program.blocks))]
        self._since_fence = [_since_fence(code) for code in self.codes]
        self._writers: dict[int, dict[int, int]] = {}
        self._conflicts: dict[tuple[int, int, bool], list[tuple[RegisterWrite, int]]] = {}
        self.own_notes = [[note for note in code.notes if isinstance(note, WgmmaNote)] for code in self.codes]

    def writers(self, register: int) -> dict[int, int]:
        """Blocks that write a register, or what is copied to it, after their last fence; with the instruction."""
        if register not in self._writers:
            names, found = [register], {}
            for name in names:
                for block, (written, copied, _) in enumerate(self._since_fence):
                    if name in written:
                        found[block] = written[name]
                    if name in copied and copied[name] not in names:
                        names.append(copied[name])
            self._writers[register] = found
        return self._writers[register]

    def conflicts(self, block: int, note: WgmmaNote, *, after: bool) -> list[tuple[RegisterWrite, int]]:
        """Writes of a block to registers of a wgmma in flight, with the accumulator's slot, -1 for A.

        after: the wgmma is in this block, and only what follows it counts. A register of the accumulator that has been
        copied before, in this block, may be written.
        """
        key = (block, note.index, after)
        if key not in self._conflicts:
            own = _by_wgmma(self.codes[block])
            slots = {register: slot for slot, register in enumerate(note.d)}
            moved: set[int] = set()
            found = []
            for write in self.codes[block].writes:
                if write.instruction in own or (after and write.instruction < note.index):
                    continue
                if write.register in note.a:
                    found.append((write, -1))
                elif write.register in slots and write.register not in moved:
                    found.append((write, slots[write.register]))
                if write.source is not None:
                    moved.add(write.source)
            self._conflicts[key] = found
        return self._conflicts[key]


class _Steps(WaveState):
    """Of a wave: when each warpgroup last ran each block, and when it last passed a fence."""

    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        self.registers = self._of_program(wave.kernel.program)
        warpgroups = int(wave.warpgroup_of_lane[-1]) + 1
        self.now = 0
        self.ran = np.full((len(wave.kernel.program.blocks), warpgroups), -1, np.int64)
        self.fenced = np.full(warpgroups, -1, np.int64)
        self._last: tuple[int, Array] | None = None

    @staticmethod
    def _of_program(program: Program) -> _ProgramRegisters:
        if "wgmma" not in program.derived:
            program.derived["wgmma"] = _ProgramRegisters(program)
        return program.derived["wgmma"]

    def begin(self, group: Group, block: int) -> None:
        """A block begins; the one before it has run."""
        if self._last is not None:
            self.ran[self._last] = self.now
        self.now += 1
        self._last = (block, group.warpgroups)


def note_fence(group: Group) -> None:
    steps = _Steps.of(group.wave)
    steps.fenced[group.warpgroups] = steps.now


def watch(wave: Wave, group: Group, block: int) -> None:
    """Before a block: whether it writes registers of a wgmma in flight."""
    steps = _Steps.of(wave)
    steps.begin(group, block)
    for note in steps.registers.own_notes[block]:
        for write, _ in steps.registers.conflicts(block, note, after=True):
            _report(group, write, note.index, 0)
    for multiplication in Flight.of(wave).outstanding():
        if not (conflicts := steps.registers.conflicts(block, multiplication.note, after=False)):
            continue
        in_flight = multiplication.leaders[Flight.of(wave).in_flight(multiplication)]
        mine = np.isin(wave.warpgroup_of_lane[in_flight], group.warpgroups)
        for write, slot in conflicts if mine.any() else ():
            if slot < 0 or not _held_elsewhere(wave, multiplication, slot, write.register):
                whose = wave.warpgroup_of_lane[group.lane_numbers] == wave.warpgroup_of_lane[in_flight[np.argmax(mine)]]
                _report(group, write, multiplication.index, int(np.argmax(whose)))


def _report(group: Group, write: RegisterWrite, index: int, position: int) -> None:
    kernel = group.wave.kernel
    name = next(name for name, number in kernel.registers.items() if number == write.register)
    what = kernel.instructions[index].text.split(",")[0]
    text = f"{name} is written while `{what}, ...}}` is in flight, which uses it: no wgmma.wait_group has waited for it"
    group.fail(RegisterInFlight, write.instruction, position, text)


def _held_elsewhere(wave: Wave, multiplication: Multiplication, slot: int, register: int) -> bool:
    """Whether a register other than this one holds the accumulator's slot: it has been renamed."""

    def holds(value: Any) -> bool:
        if not isinstance(value, InFlight) or value.slot != slot:
            return False
        return any(part.goes_on_from(multiplication) for part, _, _ in value.source.parts)

    return any(
        number != register and value.__class__ is Split and any(holds(piece) for _, piece in value.pieces)
        for number, value in enumerate(wave.registers)
    )


WATCHERS.append(("wgmma", watch))
