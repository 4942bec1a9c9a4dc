"""Shared memory as ldmatrix sees it: which banks the eight rows of one phase fall into."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from cute_attn.kernels.operand_planes import operand_planes
from cute_attn.kernels.tile_image import TILE_TOKENS, StaticLayout

__all__ = ["BANK_GROUPS", "CHUNK", "PHASE_ROWS", "Placement", "conflict_ways", "phases", "placements"]

CHUNK = 16
"""Bytes of a row that one lane addresses for ldmatrix: four banks of 4 bytes, one bank group."""

BANK_GROUPS = 8
"""32 banks, four at a time."""

PHASE_ROWS = 8
"""Rows of one 8x8 matrix, read at once."""


@dataclass(frozen=True)
class Placement:
    """A way to lay (row, byte) of an operand in shared memory, with its name."""

    name: str
    note: str
    layout: StaticLayout


def placements(row_bytes: int) -> tuple[Placement, ...]:
    """Row-major, planes, and planes with the swizzle: what the kernels use comes last."""
    used = operand_planes(TILE_TOKENS, row_bytes)
    rows = StaticLayout((TILE_TOKENS, row_bytes), (row_bytes, 1))
    return (
        Placement("row-major", f"[{TILE_TOKENS}][{row_bytes} B]", rows),
        Placement("planes", f"[{row_bytes // 32}][{TILE_TOKENS}][32 B]", replace(used, swizzle=None)),
        Placement("planes, swizzled", f"the same under Swizzle{_angled(used.swizzle)}", used),
    )


def _angled(swizzle: tuple[int, int, int] | None) -> str:
    return "<" + ",".join(map(str, swizzle or ())) + ">"


def phases(layout: StaticLayout) -> list[list[int]]:
    """Offsets of the 16-byte chunks that each ldmatrix phase of an operand reads: eight rows, one chunk of each."""
    rows, row_bytes = layout.extents()
    return [
        [layout(first + i, byte) for i in range(PHASE_ROWS)]
        for byte in range(0, row_bytes, CHUNK)
        for first in range(0, rows, PHASE_ROWS)
    ]


def conflict_ways(phase: list[int]) -> int:
    """Most chunks of a phase that share a bank group: how often its memory has to be read; 1 is free of conflicts."""
    return max(Counter(offset // CHUNK % BANK_GROUPS for offset in phase).values())
