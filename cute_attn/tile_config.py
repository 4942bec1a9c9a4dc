"""Tile configs: what the autotuner varies. They change speed, never results beyond rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

__all__ = ["AnyTileConfig", "TileConfig", "WarpgroupTileConfig"]


@dataclass(frozen=True)
class TileConfig:
    """Shape of one CTA's work in a warp-MMA attention kernel; its KV tiles have 64 tokens.

    warps:   warps of a CTA, each with its own rows of Q
    m_tiles: 16-row MMA tiles of Q per warp
    stages:  KV tiles in shared memory: one in use and the others on their way. With 1, K and V take turns

    Raises ValueError for sizes that no kernel could have.
    """

    tile_tokens: ClassVar[int] = 64
    sum_rows: ClassVar[int] = 0
    """Rows of ones behind V in a tile image."""
    pack_gqa: ClassVar[bool] = False

    warps: int = 4
    m_tiles: int = 2
    stages: int = 2

    def __post_init__(self) -> None:
        _check(self, warps=(1, 2, 4, 8), m_tiles=(1, 2), stages=(1, 2, 3, 4))

    @property
    def rows(self) -> int:
        """Rows of Q per CTA (CTA_Q)."""
        return self.warps * self.warp_rows

    @property
    def warp_rows(self) -> int:
        """Rows of Q per warp, which share the decision to rescale."""
        return 16 * self.m_tiles


@dataclass(frozen=True)
class WarpgroupTileConfig:
    """Shape of one CTA's work in a warpgroup-MMA attention kernel (sm_90a); its KV tiles have 128 tokens.

    warpgroups: consumer warpgroups of a CTA, each with 64 rows of Q; one more warp loads for them
    stages:     KV tiles in shared memory: those in use and those on their way. Of unquantised recipes K and V of a tile
                take a stage each
    persistent: whether a CTA goes on with another block of rows, whose first tiles arrive while the last one is stored;
                otherwise every block of rows has a CTA
    fma_eighths: of every eight 2^x of P in E4M3, how many the FMA pipe computes (within 0.18 %, where E4M3 rounds by up
                to 6 %) so that the XU pipe has fewer; 0 for other formats
    pack_gqa:   whether a CTA's rows are those of all query heads that share a KV head, token by token: fewer rows are
                left empty where tokens are few, and K and V are read once for all of those heads
    overlap:    whether Q·Kᵀ of the next tile is on its way while a warpgroup computes 2^x of this one, and P·V while it
                seeks the next one's maximum. Needs the registers that one or two warpgroups have, and two stages
    cluster:    CTAs that bring K and V together, 1 or 2: two have neighbouring rows of a head, and each brings half of
                every tile to both, so that L2 is read half as often; neither gets ahead by more than `stages`

    Raises ValueError for sizes that no kernel could have.
    """

    tile_tokens: ClassVar[int] = 128
    sum_rows: ClassVar[int] = 8
    warp_rows: ClassVar[int] = 16

    warpgroups: int = 3
    stages: int = 2
    persistent: bool = True
    fma_eighths: int = 0
    pack_gqa: bool = False
    overlap: bool = False
    cluster: int = 1

    def __post_init__(self) -> None:
        _check(self, warpgroups=(1, 2, 3), stages=tuple(range(1, 9)), fma_eighths=tuple(range(9)), cluster=(1, 2))
        for field in ("persistent", "pack_gqa", "overlap"):
            if type(value := getattr(self, field)) is not bool:
                raise ValueError(f"config.{field}={value!r}; use True or False")

    @property
    def rows(self) -> int:
        """Rows of Q per CTA (CTA_Q)."""
        return 64 * self.warpgroups


AnyTileConfig = TileConfig | WarpgroupTileConfig


def _check(config: Any, **allowed: tuple[int, ...]) -> None:
    for field, values in allowed.items():
        value = getattr(config, field)
        if type(value) is not int or value not in values:  # 2.0 and True equal integers, but name other programs
            raise ValueError(f"config.{field}={value!r}; use one of {', '.join(map(str, values))}")
