"""How a command is told the recipe."""

from __future__ import annotations

import argparse

from cute_attn.recipe import Recipe, as_recipe

__all__ = ["add_recipe_arguments", "chosen_recipe"]


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="int8", help="preset (default: %(default)s)")
    parser.add_argument("--accumulate", help="accumulator of P·V, of those the recipe offers (default: the preset's)")


def chosen_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the arguments name. Raises ValueError for names that are not offered."""
    recipe = as_recipe(arguments.recipe)
    return recipe.replace(accumulate=arguments.accumulate) if arguments.accumulate else recipe
