"""What instructions and copies cost, in a trace's units of time: one unit is the issue of a plain warp instruction.

Rates of the pipes are those of `cute_attn.pipe_costs`. What a copy takes is assumed: nobody measured it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache

from cute_attn.pipe_costs import TENSOR_RATES, Costs, costs_for

from ..memory import Array
from .work import SHAPE, SPECIAL_FUNCTIONS

LATENCY = 500
"""Units until an asynchronous copy has gone to memory and back: assumed."""
BYTES_PER_UNIT = 32
"""Bytes that one copy moves per unit: assumed."""
TIME = f"logical, not measured: 1 µs is 1 unit, the cost of a plain warp instruction; a copy takes {LATENCY} and more"
"""What the file and its readers are told about the time."""


def copy_units(nbytes: Array) -> Array:
    """How long asynchronous copies of these sizes take."""
    return LATENCY + -(-nbytes // BYTES_PER_UNIT)


def _tensor_units(opcode: str, rates: Mapping[str, int]) -> int:
    shape = SHAPE.search(opcode)
    assert shape is not None
    macs = int(shape[1]) * int(shape[2]) * int(shape[3])
    if opcode.startswith("wgmma"):
        macs //= 4  # a warp's quarter of the warpgroup's
    types = {*opcode.split(".")}
    if types & {"s8", "u8", "s4", "u4", "b1"}:
        kind = "i8"
    elif "e2m1" in types and not types & {"kind::f8f6f4", "kind::mxf8f6f4"}:
        kind = "f4"
    else:
        kind = "f8" if types & {"e4m3", "e5m2", "e2m3", "e3m2", "e2m1"} else "f16"
    if "tf32" in types:
        macs *= 2  # half the rate of f16
    rate = rates.get(f"{kind}_f32", 0) if "f32" in types else 0
    return max(1, math.ceil(macs / (rate or rates.get(kind) or rates["f16"])))


def _bytes_per_thread(opcode: str) -> int:
    if opcode.startswith(("ldmatrix", "stmatrix")):
        return 4 * int(re.search(r"\.x(\d)", opcode)[1])  # type: ignore[index]
    bits = re.search(r"\.[bsuf](\d+)$", opcode)
    count = re.search(r"\.v(\d)\.", opcode)
    return int(bits[1]) // 8 * (int(count[1]) if count else 1) if bits else 4


@lru_cache(maxsize=4096)
def units(opcode: str, target: str) -> int:
    """What one warp instruction costs its warp, in units of time, at the rates assumed in `pipe_costs`."""
    costs = costs_for(target) or Costs(TENSOR_RATES["sm_90"])
    base = opcode.split(".", 1)[0]
    if base == "mma":
        return _tensor_units(opcode, costs.tensor)
    if base in SPECIAL_FUNCTIONS:
        return int(costs.xu)
    if base == "shfl":
        return int(costs.shuffle)
    if opcode.startswith(("ld.shared", "st.shared", "ldmatrix", "stmatrix")):
        return max(4, _bytes_per_thread(opcode))  # 128 bytes per clock of an SM with four schedulers
    return 1


@lru_cache(maxsize=4096)
def wgmma_units(opcode: str, target: str) -> int:
    """How long the tensor cores are busy with a wgmma, which costs the warps that issue it one unit."""
    return _tensor_units(opcode, (costs_for(target) or Costs(TENSOR_RATES["sm_90"])).tensor)
