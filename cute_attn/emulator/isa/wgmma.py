"""wgmma.mma_async, wgmma.fence, wgmma.commit_group and wgmma.wait_group of sm_90a.

m64nNk16 of f16 and bf16, k8 of tf32, k32 of e4m3, e5m2, s8 and u8; A in shared memory or registers, both majors for
16-bit elements, all swizzles, negated operands, .satfinite (PTX ISA, "Asynchronous Warpgroup Level Matrix
Instructions"). Sparse and one-bit forms are unknown instructions. What is in flight, and when it is computed:
`wgmma_flight`.

All four instructions need all warps of a warpgroup: the scheduler lets a block with one of them wait until the
warpgroup is complete, and a warpgroup that cannot become complete is a `DivergentWarp`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import numpy as np

from ..codegen import BlockBuilder
from ..errors import AccumulatorInFlight, InvalidOperand, Misaligned, OutOfBounds, UnknownInstruction
from ..memory import Array
from ..module import Instruction
from ..registers import Pending
from ..registry import action, emits, helper
from ..wave import Group, Wave
from .wgmma_accumulators import Accumulators, InFlight
from .wgmma_descriptor import CHUNK, MatrixDescriptor, chunks
from .wgmma_flight import Flight, Multiplication, lanes_of
from .wgmma_product import ROWS, WARPGROUP, WgmmaKind
from .wgmma_registers import FenceNote, WgmmaNote, check_fence, note_fence

_SAME = {"f16": (16, "f32 f16"), "bf16": (16, "f32"), "tf32": (8, "f32")}
_OPCODE = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)(\.satfinite)?\.(f32|f16|s32)\.(\w+)\.(\w+)(\.satfinite)?"
)


def _shape(opcode: str) -> tuple[int, int, str, str, str, bool]:
    """(n, k, A, B, accumulator, satfinite) of a legal combination; raises UnknownInstruction for any other."""
    match = _OPCODE.fullmatch(opcode)
    if match is None:
        raise UnknownInstruction(opcode)
    n, k, accumulator, a, b = int(match[1]), int(match[2]), match[4], match[5], match[6]
    saturate = bool(match[3] or match[7])
    columns = n % 8 == 0 and 8 <= n <= 256
    if a in _SAME:
        legal = a == b and k == _SAME[a][0] and accumulator in _SAME[a][1].split() and not saturate
    elif {a, b} <= {"e4m3", "e5m2"}:
        legal = k == 32 and accumulator in ("f32", "f16") and not saturate
    else:
        legal = {a, b} <= {"s8", "u8"} and k == 32 and accumulator == "s32"
        columns = columns and (n % 16 == 0 or n in (8, 24))
    if not (legal and columns):
        raise UnknownInstruction(opcode)
    return n, k, a, b, accumulator, saturate


def _kind(i: Instruction, a_in_registers: bool) -> WgmmaKind:
    n, k, a, b, accumulator, saturate = _shape(i.opcode)
    signs, majors = 0 if accumulator == "s32" else 2, 2 - a_in_registers if k == 16 else 0
    immediates = [int(operand) for operand in i.operands[4:]]
    if len(immediates) != signs + majors:
        raise UnknownInstruction(i.text)
    sign, major = (
        immediates[:signs],
        [0, 0, *immediates[signs:]][-2:] if majors == 2 else [0, *immediates[signs:], 0][:2],
    )
    if not {*sign} <= {1, -1} or not {*major} <= {0, 1}:
        raise UnknownInstruction(i.text)
    return WgmmaKind(
        n, k, a, b, accumulator, saturate, a_in_registers, sign.count(-1) == 1, bool(major[0]), bool(major[1])
    )


def _require_no_guard(i: Instruction) -> None:
    """All threads of a warpgroup have to execute these instructions; guards, which may differ, are not implemented."""
    if i.guard is not None:
        raise UnknownInstruction(i.text)


@emits("wgmma.mma_async.sync.aligned", whole_warpgroups=True)
def mma_async(b: BlockBuilder, i: Instruction) -> None:
    """wgmma.mma_async d, a-desc or {a}, b-desc, scale-d {, imm-scale-a, imm-scale-b {, imm-trans-a}, imm-trans-b};"""
    dests, a = b.vector(i.operands[0]), b.vector(i.operands[1])
    kind = _kind(i, a_in_registers=i.operands[1].startswith("{"))
    _require_no_guard(i)
    if len(dests) != kind.registers or len(a) != (4 if kind.a_in_registers else 1):
        raise UnknownInstruction(i.text)
    if len({*dests}) != len(dests) or any(b.kernel.register_bits[b.kernel.registers[d]] != 32 for d in dests):
        raise UnknownInstruction(i.text)
    scale = b.literal(i.operands[3])
    if scale not in (None, 0, 1):
        raise UnknownInstruction(i.text)
    adds = b.predicate(i.operands[3]) if scale is None else b.constant(scale, "bool")
    c = "None" if scale == 0 else f"({', '.join(b.read(d, 'uint32') for d in dests)},)"
    if kind.a_in_registers:
        left = f"({', '.join(b.read(register, 'uint32') for register in a)},)"
    else:
        left = b.read(a[0], "uint64")
    right = b.read(i.operands[2], "uint64")
    names = tuple(b.new_name() for _ in dests)
    numbers = b.kernel.registers
    note = WgmmaNote(
        i.index, tuple(numbers[d] for d in dests), tuple(numbers[r] for r in a) if kind.a_in_registers else ()
    )
    check_fence(b, note)
    b.code.notes.append(note)
    code = f"{', '.join(names)}, = wgmma(G, {b.constant(kind)}, {c}, {left}, {right}, {adds}, {b.constant(note)})"
    b.operation(code, names, pure=False)
    for dest, name in zip(dests, names, strict=True):
        b.bind(dest, name, "uint32")


@emits("wgmma.fence.sync.aligned", modifiers="", starts_block=True, whole_warpgroups=True)
def fence(b: BlockBuilder, i: Instruction) -> None:
    _require_no_guard(i)
    b.code.notes.append(FenceNote(i.index))
    b.effect(f"wgmma_fence(G, {i.index})")


@emits("wgmma.commit_group.sync.aligned", modifiers="", whole_warpgroups=True)
def commit(b: BlockBuilder, i: Instruction) -> None:
    _require_no_guard(i)
    b.effect(f"wgmma_commit(G, {i.index})")


@emits("wgmma.wait_group.sync.aligned", modifiers="", ends_block=True, whole_warpgroups=True)
def wait(b: BlockBuilder, i: Instruction) -> None:
    _require_no_guard(i)
    newest = b.literal(i.operands[0])
    if newest is None or newest < 0:
        raise UnknownInstruction(i.text)
    b.finish(f"('wgmma.wait', {newest}, {i.index})", b.number + 1)


# ---- execution


@helper
def wgmma_fence(group: Group, index: int) -> None:
    group.require_whole_warpgroups(index)
    note_fence(group)


@helper
def wgmma_commit(group: Group, index: int) -> None:
    Flight.of(group.wave).groups.commit(group.require_whole_warpgroups(index))
    if (races := group.wave.races) is not None:
        races.close_group("wgmma", group.lane_numbers)


@action("wgmma.wait")
def wait_group(wave: Wave, group: Group, block: int, newest: int, index: int) -> None:
    Flight.of(wave).wait(group.require_whole_warpgroups(index), newest)
    if wave.races is not None:
        wave.races.await_groups("wgmma", group.lane_numbers, newest)
    wave.pc[group.lanes] = block + 1


def _per_warpgroup(group: Group, value: Any, index: int, what: str) -> Array:
    """[warpgroups]: a value that all threads of a warpgroup must agree on."""
    count = group.size // WARPGROUP
    if value.ndim == 0:
        return np.full(count, value)
    table: Array = value.reshape(count, WARPGROUP)
    if (differs := table != table[:, :1]).any():
        group.fail(InvalidOperand, index, int(np.argmax(differs)), f"{what} differs within the warpgroup")
    return table[:, 0]


def _descriptors(group: Group, value: Any, rows: int, mn_major: bool, k: int, index: int, what: str) -> Array:
    """[warpgroups] checked descriptors."""
    result = _per_warpgroup(group, value, index, f"the descriptor of {what}")
    size = group.wave.shared.size
    for bits in {*result.tolist()}:
        _, low, high = chunks(bits, rows, mn_major, k)
        descriptor = MatrixDescriptor.decode(bits)
        if descriptor.is_aligned and high <= size:
            continue
        position = int(np.argmax(result == bits)) * WARPGROUP
        if high > size:
            text = f"{what} is at {low:#x} to {high:#x} of shared memory: the CTA has {size} bytes"
            group.fail(OutOfBounds, index, position, text)
        group.fail(
            Misaligned,
            index,
            position,
            f"{what} starts at {descriptor.start:#x}, in line {descriptor.start >> 7 & descriptor.lines} of the "
            f"{descriptor.swizzle}-byte swizzling pattern; its descriptor has base offset {descriptor.base_offset}",
        )
    return result


@helper
def wgmma(
    group: Group, kind: WgmmaKind, c: tuple[Any, ...] | None, a: Any, b: Any, adds: Any, note: WgmmaNote
) -> tuple[InFlight, ...]:
    """Issues D = A · B + C or, where `adds` is false, D = A · B; D's registers, in flight."""
    index = note.index
    leaders = group.require_whole_warpgroups(index)
    count = leaders.size
    right = _descriptors(group, b, kind.n, kind.b_major_mn, kind.k, index, "B")
    left: Any
    if kind.a_in_registers:
        if any(isinstance(register, Pending) for register in a):
            group.fail(AccumulatorInFlight, index, 0, "A is in a register that a wgmma in flight has yet to write")
        left = [group.spread(register) for register in a]
    else:
        left = _descriptors(group, a, ROWS, kind.a_major_mn, kind.k, index, "A")
    goes_on = _per_warpgroup(group, adds, index, "scale-d")
    if group.wave.races is not None:
        _note_reads(group, leaders, kind, left, right, index)
    flight = Flight.of(group.wave)
    parts: list[tuple[Multiplication, Array | None, Array | None]] = []
    for rows, previous, previous_rows in _sources(group, kind, c, goes_on, index):
        whole = rows.size == count
        lanes = slice(None) if whole else lanes_of(rows)
        start = None
        if c is not None and previous is None and goes_on[rows[0]]:
            start = np.empty((len(c), rows.size * WARPGROUP), np.uint32)
            for slot, register in enumerate(c):
                value: Any = register.base if isinstance(register, InFlight) else register
                start[slot] = value if value.ndim == 0 else value[lanes]
        multiplication = Multiplication(
            kind,
            note,
            group,
            rows * WARPGROUP,
            leaders[rows],
            group.wave.cta_of_lane[leaders[rows]],
            [register[lanes] for register in left] if kind.a_in_registers else left[rows],
            right[rows],
            start,
            previous,
            previous_rows,
            flight.groups.open[leaders[rows]],
        )
        flight.issue(multiplication)
        parts.append((multiplication, None, None if whole else lanes_of(rows)))
    source = Accumulators(group.size, parts)
    return tuple([InFlight(source, slot) for slot in range(kind.registers)])


def _note_reads(group: Group, leaders: Array, kind: WgmmaKind, left: Any, right: Array, index: int) -> None:
    """Tells the race detector what is read from now on: each warp reads its 16 rows of A, and all of them B."""
    wave = group.wave
    assert wave.races is not None
    shared = wave.cta_lanes, wave.shared.stride // CHUNK
    whose = leaders.tobytes()
    for read in _reads(whose, right.tobytes(), kind.n, kind.b_major_mn, kind.k, 1, *shared):
        wave.races.read_operand(group, *read, index, together=4)
    if not kind.a_in_registers:
        for read in _reads(whose, left.tobytes(), ROWS, kind.a_major_mn, kind.k, 4, *shared):
            wave.races.read_operand(group, *read, index)


@lru_cache(maxsize=1024)
def _reads(
    leaders: bytes, descriptors: bytes, rows: int, mn_major: bool, k: int, parts: int, cta_lanes: int, cta_chunks: int
) -> list[tuple[Array, Array, Array]]:
    """(lanes [n], first chunks [n], chunks from there [m]): who reads what of an operand, of whose rows each warp reads
    the same, or each of the four (parts: 1 or 4) a part. Descriptors that differ in their start only are one entry.
    """
    lanes, all_bits = np.frombuffer(leaders, np.int64), np.frombuffer(descriptors, np.uint64)
    found: dict[bytes, list[tuple[Array, Array, Array]]] = {}
    for bits in np.unique(all_bits).tolist():
        here = lanes[all_bits == bits]
        table = chunks(bits, rows, mn_major, k)[0]
        for warp, part in enumerate(np.split(table, parts, axis=1 if mn_major else 0)):
            numbers = np.sort(part.reshape(-1))
            first = here // cta_lanes * cta_chunks + numbers[0]
            pattern = numbers - numbers[0]
            found.setdefault(pattern.tobytes(), []).append((here + 32 * warp, first, pattern))
    return [
        (np.concatenate([e[0] for e in entries]), np.concatenate([e[1] for e in entries]), entries[0][2])
        for entries in found.values()
    ]


_NOBODY = np.zeros(0, np.int64)


def _sources(
    group: Group, kind: WgmmaKind, c: tuple[Any, ...] | None, goes_on: Array, index: int
) -> list[tuple[Array, Multiplication | None, Array]]:
    """Warpgroups by where their accumulator comes from: the multiplication in flight that they continue and its rows,
    or none: then all of them start from registers, or all from zero.
    """
    rows = np.arange(goes_on.size)
    result: list[tuple[Array, Multiplication | None, Array]] = []
    if c is None or not goes_on.any():
        return [(rows, None, _NOBODY)]
    if not goes_on.all():
        result.append((rows[~goes_on], None, _NOBODY))
    plain = goes_on.copy()
    if any(isinstance(register, Pending) for register in c):
        for mine, previous, places in _continued(group, kind, c, index):
            chosen = goes_on[mine]
            mine, places = mine[chosen], places[chosen]
            if not mine.size:
                continue
            plain[mine] = False
            if previous.continued[places].any():
                text = f"goes on with a copy of the accumulator of `{previous.name}`, with which another has gone on"
                group.fail(AccumulatorInFlight, index, int(mine[0]) * WARPGROUP, text)
            previous.continued[places] = True
            result.append((mine, previous, places))
    if plain.any():
        result.append((rows[plain], None, _NOBODY))
    return result


def _continued(
    group: Group, kind: WgmmaKind, c: tuple[Any, ...], index: int
) -> list[tuple[Array, Multiplication, Array]]:
    """The multiplications in flight whose accumulators are C: (warpgroups, multiplication, its rows)."""
    first = next(register for register in c if isinstance(register, InFlight))
    source: Accumulators = first.source
    name = source.parts[0][0].name
    for slot, register in enumerate(c):
        if not isinstance(register, InFlight) or register.slot != slot or not register.source.same_as(source):
            group.fail(AccumulatorInFlight, index, 0, f"C is not as a whole the accumulator of `{name}`, in flight")
    result = []
    for previous, places, positions in source.parts:
        if not previous.kind.shares_accumulator(kind):
            group.fail(
                AccumulatorInFlight, index, 0, f"goes on with the accumulator of `{previous.name}`, of another shape"
            )
        mine = np.arange(group.size) if positions is None else positions
        theirs = np.arange(mine.size) if places is None else places
        rows, their_rows = mine[::WARPGROUP] // WARPGROUP, theirs[::WARPGROUP] // WARPGROUP
        if not (np.array_equal(mine, lanes_of(rows)) and np.array_equal(theirs, lanes_of(their_rows))):
            group.fail(AccumulatorInFlight, index, 0, f"C holds a part of the accumulator of `{name}`, in flight")
        result.append((rows, previous, their_rows))
    return result
