"""Tile configs: what the autotuner varies. They change speed, never results beyond rounding."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TileConfig"]


@dataclass(frozen=True)
class TileConfig:
    """Shape of one CTA's work in a warp-MMA attention kernel.

    warps:   warps of a CTA, each with its own rows of Q
    m_tiles: 16-row MMA tiles of Q per warp
    stages:  KV tiles in shared memory: one in use and the others on their way. With 1, K and V take turns

    Raises ValueError for sizes that no kernel could have.
    """

    warps: int = 4
    m_tiles: int = 2
    stages: int = 2

    def __post_init__(self) -> None:
        for field, allowed in (("warps", (1, 2, 4, 8)), ("m_tiles", (1, 2)), ("stages", (1, 2, 3, 4))):
            value = getattr(self, field)
            if type(value) is not int or value not in allowed:  # 2.0 and True equal integers, but name other programs
                raise ValueError(f"config.{field}={value!r}; use one of {', '.join(map(str, allowed))}")

    @property
    def rows(self) -> int:
        """Rows of Q per CTA (CTA_Q)."""
        return self.warps * self.m_tiles * 16
