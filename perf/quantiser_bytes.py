"""Bytes of global memory that the quantisers move, beside the fewest possible: no GPU needed, the emulator counts.

Moved are 32 bytes for each sector that a warp's load or store touches. The fewest are every input read once and every
output written once. Bytes that L2 serves a second time cost no DRAM traffic; the counts are upper bounds of it.

python perf/quantiser_bytes.py [--head-dims 64 128] [--tokens 1024] [--json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cute_attn import emulator, jit, kernel_calls
from cute_attn.kernels.delta_scores import DeltaConfig, DeltaScores
from cute_attn.kernels.quantize_query import BLOCK_TOKENS, QueryConfig, QueryRows
from cute_attn.kernels.rows import QuantizerConfig
from cute_attn.kernels.tile_image import TILE_TOKENS, TileImage
from cute_attn.recipe import recipes

HEADS = 2


@dataclass(frozen=True)
class Moved:
    """read, written: bytes that the launches moved; inputs, outputs: bytes of the tensors between which they did."""

    read: int
    written: int
    inputs: int
    outputs: int

    @property
    def ratio(self) -> float:
        return (self.read + self.written) / (self.inputs + self.outputs)

    def to_json(self) -> dict[str, float]:
        return {**self.__dict__, "ratio": round(self.ratio, 3)}


def moved(run: Callable[[], Any], inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> Moved:
    """What all launches of ``run`` moved together."""
    emulator.clear_launches()
    with emulator.settings(traffic=True, races=False):
        run()
    totals = [sum(launch.traffic.get(verb, 0) for launch in emulator.launches()) for verb in ("read", "write")]
    return Moved(*totals, *(sum(x.numel() * x.element_size() for x in tensors) for tensors in (inputs, outputs)))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()


def key_value(recipe: str, arch: str, head_dim: int, tokens: int) -> Moved:
    """K and V to tile images: statistics, their end, and tiles."""
    k, v = random(2, 1, HEADS, tokens, head_dim)
    results: list[torch.Tensor] = []

    def run() -> None:
        results.extend(x for x in kernel_calls.key_value_tiles(k, v, recipes()[recipe], arch) if x is not None)

    return moved(run, [k, v], results)


def query(keys: str, scale: str, smooth_q: bool, head_dim: int, tokens: int) -> Moved:
    q, k_mean = random(1, HEADS, tokens, head_dim), torch.zeros(1, HEADS, head_dim)
    bytes_per_row = TileImage(head_dim, keys=keys).key_bytes
    data = torch.empty(1, HEADS, tokens, bytes_per_row, dtype=torch.int8)
    rows = [torch.empty(1, HEADS, tokens) for _ in range(2)]
    mean = torch.empty(1, HEADS, -(-tokens // BLOCK_TOKENS), head_dim, dtype=q.dtype) if smooth_q else None
    config = QueryConfig(QuantizerConfig(head_dim, "float16"), keys, scale, smooth_q=smooth_q)
    kernel = jit.load(QueryRows, config, "sm_89" if keys == "e4m3" else "sm_80", "emulator")
    outputs = [data, *rows] if mean is None else [data, *rows, mean]
    return moved(lambda: kernel(q, k_mean, data, *rows, mean), [q, k_mean], outputs)


def delta_scores(head_dim: int, tokens: int) -> Moved:
    k, k_mean = random(1, HEADS, tokens, head_dim), torch.zeros(1, HEADS, head_dim)
    blocks, width = -(-tokens // BLOCK_TOKENS), -(-tokens // TILE_TOKENS) * TILE_TOKENS
    q_mean, delta = random(1, HEADS, blocks, head_dim), torch.empty(1, HEADS, blocks, width)
    kernel = jit.load(DeltaScores, DeltaConfig(QuantizerConfig(head_dim, "float16")), "sm_80", "emulator")
    return moved(lambda: kernel(q_mean, k, k_mean, None, delta), [q_mean, k, k_mean], [delta])


QUANTISERS: dict[str, Callable[[int, int], Moved]] = {
    "K and V, int8": lambda d, n: key_value("int8", "sm_80", d, n),
    "K and V, int8_fp16": lambda d, n: key_value("int8_fp16", "sm_80", d, n),
    "K and V, int8_fp8": lambda d, n: key_value("int8_fp8", "sm_89", d, n),
    "K and V, fp8": lambda d, n: key_value("fp8", "sm_89", d, n),
    "K and V, int8_fp8, sm_90a": lambda d, n: key_value("int8_fp8", "sm_90a", d, n),
    "K and V, fp8, sm_90a": lambda d, n: key_value("fp8", "sm_90a", d, n),
    "Q, int8 per token": lambda d, n: query("int8", "token", False, d, n),
    "Q, int8 per thread": lambda d, n: query("int8", "thread", False, d, n),
    "Q, e4m3 per thread": lambda d, n: query("e4m3", "thread", False, d, n),
    "Q, int4 per thread, smoothed": lambda d, n: query("int4", "thread", True, d, n),
    "delta scores": delta_scores,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 72, 128, 256])
    parser.add_argument("--tokens", type=int, default=1024, help="of Q, and of K and V (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    arguments = parser.parse_args()
    rows = [
        (name, head_dim, measure(head_dim, arguments.tokens))
        for name, measure in QUANTISERS.items()
        for head_dim in arguments.head_dims
    ]
    if arguments.json:
        print(json.dumps([{"kernel": name, "head_dim": d, **row.to_json()} for name, d, row in rows], indent=1))
        return
    print(f"Bytes per token of one head, {arguments.tokens} tokens, {HEADS} heads")
    print(f"{'':30s} head dim     read  written   inputs  outputs  moved / fewest")
    for name, head_dim, row in rows:
        cells = "  ".join(
            f"{n / HEADS / arguments.tokens:7.1f}" for n in (row.read, row.written, row.inputs, row.outputs)
        )
        print(f"{name:30s} {head_dim:8d}  {cells}  {row.ratio:14.3f}")


if __name__ == "__main__":
    main()
