"""What a compiled kernel says of its warps: registers by setmaxnreg, barriers and how many arrivals each expects."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from cute_attn.kernels.kv_ring import KvRing

from .kernels import HEAD_DIM, kernel_of, program_of

__all__ = ["Barriers", "Roles", "barriers", "roles"]

_INIT = re.compile(r"mbarrier\.init\.shared\.b64\s+\[([^\]]+)\], ([%\w]+);")
_ADD = re.compile(r"add\.s32\s+(%r\d+), %\w+, (\d+);")
_MOVE = re.compile(r"mov\.[bsu]32\s+(%r\d+), (-?\d+);")
_REGISTERS = re.compile(r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32\s+(\d+);")


@dataclass(frozen=True)
class Roles:
    """Registers of a thread after setmaxnreg: of the producer's warpgroup, and of the consumers."""

    producer: int
    consumer: int


@cache
def roles(name: str, head_dim: int = HEAD_DIM) -> Roles:
    found = dict(_REGISTERS.findall(program_of(name, head_dim).ptx))
    return Roles(int(found["dec"]), int(found["inc"]))


@dataclass(frozen=True)
class Barriers:
    """Arrivals that a phase of each mbarrier expects, as the program initialises it."""

    full: tuple[int, ...]
    empty: tuple[int, ...]
    own: int
    queue_full: tuple[int, ...]
    queue_empty: tuple[int, ...]


@cache
def barriers(name: str, head_dim: int = HEAD_DIM) -> Barriers:
    """In the order of their addresses: of `KvRing` the full ones, the empty ones and the producer's own, then those of
    `WorkQueue`.
    """
    ptx, stages = program_of(name, head_dim).ptx, kernel_of(name, head_dim).config.stages
    constants = dict(_MOVE.findall(ptx))
    offsets = dict(_ADD.findall(ptx))
    counts = {}
    for address, count in _INIT.findall(ptx):  # [base+offset], or a register to which the offset has been added
        offset = int(address.split("+")[1] if "+" in address else offsets[address])
        counts[offset] = int(constants.get(count, count))
    places = sorted(counts)
    in_order = tuple(counts[place] for place in places)
    step = KvRing.barrier_bytes(1) - KvRing.barrier_bytes(0)
    assert [place - places[0] for place in places] == [i * step // 2 for i in range(2 * stages + 5)]
    own = 2 * stages
    return Barriers(
        in_order[:stages], in_order[stages:own], in_order[own], in_order[own + 1 : own + 3], in_order[own + 3 :]
    )
