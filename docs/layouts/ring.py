"""What the kernels' `KvPipeline` and `SplitPipeline` do with their stages, recorded while they run on the emulator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, Uint8, const_expr
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from cute_attn import jit
from cute_attn.kernels.kv_pipeline import KvPipeline, SplitPipeline

__all__ = ["HalfStay", "Stay", "record", "record_split"]

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
class HalfStay:
    """K or V of one tile in a buffer that holds one tile.

    Half 2·i of the loop is that after the i-th `next_tile`, half 2·i + 1 that after the i-th `await_values`.

    requested: half in whose beginning it was asked for (-1: before the loop); used: half in which it is computed with
    """

    operand: str
    tile: int
    requested: int
    used: int


@dataclass(frozen=True)
class RingConfig:
    stages: int


@dataclass(frozen=True)
class _Recorder:
    """A source of tiles that copies nothing and writes down (time, place) of each request: stage, or 0 for K and 1 for
    V."""

    requests: cute.Tensor
    state: cute.Tensor  # int32: number of requests so far, time: iteration, or half of one

    def copy(self, ring: cute.Pointer, stage: Int32) -> None:
        self._record(stage // _STAGE_BYTES)

    def copy_keys(self, buffer: cute.Pointer) -> None:
        self._record(Int32(0))

    def copy_values(self, buffer: cute.Pointer) -> None:
        self._record(Int32(1))

    @cute.jit
    def _record(self, place: Int32) -> None:
        i = self.state[0]
        self.requests[i, 0] = self.state[1]
        self.requests[i, 1] = place
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
        requests = make_fake_compact_tensor(Int32, (cute.sym_int32(), 2), stride_order=(1, 0))
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
        source, stages, tiles = _Recorder(requests, state), self.config.stages, uses.shape[0]
        if const_expr(stages == 1):
            pipeline = SplitPipeline(source, ring)
        else:
            pipeline = KvPipeline.create(source, ring, _STAGE_BYTES, stages)
        pipeline.start(tiles)
        for i in cutlass.range(tiles, unroll=1):
            state[1] = 2 * i if const_expr(stages == 1) else i
            stage = pipeline.next_tile(tiles - 1 - i)
            uses[i] = Int32(stage.toint() - ring.toint()) // _STAGE_BYTES
            if const_expr(stages == 1):
                state[1] = 2 * i + 1
            pipeline.await_values(tiles - 1 - i)


def _walk(stages: int, tiles: int, requests_a_tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Requests (time, place) in their order, and the stage of every use."""
    requests = torch.full((tiles * requests_a_tile, 2), -9, dtype=torch.int32)
    uses = torch.full((tiles,), -9, dtype=torch.int32)
    jit.load(RecordedRing, RingConfig(stages), "sm_80", "emulator")(requests, uses)
    return requests, uses


@cache
def record(stages: int, tiles: int) -> list[Stay]:
    """Every tile's stay in shared memory, in the order of the visits. Raises RuntimeError if a tile is used elsewhere
    than where it was requested to."""
    requests, uses = _walk(stages, tiles, 1)
    if requests[:, 1].tolist() != uses.tolist():
        raise RuntimeError(f"requested to {requests[:, 1].tolist()}, used at {uses.tolist()}")
    when = requests[:, 0].tolist()
    return [Stay(tiles - 1 - i, int(uses[i]), when[i], i) for i in range(tiles)]


@cache
def record_split(tiles: int) -> list[HalfStay]:
    """The stays of K and V of every tile with one stage, in the order of the requests."""
    requests, _ = _walk(1, tiles, 2)
    seen = [0, 0]
    stays = []
    for when, operand in requests.tolist():
        i, seen[operand] = seen[operand], seen[operand] + 1
        stays.append(HalfStay("KV"[operand], tiles - 1 - i, when, 2 * i + operand))
    return stays
