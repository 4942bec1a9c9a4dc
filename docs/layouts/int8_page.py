"""docs/int8_layouts.md: the warp-MMA family."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from . import tabulated
from .draw_banks import draw_banks
from .draw_budgets import draw_registers
from .draw_fragments import draw_mma
from .draw_loop import draw_loop
from .draw_permutations import draw_channels, draw_tokens
from .draw_ring import draw_ring, draw_split
from .draw_tiles import draw_tiles
from .fragments import MMAS, Mma, fragments
from .page import Page
from .passports import global_passports, register_passports, shared_passports
from .svg import Svg
from .tiles import HEAD_DIM

__all__ = ["INT8", "drawn_mmas"]


def drawn_mmas() -> list[Mma]:
    """One MMA of each set of fragments: u8 · s8 has those of s8 · s8."""
    first: dict[tuple, Mma] = {}
    for mma in MMAS:
        first.setdefault((mma.bits, *(fragment.layout for fragment in fragments(mma).values())), mma)
    return list(first.values())


_FIGURES: dict[str, Callable[[], Svg]] = {
    **{mma.name: partial(draw_mma, mma) for mma in drawn_mmas()},
    "banks": lambda: draw_banks(HEAD_DIM),
    "tokens": lambda: draw_tokens(HEAD_DIM),
    "channels": lambda: draw_channels(HEAD_DIM),
    "tiles": draw_tiles,
    "ring": lambda: draw_ring((2, 3)),
    "split": draw_split,
    "registers": draw_registers,
    "loop": draw_loop,
}

_PARTS: dict[str, Callable[[], str]] = {
    "global": global_passports,
    "shared": shared_passports,
    "registers": register_passports,
    "fragments": tabulated.fragment_table,
    "banks": tabulated.bank_table,
    "copies": tabulated.copy_table,
    "register budget": tabulated.register_table,
    "shared budget": tabulated.shared_table,
    "padding": tabulated.padding_table,
    "mmas": tabulated.mma_table,
    "main loop": tabulated.loop_tables,
}


INT8 = Page("int8_layouts.md", _FIGURES, _PARTS)
