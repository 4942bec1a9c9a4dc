"""Static configuration of the Hopper attention kernel, and which of them can be compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .attention_arguments import HEAD_DIMS, OUT_DTYPES
from .kv_ring import KvRing
from .softmax_warpgroup import value_parts
from .warpgroup_mma import ROWS
from .warpgroup_recipes import LOG_LINEAR_RECIPES, TILE_TOKENS, WARPGROUP_RECIPES
from .work_queue import WorkQueue

__all__ = [
    "CONSUMER_REGISTERS",
    "PRODUCER_REGISTERS",
    "AttentionSm90Config",
    "product_registers",
    "refusal",
    "shared_bytes",
]

PRODUCER_REGISTERS = 24
CONSUMER_REGISTERS = {1: 240, 2: 240, 3: 160}
"""Registers a thread: the 65536 of a multiprocessor over the threads, in steps of 8. The producer needs few, and gives
the others up: by consumer warpgroups, 24 · 128 + registers · 128 · warpgroups <= 65536."""

# CUDA C++ Programming Guide, technical specifications: dynamic shared memory of a CTA.
_SHARED_BYTES = 227 * 1024

# What scales of single tokens take beside P·V with `overlap`. With fewer ptxas spills.
_TOKEN_SCALES_REGISTERS = 24


@dataclass(frozen=True)
class AttentionSm90Config:
    """Static configuration: one compiled kernel per value.

    head_dim:  D, a multiple of 8 from 16 to 256
    out_dtype: "float16" or "bfloat16"
    causal:    query i sees keys up to i + seq_k - seq_q
    has_lse:   whether the log-sum-exp is written
    out_align: alignment in bytes of every row of the output, 16, 8, 4 or 2: the width of its stores
    warpgroups, stages: consumer warpgroups of 64 query rows per CTA, KV tiles in shared memory; in recipes fp16 and
               bf16, whose K and V take turns, tiles of K or V
    persistent: whether CTAs go on with another block of rows while there are any, so that its first KV tiles arrive and
               its Q is read while the last one is stored; otherwise every block has a CTA
    l2_bytes:  heads are started in groups whose KV tiles fit in this many bytes of L2: half of the 50 MB of an H100,
               whose other half is far
    recipe, accumulate, exponent: as of cute_attn.Recipe
    k_scale_per_token: whether every token of K has a scale of its own, which costs a multiplication per score;
               otherwise the tokens {16i + 4t … + 3} of a tile share theirs, for each t
    fma_eighths: of every eight 2^x how many the FMA pipe computes instead of the XU pipe, within 0.18 %: for E4M3
               values, which round P by up to 6 %. With exponent "fast" there are none
    overlap:   whether a warpgroup multiplies while it computes 2^x: Q·Kᵀ of the next tile is on its way then. Takes
               the registers of one or two warpgroups, and two stages or more
    cluster:   CTAs that bring K and V together, 1 or 2: they have neighbouring blocks of rows of a head, and each
               brings half of every tile to both, so that L2 is read half as often. Neither gets ahead by more than
               `stages`, and a block of rows without neighbour leaves its CTA with nothing to do
    smooth_v:  whether a tensor brings back V's mean
    varlen_k:  whether every batch element has its own number of keys, given by a tensor
    pack_gqa:  whether a CTA's rows are those of all query heads that share a KV head, token by token. A CTA of few
               tokens has more rows to multiply then, and K and V are read once for all of those heads
    """

    head_dim: int
    out_dtype: str = "float16"
    causal: bool = False
    has_lse: bool = False
    out_align: int = 16
    warpgroups: int = 3
    stages: int = 4
    persistent: bool = True
    l2_bytes: int = 25 << 20
    recipe: str = "int8_fp8"
    accumulate: str = "float32+float32"
    exponent: str = "exact"
    k_scale_per_token: bool = False
    fma_eighths: int = 0
    overlap: bool = False
    cluster: int = 1
    smooth_v: bool = False
    varlen_k: bool = False
    pack_gqa: bool = False


def refusal(config: AttentionSm90Config) -> str | None:
    """None, or why there is no kernel of this configuration."""
    allowed: dict[str, tuple[Any, ...]] = {
        "recipe": tuple(WARPGROUP_RECIPES),
        "out_dtype": tuple(OUT_DTYPES),
        "out_align": (16, 8, 4, 2),
        "warpgroups": (1, 2, 3),
        "stages": (1, 2, 3, 4, 5, 6, 7, 8),
        "exponent": ("exact", "fast") if config.recipe in LOG_LINEAR_RECIPES else ("exact",),
        "overlap": (False, True),
        "cluster": (1, 2),
        "fma_eighths": range(9) if config.recipe in ("int8_fp8", "fp8") and config.exponent == "exact" else (0,),
    }
    if config.head_dim not in HEAD_DIMS:
        return f"head_dim={config.head_dim!r} is not a multiple of 8 from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"
    for field, values in allowed.items():
        if (value := getattr(config, field)) not in values:
            given = f" with recipe={config.recipe!r}" if field in ("exponent", "fma_eighths") else ""
            given += f" and exponent={config.exponent!r}" if field == "fma_eighths" else ""
            return f"{field}={value!r}{given} is not one of {', '.join(map(str, values))}"
    if config.accumulate != (expected := WARPGROUP_RECIPES[config.recipe].accumulate):
        return f"accumulate={config.accumulate!r} is not {expected}, which recipe={config.recipe!r} needs"
    registers = CONSUMER_REGISTERS[config.warpgroups]
    image = WARPGROUP_RECIPES[config.recipe].image(config.head_dim)
    if config.overlap and (reason := _overlap_refusal(config, image)):
        return f"overlap=True {reason}, or overlap=False"
    if value_parts(image, registers) is None:
        return (
            f"warpgroups={config.warpgroups} leave {registers} registers a thread, too few for "
            f"head_dim={config.head_dim}: use warpgroups=2"
        )
    if (needed := shared_bytes(config)) > _SHARED_BYTES:
        return (
            f"stages={config.stages} need {needed} bytes of shared memory with warpgroups={config.warpgroups} and "
            f"head_dim={config.head_dim}; a CTA has {_SHARED_BYTES}: use fewer"
        )
    if config.smooth_v and not WARPGROUP_RECIPES[config.recipe].quantised:
        return f"recipe={config.recipe!r} smooths nothing, because it quantises nothing"
    return None


def product_registers(config: AttentionSm90Config) -> int:
    """Of a consumer thread, registers for P·V and what comes with it: all but those of the next tile's scores."""
    registers = CONSUMER_REGISTERS[config.warpgroups]
    if config.overlap:
        registers -= TILE_TOKENS // 2 + (_TOKEN_SCALES_REGISTERS if config.k_scale_per_token else 0)
    return registers


def _overlap_refusal(config: AttentionSm90Config, image: Any) -> str | None:
    """Why a configuration has no kernel in which products overlap with the softmax, and what to use instead."""
    if config.warpgroups > 2:
        return (
            f"needs registers for the scores of two tiles; warpgroups={config.warpgroups} leave "
            f"{CONSUMER_REGISTERS[config.warpgroups]} a thread: use warpgroups=2 or 1"
        )
    if config.stages == 1:
        return "needs the next tile's K beside a tile's V, stages=1 hold one of them: use stages=2 or more"
    if config.exponent == "fast":
        return "has no 2^x to overlap with at exponent='fast': use exponent='exact'"
    parts = value_parts(image, product_registers(config))
    if parts is None or len(parts) > (2 if config.accumulate == "int32" else 1):
        return (
            f"leaves {product_registers(config)} registers a thread beside the next tile's scores, too few for "
            f"head_dim={config.head_dim} with k_scale_per_token={config.k_scale_per_token}: use a smaller head_dim"
        )
    return None


def shared_bytes(config: AttentionSm90Config) -> int:
    """Dynamic shared memory of a CTA: Q, the stages and their barriers, and the queue's mailbox."""
    recipe = WARPGROUP_RECIPES[config.recipe]
    image = recipe.image(config.head_dim)
    queries = ROWS * config.warpgroups * image.key_bytes
    return (
        queries
        + config.stages * (image.nbytes // recipe.turns)
        + KvRing.barrier_bytes(config.stages)
        + WorkQueue.nbytes()
    )
