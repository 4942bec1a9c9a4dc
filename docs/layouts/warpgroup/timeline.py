"""One CTA's warps on the emulator: when tiles come, when each warpgroup multiplies, and what it does in between."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from cute_attn import emulator, jit
from cute_attn.emulator.trace import Recorder
from cute_attn.kernels.attention_sm90 import AttentionSm90
from cute_attn.kernels.warpgroup_mma import ROWS
from cute_attn.recipe import recipes
from cute_attn.tile_images import FORMAT_DTYPES, pack_tile_images

from .kernels import ARCH, kernel_of

__all__ = ["NAME", "TILES", "Copy", "Span", "Timeline", "timeline"]

NAME = "int8_fp8"
TILES = 6
_RAGGED = 5
"""Keys that the last tile lacks, so that it needs a mask."""

S, P_V, WAIT, WORK = "S = Q·Kᵀ", "P·V", "waits for a tile", "works"


@dataclass(frozen=True)
class Copy:
    """A tile on its way into a stage, by logical time."""

    tile: int
    stage: int
    begin: int
    end: int


@dataclass(frozen=True)
class Span:
    """A stretch of a warpgroup's time: one of `S`, `P_V`, `WAIT` and `WORK`, for a tile; -1 before and after all."""

    kind: str
    tile: int
    begin: int
    end: int


@dataclass(frozen=True)
class Timeline:
    """copies: in the order of their requests; warpgroups: spans of each; producer: its waits for free stages."""

    copies: tuple[Copy, ...]
    warpgroups: tuple[tuple[Span, ...], ...]
    producer: tuple[tuple[int, int], ...]
    end: int


def _arguments(kernel: AttentionSm90) -> tuple:
    """One CTA's operands; scores are of all sizes, so that rows are rescaled now and then."""
    recipe, config = recipes()[NAME], kernel.config
    rows, keys, head_dim = ROWS * config.warpgroups, TILES * kernel.image.tokens - _RAGGED, config.head_dim
    generator = torch.Generator().manual_seed(0)

    def integers(count: int) -> torch.Tensor:
        return torch.randint(-127, 128, (1, 1, count, head_dim), generator=generator, dtype=torch.int8)

    k_scale = torch.full((1, 1, keys), 2.0**-10)
    v = integers(keys).to(FORMAT_DTYPES[recipe.pv_format])
    image = pack_tile_images(integers(keys), k_scale, v, recipe.qk_format, kernel.image.tokens, kernel.image.sum_rows)
    ones = torch.full((1, 1, rows), 2.0**-4), torch.zeros(1, 1, rows), torch.ones(1, 1, head_dim)
    out = torch.empty(1, 1, rows, head_dim, dtype=torch.float16)
    return integers(rows), *ones[:2], image, ones[2], None, None, None, out, None, keys, head_dim**-0.5, None, 1


@cache
def timeline() -> Timeline:
    """The trace of one CTA. Raises RuntimeError if it is not what the kernel's docstring says happens."""
    kernel = kernel_of(NAME)
    recorder = Recorder(ctas=1)
    run = jit.load(AttentionSm90, kernel.config, ARCH, "emulator")
    with emulator.settings(trace=recorder):
        run(*_arguments(kernel))
    (launch,) = recorder.launches
    operations = launch.operations[0]
    loads = [o for o in operations if o.name == "TMA load"]
    places = sorted({o.arguments["mbarrier"] for o in loads}, key=lambda place: int(place, 0))
    copies = tuple(
        Copy(TILES - 1 - i, places.index(o.arguments["mbarrier"]), o.start, o.end) for i, o in enumerate(loads)
    )
    full = {f"mbarrier {place}" for place in places}
    warpgroups = []
    for group in range(kernel.config.warpgroups):
        multiplied = [o for o in operations if o.engine.startswith(f"wgmma of warps {4 * group} ")]
        if len(multiplied) != 2 * TILES:
            raise RuntimeError(f"{len(multiplied)} groups of wgmma for {TILES} tiles")
        track = launch.tracks[0, 4 * group]
        waits = [s for s in track.slices if s.what in full]
        spans = [
            Span((S, P_V)[i % 2], TILES - 1 - i // 2, o.start, o.end)
            for i, o in enumerate(sorted(multiplied, key=lambda o: o.start))
        ]
        spans += [Span(WAIT, copies[_before(spans, s.end)].tile, s.start, s.end) for s in waits]
        warpgroups.append(tuple(_with_work(sorted(spans, key=lambda s: s.begin), track.end)))
    producer = launch.tracks[0, 4 * kernel.config.warpgroups]
    free = tuple((s.start, s.end) for s in producer.slices if s.what.startswith("mbarrier"))
    return Timeline(copies, tuple(warpgroups), free, max(t.end for t in launch.tracks.values()))


def _before(spans: list[Span], time: int) -> int:
    """Tiles that were multiplied before ``time``."""
    return sum(span.kind == S and span.begin < time for span in spans)


def _with_work(spans: list[Span], end: int) -> list[Span]:
    """Fills what lies between waits and MMAs."""
    filled, now, tile = [], 0, -1
    for span in spans:
        if span.begin > now:
            filled.append(Span(WORK, tile, now, span.begin))
        filled.append(span)
        now, tile = max(now, span.end), span.tile
    return [*filled, Span(WORK, tile, now, end)]
