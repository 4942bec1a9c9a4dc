"""Why no register moves between lanes: the tokens of S that a lane holds are those that P's A operand wants of it,
and the channels of O that it holds are neighbours in memory."""

from __future__ import annotations

from cute_attn.kernels.tile_image import TileImage

from .fragments import F16, S8, U8, fragments

__all__ = [
    "P_MMAS",
    "QUAD",
    "lane_channels",
    "output_owner",
    "p_tokens",
    "packed_scores",
    "score_element",
    "values_token_of_k",
]

QUAD = 4
"""Lanes that share a row of an accumulator."""

P_MMAS = {"int8": U8, "float16": F16}
"""MMA of P·V by format of V."""


def score_element(image: TileImage, lane: int, n: int, value: int) -> tuple[int, int]:
    """(row, token) of S in a lane's accumulator ``value`` of n8 tile ``n``."""
    row, column = fragments(S8)["C"].place(lane, value)
    return row, image.score_tokens(column, n)


def values_token_of_k(image: TileImage) -> list[int]:
    """Token of V at each k of the P·V MMAs: V's rows in the image, read from their start."""
    _, tokens = image.v.extents()
    plane = {image.v(0, token): token for token in range(tokens)}
    return [plane[offset] for offset in sorted(plane)]


def p_tokens(image: TileImage, lane: int, block: int) -> list[tuple[int, int]]:
    """(row, token) of P that the MMA expects in each of a lane's elements of A, for k block ``block``."""
    a = fragments(P_MMAS[image.values])["A"]
    order = values_token_of_k(image)
    places = (a.place(lane, value) for value in range(a.values))
    return [(row, order[block * a.shape[1] + k]) for row, k in places]


def packed_scores(image: TileImage, lane: int, block: int) -> list[tuple[int, int]]:
    """(row, token) of S in the same elements, as `probabilities` packs them.

    Register 2·half + hi takes, for columns 8 rows apart in hi, the accumulators of as many n8 tiles as fill it: two
    columns of each, in the order in which the lane holds them.
    """
    a = fragments(P_MMAS[image.values])["A"]
    tiles = a.packed // 2
    return [
        score_element(image, lane, (2 * block + half) * tiles + t, 2 * hi + e)
        for half in range(2)
        for hi in range(2)
        for t in range(tiles)
        for e in range(2)
    ]


def lane_channels(image: TileImage, lane: int, group: int) -> list[int]:
    """Channels of O that a lane stores together: `output_run` of them, from group ``group`` of 4·run channels."""
    c = fragments(P_MMAS[image.values])["C"]
    run = image.output_run
    return [image.output_channels(c.place(lane, i % 2)[1], run // 2 * group + i // 2) for i in range(run)]


def output_owner(image: TileImage, channels: int) -> list[int]:
    """t of the lane that holds each of the first ``channels`` channels of O."""
    owner: dict[int, int] = {}
    for t in range(QUAD):
        for group in range(channels // (QUAD * image.output_run)):
            owner |= dict.fromkeys(lane_channels(image, t, group), t)
    return [owner[channel] for channel in range(channels)]
