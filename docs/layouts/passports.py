"""Passports: where every tensor lies, how, whose it is and how long it lives."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from math import gcd
from typing import Any

from cute_attn.kernels.attention_sm80 import AttentionConfig, AttentionSm80
from cute_attn.kernels.tile_image import TILE_TOKENS, StaticLayout, TileImage

from .operands import RegisterTensor, register_tensors
from .tables import merged, table
from .tiles import NAMES, config_of

__all__ = [
    "BASE_ALIGN", "global_passports", "layout_text", "register_passports", "register_table", "shared_alignments",
    "shared_passports", "shared_table",
]  # fmt: skip

BASE_ALIGN = 1024
"""What the kernel asks of its dynamic shared memory; more than any of its tensors needs."""

_HOLDS = {
    "S": ("(e, hi), m tile, n8 tile", "accumulators of Q·Kᵀ, then the scores y", "one tile"),
    "P": ("A fragment, m tile, k block", "probabilities, S's elements in S's order", "one tile"),
    "O": ("(e, hi), m tile, n8 tile", "accumulators of P·V", "whole kernel"),
    "sums": ("(e, hi), m tile", "row sums, accumulators of P·1", "whole kernel"),
    "bias": ("row", "−m and the top of P, in base 2", "whole kernel"),
    "limit": ("row", "score from which the row is rescaled", "whole kernel"),
    "row_scale": ("row", "softmax_scale · log2 e, times Q's scale if there is no delta", "whole kernel"),
    "scores.row_scale": ("row", "Q's scale, where delta is added to the scores", "whole kernel"),
    "ones": ("m tile", "the matrix of ones, packed", "whole kernel"),
    "start": ("accumulator", "0x4B400000, opaque to the compiler", "whole kernel"),
}


def layout_text(layout: StaticLayout) -> str:
    """shape:stride, without the swizzle."""
    return f"`{layout.shape}:{layout.stride}`".replace(" ", "").replace(",)", ")")


def swizzle_text(layout: StaticLayout) -> str:
    return f"`<{','.join(map(str, layout.swizzle))}>`" if layout.swizzle else "–"


def _shared(name: str) -> list[tuple[str, str, StaticLayout, str, int, str]]:
    """(tensor, logical modes, layout, element, first byte, lifetime) of one recipe's shared memory."""
    kernel = AttentionSm80(config_of(name))
    image, tile = kernel.image, kernel.q_bytes
    element = image.keys if isinstance(image, TileImage) else kernel.recipe.element.__name__.lower()
    queries = ("sQ", "(row, byte)", kernel.q_planes, element, 0, "whole kernel")
    if not isinstance(image, TileImage):
        rows = [("sK", tile + image.k_offset), ("sV", tile + image.v_offset)]
        return [queries, *((t, "(token, byte)", image.planes, element, at, "one stage") for t, at in rows)]
    quantised = [
        ("sK", "(token, dim)" if image.keys == "int8" else "(token, byte)", image.k, image.keys, image.k_offset),
        ("sV", "(channel, token)", image.v, image.values, image.v_offset),
        ("sScale", "(c or −M·c, token)", image.scales, "float32", image.scale_offset),
    ]
    if kernel.delta_blocks:
        delta = StaticLayout((kernel.delta_blocks, TILE_TOKENS), (TILE_TOKENS, 1))
        quantised.append(("sDelta", "(Q block, token)", delta, "float32", image.nbytes))
    return [queries, *((*facts, tile + at, "one stage") for *facts, at in quantised)]


def shared_alignments(name: str) -> dict[str, int]:
    """Bytes by which each tensor is aligned in every stage."""
    nbytes = AttentionSm80(config_of(name)).stage_bytes
    return {
        tensor: gcd(BASE_ALIGN, first) if tensor == "sQ" else gcd(BASE_ALIGN, first, nbytes)
        for tensor, _, _, _, first, _ in _shared(name)
    }


SharedTensor = tuple[str, str, StaticLayout, str, str, int, str, str]
"""tensor, logical modes, layout, element, unit of the layout, alignment in bytes, owner, lifetime"""


def shared_table(tensors: Iterable[tuple[str, SharedTensor]]) -> str:
    """Of tensors in shared memory, each with its recipe's name."""
    rows = []
    for name, (tensor, modes, layout, element, unit, aligned, owner, lifetime) in tensors:
        extents = "×".join(map(str, layout.extents()))
        rows.append((f"`{name}`", tensor, f"{modes} = {extents}", element, layout_text(layout), unit,
                     swizzle_text(layout), f"{aligned} B", owner, lifetime))  # fmt: skip
    head = ("recipe", "tensor", "logical shape", "element", "shape:stride", "in", "swizzle", "aligned", "owner",
            "lives")  # fmt: skip
    return table(head, merged(rows))


def shared_passports() -> str:
    tensors = []
    for name in NAMES:
        aligned = shared_alignments(name)
        for tensor, modes, layout, element, _, lifetime in _shared(name):
            unit = "float32" if element == "float32" else "bytes"
            tensors.append((name, (tensor, modes, layout, element, unit, aligned[tensor], "CTA", lifetime)))
    return shared_table(tensors)


Held = dict[str, tuple[str, str, str]]
"""By the name of a tensor in registers: its modes, what it holds, how long it lives."""


def register_table(tensors: Iterable[tuple[str, RegisterTensor]], held: Held, owner: str) -> str:
    """Of tensors in the registers of an ``owner``, each with its recipe's name."""
    rows = []
    for name, tensor in tensors:
        modes, holds, lifetime = held[tensor.name]
        rows.append((f"`{name}`", tensor.name, modes, tensor.element, f"`{tensor.layout}`", tensor.registers, holds,
                     owner, lifetime))  # fmt: skip
    head = ("recipe", "tensor", "modes", "element", "shape:stride", "registers", "holds", "owner", "lives")
    return table(head, merged(rows))


def register_passports() -> str:
    tensors = ((name, tensor) for name in NAMES for tensor in register_tensors(config_of(name)).values())
    return register_table(tensors, _HOLDS, "warp")


_OPTIONS = ("smooth_q", "smooth_v", "varlen_k", "has_lse")
"""Fields of AttentionConfig that arguments are there for."""

_EXTENTS = {"keys": "BHT", "delta": ("B", "H", "⌈S/128⌉", "64·T")}
"""Names of the extents that are not fixed, where they are not those of rows of a sequence."""


def global_passports() -> str:
    """Of the kernel's arguments, from what the compiler is told of them."""
    rows = []
    for name in NAMES:
        given = config_of(name)
        quantised = AttentionSm80(given).recipe.quantised
        options = [field for field in _OPTIONS if quantised or not field.startswith("smooth")]
        full = dataclasses.replace(given, **dict.fromkeys(options, True))
        arguments = _arguments(full)
        needs = {f: arguments.keys() - _arguments(dataclasses.replace(full, **{f: False})).keys() for f in options}
        for argument, fake in arguments.items():
            element, align = fake.element_type.__name__.lower(), fake._assumed_align
            letters = _EXTENTS.get(argument, "BHS") if quantised else "BHS"
            there = ", ".join(f"`{field}`" for field, taken in needs.items() if argument in taken) or "always"
            rows.append((f"`{name}`", argument, there, element, _shape(fake, letters), _strides(fake), f"{align} B"))
    return table(("recipe", "tensor", "there", "element", "shape", "strides", "aligned"), merged(rows))


def _arguments(config: AttentionConfig) -> dict[str, Any]:
    """The tensors that a kernel takes, as the compiler sees them, by name."""
    names = list(inspect.signature(AttentionSm80.__call__).parameters)[1:]
    fakes = AttentionSm80(config).fake_arguments()
    return {name: fake for name, fake in zip(names, fakes, strict=True) if hasattr(fake, "element_type")}


def _shape(fake: Any, letters: Iterable[str]) -> str:
    names = iter(letters)
    return "[" + ", ".join(str(e) if isinstance(e, int) else next(names) for e in fake.shape) + "]"


def _strides(fake: Any) -> str:
    """Compact tensors are given by their shape; of others every row is."""
    last = fake.shape[-1]
    compact = not isinstance(last, int) or fake.stride[-2] == last
    return "compact" if compact else "any, rows contiguous"
