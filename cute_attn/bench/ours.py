"""This package's recipes as contenders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from cute_attn import attention, quantize
from cute_attn.arch import arch_from_name
from cute_attn.bench.contender import Formats, Prepared
from cute_attn.dispatch import Support, default_config, refusal
from cute_attn.problem import Problem
from cute_attn.recipe import Recipe, as_recipe, recipes
from cute_attn.tile_config import AnyTileConfig, TileConfig, WarpgroupTileConfig

__all__ = ["Ours", "chosen_recipes", "recipe_from_text", "tile_from_text"]


class Ours:
    """One recipe, by its public call; ``tile``: fields of the default tile config that are changed."""

    ours = True
    capturable = True

    def __init__(self, name: str, recipe: Recipe, arch: str, tile: dict[str, Any] | None = None) -> None:
        self.name, self.recipe, self.arch, self._tile = name, recipe, arch, tile or {}
        self.quantises = recipe.quantises

    def config(self, problem: Problem) -> AnyTileConfig | None:
        """The tile config to ask for; None: the default. Raises ValueError for fields that the default lacks."""
        if not self._tile:
            return None
        default = default_config(self.recipe, problem, arch_from_name(self.arch))
        fields = [field.name for field in dataclasses.fields(default)]
        if unknown := [name for name in self._tile if name not in fields]:
            kind = type(default).__name__
            raise ValueError(f"a {kind}, of {self.arch}, has no field {unknown[0]!r}; use one of {', '.join(fields)}")
        return dataclasses.replace(default, **self._tile)

    def formats(self, problem: Problem) -> Formats:
        return Formats(self.recipe.qk_format, self.recipe.pv_format, self.recipe.accumulate)

    def available(self) -> Support:
        return Support()

    def supports(self, problem: Problem) -> Support:
        arch = arch_from_name(self.arch)
        if reason := refusal(self.recipe, arch, problem):
            return Support(reason)
        try:
            return Support(refusal(self.recipe, arch, problem, self.config(problem)))
        except ValueError as error:
            return Support(str(error))

    def prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Prepared:
        config = self.config(problem)

        def call(*inputs: Any) -> Callable[[], torch.Tensor]:
            return lambda: attention(*inputs, recipe=self.recipe, causal=problem.causal, arch=self.arch, config=config)

        if not self.quantises:
            return Prepared(call(q, k, v))
        return Prepared(call(*quantize(q, k, v, recipe=self.recipe, arch=self.arch)), call(q, k, v))


def recipe_from_text(text: str) -> Recipe:
    """A preset's name, or one with some fields changed: ``int8_fp16:accumulate=float16+float32,smooth_v=true``.

    Raises ValueError for names and values that are not offered.
    """
    name, _, changes = text.partition(":")
    recipe = as_recipe(name)
    fields = {field.name for field in dataclasses.fields(recipe)} - {"name"}
    return recipe.replace(**_changes(text, changes, fields))


def tile_from_text(text: str) -> dict[str, Any]:
    """Fields of a tile config and their values: ``warpgroups=2,overlap=true``. Raises ValueError for other fields."""
    fields = {field.name for tile in (TileConfig, WarpgroupTileConfig) for field in dataclasses.fields(tile)}
    return {
        name: int(value) if isinstance(value, str) and value.isdecimal() else value
        for name, value in _changes(text, text, fields).items()
    }


def _changes(text: str, changes: str, fields: set[str]) -> dict[str, object]:
    values: dict[str, object] = {}
    for change in filter(None, changes.split(",")):
        field, equals, value = change.partition("=")
        if not equals or field not in fields:
            raise ValueError(f"--recipes {text}: {change!r} is not FIELD=VALUE; fields are {', '.join(sorted(fields))}")
        values[field] = {"true": True, "false": False, "none": None}.get(value, value)
    return values


def chosen_recipes(names: list[str] | None, arch: str) -> list[Ours]:
    """The recipes that ``--recipes`` names, each perhaps with ``@`` and what is changed in its default tile config:
    ``int8_fp8@warpgroups=2,overlap=true``; None: every preset; ["none"]: none.
    """
    if names == ["none"]:
        return []
    chosen = []
    for text in list(recipes()) if names is None else list(dict.fromkeys(names)):
        recipe, _, tile = text.partition("@")
        chosen.append(Ours(text, recipe_from_text(recipe), arch, tile_from_text(tile)))
    return chosen
