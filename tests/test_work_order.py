"""The order of blocks of query rows, and what it leaves idle at the end, counted in KV tiles."""

from __future__ import annotations

import heapq
import itertools
import statistics

import pytest

from cute_attn.kernels.attention_sm90_config import AttentionSm90Config
from cute_attn.kernels.tile_image import TileImage
from cute_attn.kernels.work_order import WorkOrder

CTAS = 132
ROWS, TOKENS = 192, 128


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "together", "blocks"), [(1, 1, 1), (7, 3, 5), (8, 8, 1), (12, 5, 4)])
def test_every_block_comes_once_and_the_longest_of_a_group_first(heads, together, blocks, causal):
    order = WorkOrder(heads, together, blocks)
    places = [order.at(i, last_first=causal) for i in range(order.count)]
    assert sorted(places) == list(itertools.product(range(heads), range(blocks)))
    groups = [head // together for head, _ in places]
    assert groups == sorted(groups)
    for group in range(max(groups) + 1):
        seen = [block for head, block in places if head // together == group]
        assert seen == sorted(seen, reverse=causal)


@pytest.mark.parametrize(
    ("tokens", "late_drawn", "late_counted"),
    [
        (1024, 0.031, 0.096),
        (2048, 0.011, 0.123),
        (4096, 0.010, 0.039),
        (8192, 0.004, 0.003),
        (16384, 0.002, 0.029),
    ],
)
def test_causal_blocks_end_together_if_drawn(tokens, late_drawn, late_counted):
    """The figures of docs/hopper.md: by how much the last of 132 CTAs ends after the mean, at B4 H32 D128."""
    lengths = _tiles_of_blocks(heads=128, tokens=tokens)
    drawn, counted = [0] * CTAS, [0] * CTAS
    for i, tiles in enumerate(lengths):
        heapq.heapreplace(drawn, drawn[0] + tiles)
        counted[i % CTAS] += tiles
    assert (_late(drawn), _late(counted)) == pytest.approx((late_drawn, late_counted), abs=0.0005)


def _tiles_of_blocks(heads: int, tokens: int) -> list[int]:
    """KV tiles that the blocks see, in their order."""
    stage = TileImage(128, "e4m3", "int8", TOKENS, sum_rows=8)
    fitting = min(AttentionSm90Config(128).l2_bytes // (tokens // TOKENS * stage.nbytes), heads)
    together = -(-heads // -(-heads // fitting))
    order = WorkOrder(heads, together, -(-tokens // ROWS))
    places = (order.at(i, last_first=True) for i in range(order.count))
    return [-(-min(ROWS * (block + 1), tokens) // TOKENS) for _, block in places]


def _late(ends: list[int]) -> float:
    return max(ends) / statistics.mean(ends) - 1
