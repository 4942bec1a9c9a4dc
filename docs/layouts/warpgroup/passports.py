"""Passports: where every tensor lies, how, whose it is and how long it lives."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from cute_attn.kernels.kv_ring import KvRing
from cute_attn.kernels.swizzled_tile import SwizzledTile
from cute_attn.kernels.tile_image import StaticLayout
from cute_attn.kernels.work_queue import WorkQueue

from ..passports import BASE_ALIGN, register_table, shared_table
from .cores import bytes_of
from .kernels import SHOWN, kernel_of
from .operands import register_tensors

__all__ = ["register_passports", "shared_passports", "shared_tensors"]

_HOLDS = {
    "S": ("(e, hi), n8 tile", "accumulators of Q·Kᵀ, then the scores y", "one tile"),
    "P": ("A fragment, –, k block", "probabilities, S's elements in S's order", "one tile"),
    "PV": ("(e, hi, n8 tile)", "P·V and P·1 of one tile", "one tile"),
    "O": ("(e, hi), –, n8 tile", "the output before the division; with rows of ones, row sums last", "one block"),
    "bias": ("row", "−m and the top of P, in base 2", "one block"),
    "row_scale": ("row", "softmax_scale · log2 e, times Q's scale if it has one", "one block"),
    "sums": ("row", "this lane's part of the row sums", "one block"),
}

Tensor = tuple[str, str, StaticLayout, str, str, int, str, str]


def shared_tensors(name: str) -> list[tuple[Tensor, int]]:
    """((tensor, logical modes, layout, element, unit of the layout, first byte, owner, lifetime), alignment in bytes in
    every stage, or of every warpgroup)."""
    kernel = kernel_of(name)
    image, config = kernel.image, kernel.config
    tiles = config.warpgroups * kernel.q_bytes
    barriers = tiles + config.stages * kernel.stage_bytes
    count = KvRing.barrier_bytes(config.stages) // KvRing.barrier_bytes(0)
    if isinstance(image, SwizzledTile):
        rows = replace(bytes_of(image.rows, 2), swizzle=image.block.swizzle)
        element, operands = image.values, [
            ("sK", "(token, byte)", rows, image.values, "bytes", tiles),
            ("sV", "(token, byte)", rows, image.values, "bytes", tiles),
        ]  # fmt: skip
    else:
        element, operands = image.keys, [
            ("sK", "(token, dim)", image.k, image.keys, "bytes", tiles + image.k_offset),
            ("sV", "(channel, token)", image.v, image.values, "bytes", tiles + image.v_offset),
            ("ones", "(byte of 8 rows, plane)", image.ones, image.values, "bytes", tiles + image.ones_offset),
            ("sScale", "(1, token)", image.scales, "float32", "float32", tiles + image.scale_offset),
        ]  # fmt: skip
    queries: Tensor = ("sQ", "(row, byte)", kernel.q_planes, element, "bytes", 0, "warpgroup", "one block")
    ring: Tensor = ("barriers", "(barrier)", StaticLayout((count,), (1,)), "mbarrier, 8 B", "mbarriers", barriers,
                    "CTA", "whole kernel")  # fmt: skip
    behind = barriers + KvRing.barrier_bytes(config.stages)
    words = WorkQueue.nbytes() // 8
    mailbox: Tensor = ("mailbox", "(barrier or two numbers)", StaticLayout((words,), (1,)), "mbarrier, 8 B", "8 B",
                       behind, "CTA", "whole kernel")  # fmt: skip
    found: list[tuple[Tensor, int]] = [(queries, gcd(BASE_ALIGN, kernel.q_bytes))]
    found += [((*facts, "CTA", "one stage"), gcd(BASE_ALIGN, facts[-1], kernel.stage_bytes)) for facts in operands]
    return [*found, (ring, gcd(BASE_ALIGN, barriers)), (mailbox, gcd(BASE_ALIGN, behind))]


def shared_passports() -> str:
    tensors = []
    for name in SHOWN:
        for (tensor, modes, layout, element, unit, _, owner, lifetime), aligned in shared_tensors(name):
            tensors.append((name, (tensor, modes, layout, element, unit, aligned, owner, lifetime)))
    return shared_table(tensors)


def register_passports() -> str:
    tensors = ((name, tensor) for name in SHOWN for tensor in register_tensors(name).values())
    return register_table(tensors, _HOLDS, "lane")
