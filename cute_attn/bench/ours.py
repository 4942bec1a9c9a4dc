"""This package's recipes as contenders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from cute_attn import attention, quantize
from cute_attn.arch import arch_from_name
from cute_attn.bench.contender import Formats, Prepared
from cute_attn.dispatch import Support, refusal
from cute_attn.problem import Problem
from cute_attn.recipe import Recipe, as_recipe, recipes

__all__ = ["Ours", "chosen_recipes", "recipe_from_text"]


class Ours:
    """One recipe, by its public call."""

    ours = True
    capturable = True

    def __init__(self, name: str, recipe: Recipe, arch: str) -> None:
        self.name, self.recipe, self.arch = name, recipe, arch
        self.quantises = recipe.quantises

    def formats(self, problem: Problem) -> Formats:
        return Formats(self.recipe.qk_format, self.recipe.pv_format, self.recipe.accumulate)

    def available(self) -> Support:
        return Support()

    def supports(self, problem: Problem) -> Support:
        return Support(refusal(self.recipe, arch_from_name(self.arch), problem))

    def prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Prepared:
        def call(*inputs: Any) -> Callable[[], torch.Tensor]:
            return lambda: attention(*inputs, recipe=self.recipe, causal=problem.causal, arch=self.arch)

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
    values: dict[str, object] = {}
    for change in filter(None, changes.split(",")):
        field, equals, value = change.partition("=")
        if not equals or field not in fields:
            raise ValueError(f"--recipes {text}: {change!r} is not FIELD=VALUE; fields are {', '.join(sorted(fields))}")
        values[field] = {"true": True, "false": False, "none": None}.get(value, value)
    return recipe.replace(**values)


def chosen_recipes(names: list[str] | None, arch: str) -> list[Ours]:
    """The recipes that ``--recipes`` names; None: every preset; ["none"]: none."""
    if names == ["none"]:
        return []
    texts = list(recipes()) if names is None else list(dict.fromkeys(names))
    return [Ours(text, recipe_from_text(text), arch) for text in texts]
