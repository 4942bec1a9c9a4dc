"""How a command is told the recipe."""

from __future__ import annotations

import argparse

from cute_attn.recipe import Recipe, as_recipe

__all__ = ["add_recipe_arguments", "chosen_recipe"]

_TEXTS = {
    "accumulate": "accumulator of P·V",
    "exponent": "how P = 2^x is computed",
    "qk_scale": "which tokens of Q and K share a scale",
    "v_scale": "which channels of V share a scale",
}
_FLAGS = {"smooth_q": "subtract Q's mean per 128 rows", "smooth_v": "subtract V's mean"}


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """A preset, and the fields of it that may be changed."""
    parser.add_argument("--recipe", default="int8", help="preset (default: %(default)s)")
    for field, text in _TEXTS.items():
        parser.add_argument(_option(field), help=f"{text}, of those the recipe offers (default: the preset's)")
    for field, text in _FLAGS.items():
        action = argparse.BooleanOptionalAction
        parser.add_argument(_option(field), action=action, help=f"{text} (default: the preset's)")


def chosen_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the arguments name. Raises ValueError for names that are not offered."""
    changes = {field: getattr(arguments, field) for field in (*_TEXTS, *_FLAGS)}
    return as_recipe(arguments.recipe).replace(**{k: v for k, v in changes.items() if v is not None})
