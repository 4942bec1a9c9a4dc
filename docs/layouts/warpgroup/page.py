"""docs/hopper.md: figures by file name, and the parts of the page between its markers."""

from __future__ import annotations

from ..page import Page
from . import tabulated
from .draw_cores import draw_blocks, draw_planes
from .draw_permutation import draw_sums, draw_tokens
from .draw_tile import draw_tile
from .draw_timeline import draw_timeline
from .lse import lse_table
from .passports import register_passports, shared_passports
from .timeline import NAME

__all__ = ["HOPPER"]

HOPPER = Page(
    "hopper.md",
    {
        "hopper_timeline": draw_timeline,
        "hopper_tile": draw_tile,
        "hopper_planes": draw_planes,
        "hopper_blocks": draw_blocks,
        "hopper_tokens": lambda: draw_tokens(NAME),
        "hopper_sums": lambda: draw_sums(NAME),
    },
    {
        "roles": tabulated.role_table,
        "barriers": tabulated.barrier_table,
        "recipes": tabulated.recipe_table,
        "elsewhere": tabulated.elsewhere_table,
        "operands": tabulated.operand_table,
        "fragments": tabulated.fragment_table,
        "shared": shared_passports,
        "registers": register_passports,
        "shared budget": tabulated.shared_table,
        "register budget": tabulated.register_table,
        "cost": tabulated.cost_table,
        "lse": lse_table,
    },
)
