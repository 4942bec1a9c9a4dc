"""What a GPU could at most make of a main loop's cost, and what that asks of its memory. Assumptions, all of them:

* One warp scheduler per sub-partition issues one instruction a cycle; pipes take the cycles of `cute_attn.pipe_costs`.
* The steady main loop is all there is: no prologue, no epilogue, no masked tiles, no rescaling, no tail of a last wave.
* `upper`: everything overlaps, and the busiest of the issue slots and the pipes is busy all the time.
* `in_turns`: MMAs and softmax take turns, as in a kernel whose warps do not complement each other: the cycles of the
  tensor pipe, and after them those of the busiest of all else. Of the peers' published figures four lie between the
  two; SageAttention2 on Hopper, whose one warpgroup also waits for its loads, lies 6 % below.
* Warp-level MMAs on Hopper are given the rate of wgmma, which they are known not to reach (arXiv 2402.13499).
* All multiprocessors run at the boost clock of `cute_attn.gpus`; a chip at its power limit does not.
* L2: every CTA reads all of K and V once for its rows of Q, nothing is multicast. DRAM: each operand is read once and
  the output written once; with quantisation, K and V are read twice in 16 bits, for their statistics and to be
  quantised, Q once, and the quantised operands are written and read.
"""

from __future__ import annotations

from dataclasses import dataclass

from cute_attn.gpus import GPUS, SUB_PARTITIONS, Gpu
from cute_attn.pipe_costs import TENSOR_RATES

__all__ = ["BITS", "Bound", "Traffic", "bound", "gpus_of", "traffic"]

BITS = {"int4": 4, "int8": 8, "e4m3": 8, "float16": 16, "bfloat16": 16}
"""Of an element of Q, K and V, by format."""

_OUT_BYTES = 2


@dataclass(frozen=True)
class Bound:
    """pipe: what `upper` is bound by, "issue" or a pipe's name; upper, in_turns: TOPS, see above."""

    pipe: str
    upper: float
    in_turns: float


def gpus_of(arch: str) -> list[Gpu]:
    """The GPUs whose tensor cores have the rates that floors of ``arch`` are computed with: where float32 accumulation
    is slow those of GeForce cards, and not of the professional ones."""
    slow = any(kind.endswith("_f32") for kind in TENSOR_RATES.get(arch.rstrip("a"), {}))
    return [gpu for gpu in GPUS if gpu.arch == arch and not (slow and gpu.full_rate)]


def bound(slots: float, floors: dict[str, float], head_dim: int, gpu: Gpu) -> Bound:
    """slots, floors: per 32 scores, each of which is 4·D operations."""
    cycles = {"issue": slots, **floors}
    pipe = max(cycles, key=lambda name: cycles[name])
    rest = max(value for name, value in cycles.items() if name != "tensor")
    per_cycle = SUB_PARTITIONS * gpu.multiprocessors * 32 * 4 * head_dim
    rate = per_cycle * gpu.boost_mhz * 1e6 / 1e12
    return Bound(pipe, rate / cycles[pipe], rate / (cycles["tensor"] + rest))


@dataclass(frozen=True)
class Traffic:
    """l2_tb_s: 10¹² bytes per second that all CTAs together read from L2 at `Bound.upper`; memory_tops: the most TOPS
    that DRAM's bandwidth allows, attention alone, and memory_tops_whole with quantisation, at so many tokens."""

    l2_tb_s: float
    memory_tops: float
    memory_tops_whole: float


def traffic(upper: float, formats: tuple[str, str], rows: int, head_dim: int, tokens: int, gpu: Gpu) -> Traffic:
    """formats: of Q and K, and of V; rows: of Q per CTA; tokens: of Q and of K, as many heads for both."""
    q = k = BITS[formats[0]] / 8
    v = BITS[formats[1]] / 8
    operations = 4 * head_dim
    l2 = upper * (k + v) * head_dim / rows / operations
    quantises = formats[0] in ("int4", "int8", "e4m3")
    alone = q + k + v + _OUT_BYTES
    whole = alone + ((q + k + v) + 2 + 2 * 2 + 2 * 2 if quantises else 0)
    per_byte = operations * tokens / head_dim  # of every element of a row, which take part in `tokens` scores each
    return Traffic(l2, *(gpu.memory_gb_s * 1e9 * per_byte / each / 1e12 for each in (alone, whole)))
