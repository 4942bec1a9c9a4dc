"""Runs one kernel launch on the CPU."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from threadpoolctl import ThreadpoolController

from . import scheduler
from .errors import InvalidLaunch
from .memory import Array, GlobalMemory, Span
from .module import Kernel
from .program import Program, compile_kernel
from .races import Races
from .shadow import SharedAccesses
from .trace import Recorder
from .wave import Shape, Wave

WAVE_LANES = 8192
"""Lanes that run together. FlashAttention forward, B1 H8 S2048 D128, on one core of an EPYC: 2.5, 1.75, 1.47, 1.47 s
for 2048, 4096, 8192, 16384 lanes; two threads over waves were slower (the interpreter lock), so there is one."""
MAX_SHARED_BYTES = 232448
"""227 KiB, the most that any architecture so far gives one CTA."""
MAX_CLUSTER = 16
"""CTAs in a cluster, with the attribute that allows more than the portable 8."""
QUEUED_WAVES = 4
"""Waves in which a kernel runs that may cancel CTAs not yet started (clusterlaunchcontrol), so that some are left."""


@dataclass
class LaunchRecord:
    """What a launch did. `instructions` counts executed warp instructions per opcode (a partial warp by its share).

    `profile` holds seconds per instruction family where it was asked for.
    """

    name: str
    grid: Shape
    cluster: Shape
    block: Shape
    shared_bytes: int
    seconds: float
    instructions: dict[str, int]
    profile: dict[str, float] = field(default_factory=dict)


def _check(kernel: Kernel, grid: Shape, cluster: Shape, block: Shape, shared_bytes: int, parameters: bytes) -> None:
    threads = block[0] * block[1] * block[2]
    problems = []
    if min(*grid, *block) < 1:
        problems.append("a dimension of the grid or block is not positive")
    if threads > 1024:
        problems.append(f"{threads} threads in a block, 1024 are allowed")
    if kernel.required_block and tuple(block) != kernel.required_block:
        problems.append(f"the kernel requires blocks of {kernel.required_block}")
    if kernel.max_threads and threads > kernel.max_threads:
        problems.append(f"{threads} threads in a block, the kernel allows {kernel.max_threads}")
    if grid[0] > 2**31 - 1 or max(grid[1:]) > 65535:
        problems.append("the grid is larger than (2^31 - 1, 65535, 65535)")
    if min(cluster) < 1 or math.prod(cluster) > MAX_CLUSTER:
        problems.append(f"clusters of {cluster} CTAs, {MAX_CLUSTER} in all are allowed")
    elif any(g % c for g, c in zip(grid, cluster, strict=True)):
        problems.append(f"the grid is not a multiple of the cluster {cluster}")
    if shared_bytes + kernel.static_shared_bytes > MAX_SHARED_BYTES:
        problems.append(f"{shared_bytes + kernel.static_shared_bytes} bytes of shared memory in a block")
    if len(parameters) < kernel.parameter_bytes:
        problems.append(f"{len(parameters)} bytes of parameters, the kernel takes {kernel.parameter_bytes}")
    if problems:
        raise InvalidLaunch(f"cannot launch {kernel.name} with grid {grid}, block {block}: " + "; ".join(problems))


def _shared_size(kernel: Kernel, dynamic: int) -> int:
    return kernel.dynamic_shared_start + dynamic if dynamic else kernel.static_shared_bytes


def cta_order(grid: Shape, cluster: Shape, random: np.random.Generator | None) -> Array:
    """[clusters, CTAs per cluster] linear CTA numbers: clusters in launch order or shuffled, CTAs by rank."""
    (gx, gy, gz), (cx, cy, cz) = grid, cluster
    numbers = np.arange(gx * gy * gz).reshape(gz // cz, cz, gy // cy, cy, gx // cx, cx)
    rows = numbers.transpose(0, 2, 4, 1, 3, 5).reshape(-1, cx * cy * cz)
    return rows if random is None else random.permutation(rows)


def _clusters_per_wave(kernel: Kernel, clusters: int, cluster_lanes: int, cooperative: bool) -> int:
    if cooperative:
        return clusters
    most = max(1, WAVE_LANES // cluster_lanes)
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
    kernel: Kernel,
    *,
    grid: Shape,
    block: Shape,
    shared_bytes: int,
    parameters: bytes,
    memory: GlobalMemory,
    cluster: Shape = (1, 1, 1),
    cooperative: bool = False,
    seed: int | None = None,
    uninitialized_shared: Literal["error", "poison"] = "error",
    accumulation: Literal["float32", "hardware"] = "float32",
    races: bool = False,
    profile: bool = False,
    trace: Recorder | None = None,
) -> LaunchRecord:
    """Runs `kernel` to completion and returns what it did; raises an `EmulatorError` at the first finding.

    grid, block, cluster: (x, y, z). shared_bytes: dynamic shared memory per CTA. parameters: the parameter buffer.
    memory: the only global memory that may be touched. cooperative: all CTAs run at the same time, however many.
    seed: shuffles the order in which CTAs and warps are stepped, and when asynchronous work completes.
    uninitialized_shared: "error" reports reads of shared memory that nobody wrote; "poison" lets them read 0xFF
    bytes (NaN), for programs that load rows they never use. accumulation: how tensor cores sum (see `tensor_core`).
    races: look for unordered accesses to shared memory (see `races`). profile: measure seconds per instruction family
    (slower). trace: records what warps do and wait for (see `trace`).
    """
    started = time.perf_counter()
    _check(kernel, grid, cluster, block, shared_bytes, parameters)
    program = compile_kernel(kernel)
    buffers = {name: np.frombuffer(data, np.uint8).copy() for name, data in kernel.constants.items()}
    if buffers:
        memory = memory.with_spans(Span(b.ctypes.data, b.nbytes, name) for name, b in buffers.items())
    random = None if seed is None else np.random.default_rng(seed)
    queue = deque(cta_order(grid, cluster, random))
    cluster_lanes = math.prod(cluster) * -(-math.prod(block) // 32) * 32
    per_wave = _clusters_per_wave(kernel, len(queue), cluster_lanes, cooperative)
    seconds_by_family: Counter[str] = Counter()

    def record(family: str, seconds: float) -> None:
        seconds_by_family[family] += seconds  # type: ignore[assignment]

    executed = np.zeros(len(program.blocks), np.int64)
    traced = None if trace is None else trace.begin(program, grid=grid, cluster=cluster, block=block, seed=seed)
    accesses = SharedAccesses.of(kernel) if races and _shared_size(kernel, shared_bytes) else None
    while queue:
        wave = Wave(
            kernel,
            np.concatenate([queue.popleft() for _ in range(min(per_wave, len(queue)))]),
            grid,
            block,
            _shared_size(kernel, shared_bytes),
            parameters,
            memory,
            {name: b.ctypes.data for name, b in buffers.items()},
            cluster=cluster,
            queue=queue,
            random=random,
            poison=uninitialized_shared == "poison",
            accumulation=accumulation,
            profile=record if profile else None,
        )
        if accesses is not None:
            wave.races = Races(wave, accesses)
        if traced is not None:
            traced.attach(wave)
        with _libraries().limit(limits=1, user_api="blas"):
            # The products are too small to share, and waiting threads of BLAS spin: six times slower on a busy machine.
            scheduler.run(wave, program, executed)
    return LaunchRecord(
        name=kernel.name,
        grid=grid,
        cluster=cluster,
        block=block,
        shared_bytes=shared_bytes,
        seconds=time.perf_counter() - started,
        instructions=_instruction_counts(program, executed),
        profile=dict(seconds_by_family.most_common()),
    )
