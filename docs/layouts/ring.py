"""What the kernels' `KvPipeline` does with its stages, recorded while it runs on the emulator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, Uint8
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from cute_attn import jit
from cute_attn.kernels.kv_pipeline import KvPipeline

__all__ = ["Stay", "record"]

_STAGE_BYTES = 256
_BEFORE = -1
"""The iteration of requests made by `start`, before the first tile."""


@dataclass(frozen=True)
class Stay:
    """One tile in shared memory: requested in iteration ``requested`` (-1: before the loop), used in ``used``."""

    tile: int
    stage: int
    requested: int
    used: int


@dataclass(frozen=True)
class RingConfig:
    stages: int


@dataclass(frozen=True)
class _Recorder:
    """A source of tiles that copies nothing and writes down (iteration, stage) of each request."""

    requests: cute.Tensor
    state: cute.Tensor  # int32: number of requests so far, iteration

    @cute.jit
    def copy(self, ring: cute.Pointer, stage: Int32) -> None:
        i = self.state[0]
        self.requests[i, 0] = self.state[1]
        self.requests[i, 1] = stage // _STAGE_BYTES
        self.state[0] = i + 1


class RecordedRing:
    """One thread walks the tiles as `AttentionSm80.attend` does."""

    def __init__(self, config: RingConfig):
        self.config = config

    @staticmethod
    def can_implement(config: RingConfig) -> str | None:
        return None

    def fake_arguments(self) -> tuple:
        tiles = cute.sym_int32()
        requests = make_fake_compact_tensor(Int32, (tiles, 2), stride_order=(1, 0))
        uses = make_fake_compact_tensor(Int32, (tiles,))
        return requests, uses, make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, requests: cute.Tensor, uses: cute.Tensor, stream):
        smem = self.config.stages * _STAGE_BYTES
        self.kernel(requests, uses).launch(grid=(1, 1, 1), block=(1, 1, 1), smem=smem, stream=stream)

    @cute.kernel
    def kernel(self, requests: cute.Tensor, uses: cute.Tensor):
        ring = cute.arch.get_dyn_smem(Uint8, alignment=1024)
        state = cute.make_rmem_tensor((2,), Int32)
        state[0], state[1] = Int32(0), Int32(_BEFORE)
        pipeline = KvPipeline.create(_Recorder(requests, state), ring, _STAGE_BYTES, self.config.stages)
        tiles = uses.shape[0]
        pipeline.start(tiles)
        for i in cutlass.range(tiles, unroll=1):
            state[1] = i
            stage = pipeline.next_tile(tiles - 1 - i)
            uses[i] = Int32(stage.toint() - ring.toint()) // _STAGE_BYTES


@cache
def record(stages: int, tiles: int) -> list[Stay]:
    """Every tile's stay in shared memory, in the order of the visits. Raises RuntimeError if a tile is used elsewhere
    than where it was requested to."""
    requests, uses = torch.full((tiles, 2), -9, dtype=torch.int32), torch.full((tiles,), -9, dtype=torch.int32)
    jit.load(RecordedRing, RingConfig(stages), "sm_80", "emulator")(requests, uses)
    if requests[:, 1].tolist() != uses.tolist():
        raise RuntimeError(f"requested to {requests[:, 1].tolist()}, used at {uses.tolist()}")
    when = requests[:, 0].tolist()
    return [Stay(tiles - 1 - i, uses[i].item(), when[i], i) for i in range(tiles)]
