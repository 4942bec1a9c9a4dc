"""Registers as parts of a wave see them, against one dense array; with and without values that are pending."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cute_attn.emulator.launch_size import LaunchSize
from cute_attn.emulator.memory import Array, GlobalMemory
from cute_attn.emulator.parser import parse
from cute_attn.emulator.registers import Pending
from cute_attn.emulator.settings import Settings
from cute_attn.emulator.wave import Group, Wave

PTX = ".version 8.8\n.target sm_90a\n.address_size 64\n.visible .entry kernel()\n{ .reg .b32 %r<4>; ret; }"
LANES = 256
REGISTERS = 4


def wave_of(random: np.random.Generator | None) -> Wave:
    kernel = parse(PTX)["kernel"]
    size = LaunchSize((2, 1, 1), (128, 1, 1))
    return Wave(kernel, np.arange(2), size, b"", GlobalMemory([]), {}, Settings(), random=random)


class Later(Pending):
    """Values that are there once `ready[0]` says so."""

    def __init__(self, values: Array, ready: list[bool]) -> None:
        self.values, self.ready = values, ready

    def settled(self) -> Array | None:
        return self.values if self.ready[0] else None

    def part(self, positions: Array) -> Pending:
        return Later(self.values[positions], self.ready)

    def joined(self, size: int, parts: list[tuple[Array, Any]], base: Array) -> Pending:
        values = base.copy()
        for positions, part in parts:
            values[positions] = part.values
        return Later(values, self.ready)


def some_group(wave: Wave, rng: np.random.Generator) -> Group:
    """Whole, a half, every other warp, or any lanes: a few of each, so that groups come again."""
    kind = rng.integers(5)
    if kind == 0:
        return wave.everyone
    mask = np.zeros(LANES, bool)
    if kind == 1:
        mask[128 * rng.integers(2) :][:128] = True
    elif kind == 2:
        mask.reshape(-1, 32)[rng.integers(2) :: 2] = True
    else:
        mask[:] = np.random.default_rng(rng.integers(4)).random(LANES) < 0.4
    return wave.group(mask)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_like_one_dense_array(seed: int, pending: bool, shuffled: bool) -> None:
    rng = np.random.default_rng(seed)
    wave = wave_of(np.random.default_rng(seed) if shuffled else None)
    dense = np.zeros((REGISTERS, LANES), np.uint32)
    ready = [False]
    for _ in range(300):
        group = some_group(wave, rng)
        register = int(rng.integers(REGISTERS))
        ready[0] = pending and bool(rng.integers(2))
        action = rng.integers(4)
        if action == 0:
            value: Any = np.uint32(rng.integers(1 << 32))
            dense[register][group.lanes] = value
        elif action == 1:
            value = rng.integers(1 << 32, size=group.size, dtype=np.uint32)
            dense[register][group.lanes] = value
            if pending and rng.integers(2):
                value = Later(value, ready)
        elif action == 2:
            source = int(rng.integers(REGISTERS))
            value = group.registers[source]
            dense[register][group.lanes] = dense[source][group.lanes]
        else:
            value = group.registers[register]
            if isinstance(value, Pending):
                assert not ready[0]
                value = value.values
            assert (group.spread(value) == dense[register][group.lanes]).all()
            continue
        group.registers[register] = value
    ready[0] = True
    for register in range(REGISTERS):
        assert (wave.everyone.spread(wave.everyone.registers[register]) == dense[register]).all()


def test_what_a_part_writes_is_not_copied() -> None:
    """Warps with a role of their own read the very arrays that they wrote, and their scalars stay scalars."""
    wave = wave_of(None)
    mask = np.arange(LANES) % 128 < 64
    group = wave.group(mask)
    values = np.arange(group.size, dtype=np.uint32)
    group.registers[0] = values
    group.registers[1] = np.uint32(5)
    again = wave.group(mask.copy())
    assert again.registers[0] is values
    assert again.registers[1].ndim == 0
    assert (wave.everyone.registers[1] == np.where(mask, 5, 0)).all()
