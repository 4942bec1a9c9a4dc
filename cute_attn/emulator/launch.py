"""Runs one kernel launch on the CPU."""

from __future__ import annotations

import functools
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
from threadpoolctl import ThreadpoolController

from . import scheduler
from .errors import InvalidLaunch
from .launch_size import LaunchSize, Shape
from .memory import Array, GlobalMemory, Span
from .module import Instruction, Kernel
from .program import Program, compile_kernel
from .races import Races
from .settings import Settings
from .shadow import SharedAccesses
from .traffic import Traffic
from .wave import Wave

WAVE_LANES = 8192
"""Lanes that run together. FlashAttention forward, B1 H8 S2048 D128, on one core of an EPYC: 2.5, 1.75, 1.47, 1.47 s
for 2048, 4096, 8192, 16384 lanes; two threads over waves were slower (the interpreter lock), so there is one."""
POLLING_LANES = 1 << 17
"""The same for a kernel whose CTAs may poll for what others do: about half of what a large GPU holds at a time."""
QUEUED_WAVES = 4
"""Waves in which a kernel runs that may cancel CTAs not yet started (clusterlaunchcontrol), so that some are left."""

_USUAL = Settings()


@dataclass
class LaunchRecord:
    """What a launch did. `instructions` counts executed warp instructions per opcode (a partial warp by its share).

    `profile` holds seconds per instruction family where it was asked for, `traffic` bytes of global memory: 32 for each
    sector that an instruction of a warp touches, by "read", "write" and "atomic access" (see `traffic`).
    """

    name: str
    grid: Shape
    cluster: Shape
    block: Shape
    shared_bytes: int
    seconds: float
    instructions: dict[str, int]
    profile: dict[str, float] = field(default_factory=dict)
    traffic: dict[str, int] = field(default_factory=dict)


def _may_poll(instruction: Instruction) -> bool:
    """Loads that see what other CTAs store while they run, and the atomic that locks are made of."""
    parts = instruction.parts
    strong = parts[0] == "ld" and not {"acquire", "relaxed", "volatile"}.isdisjoint(parts)
    return strong or (parts[0] == "atom" and "cas" in parts)


def _clusters_per_wave(kernel: Kernel, size: LaunchSize, clusters: int) -> int:
    if size.cooperative:
        return clusters
    lanes = POLLING_LANES if any(map(_may_poll, kernel.instructions)) else WAVE_LANES
    most = max(1, lanes // (size.cluster_ctas * size.cta_lanes))
    if any(i.opcode.startswith("clusterlaunchcontrol.try_cancel") for i in kernel.instructions):
        most = min(most, -(-clusters // QUEUED_WAVES))
    return most


@functools.cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def _instruction_counts(program: Program, executed: Array) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for block, lanes in zip(program.blocks, executed, strict=True):
        if lanes:
            for instruction in block:
                counts[instruction.opcode] += int(lanes)
    return {opcode: -(-lanes // 32) for opcode, lanes in counts.most_common()}


def launch(
    kernel: Kernel, size: LaunchSize, parameters: bytes, memory: GlobalMemory, settings: Settings = _USUAL
) -> LaunchRecord:
    """Runs `kernel` to completion and returns what it did; raises an `EmulatorError` at the first finding.

    parameters: the parameter buffer. memory: the only global memory that may be touched.
    """
    started = time.perf_counter()
    size.check(kernel)
    if len(parameters) < kernel.parameter_bytes:
        raise InvalidLaunch(
            f"cannot launch {kernel.name}: {len(parameters)} bytes of parameters, the kernel takes "
            f"{kernel.parameter_bytes}"
        )
    program = compile_kernel(kernel)
    buffers = {name: np.frombuffer(data, np.uint8).copy() for name, data in kernel.constants.items()}
    if buffers:
        memory = memory.with_spans(Span(b.ctypes.data, b.nbytes, name) for name, b in buffers.items())
    random = None if settings.seed is None else np.random.default_rng(settings.seed)
    queue = deque(size.cluster_order(random))
    per_wave = _clusters_per_wave(kernel, size, len(queue))
    profile: Counter[str] = Counter()
    traffic = Traffic() if settings.traffic else None
    executed = np.zeros(len(program.blocks), np.int64)
    traced = None if settings.trace is None else settings.trace.begin(program, size, settings.seed)
    accesses = SharedAccesses.of(kernel) if settings.races and kernel.shared_bytes(size.shared_bytes) else None
    while queue:
        ctas = np.concatenate([queue.popleft() for _ in range(min(per_wave, len(queue)))])
        constants = {name: b.ctypes.data for name, b in buffers.items()}
        wave = Wave(kernel, ctas, size, parameters, memory, constants, settings, queue=queue, random=random)
        if settings.profile:
            wave.profile = profile
        wave.traffic = traffic
        if accesses is not None:
            wave.races = Races(wave, accesses)
        if traced is not None:
            traced.attach(wave)
        with _libraries().limit(limits=1, user_api="blas"):
            # The products are too small to share, and waiting threads of BLAS spin: six times slower on a busy machine.
            scheduler.run(wave, program, executed)
    return LaunchRecord(
        name=kernel.name,
        grid=size.grid,
        cluster=size.cluster,
        block=size.block,
        shared_bytes=size.shared_bytes,
        seconds=time.perf_counter() - started,
        instructions=_instruction_counts(program, executed),
        profile=dict(profile.most_common()),
        traffic={} if traffic is None else dict(traffic.nbytes),
    )
