"""The tile image is a permutation that the tensor cores and the shared-memory banks like."""

import itertools

import cutlass.cute as cute
import pytest

from cute_attn.kernels.tile_image import TILE_TOKENS, VALUE_BYTES, StaticLayout, TileImage

HEAD_DIMS = [32, 64, 96, 128, 256]


VALUES = ["int8", "float16"]


def operands(image: TileImage) -> list[tuple[StaticLayout, int]]:
    """K's and V's layouts, each with the bytes of an element."""
    return [(image.k, 1), (image.v, VALUE_BYTES[image.values])]


def rows_of(layout: StaticLayout) -> dict[int, int]:
    """Row of the plane (32 bytes each) -> first mode's coordinate."""
    return {layout(c, 0) // 32: c for c in range(layout.extents()[0])}


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_byte_is_used_once(head_dim, values):
    image, wide = TileImage(head_dim, values), VALUE_BYTES[values]
    used = [image.k_offset + image.k(t, d) for t in range(TILE_TOKENS) for d in range(head_dim)]
    used += [
        image.v_offset + image.v(d, t) + b for t in range(TILE_TOKENS) for d in range(head_dim) for b in range(wide)
    ]
    used += [
        image.scale_offset + 4 * image.scales(r, t) + b for r in range(2) for t in range(TILE_TOKENS) for b in range(4)
    ]
    assert sorted(used) == list(range(image.nbytes))
    assert image.nbytes == 64 * head_dim * (1 + wide) + 512


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_words_stay_together(head_dim, values):
    """The quantiser stores four bytes at a time: four tokens or dims of one byte, or two of two."""
    for layout, wide in operands(TileImage(head_dim, values)):
        rows, columns = layout.extents()
        for row, start in itertools.product(range(rows), range(0, columns, 4 // wide)):
            first = layout(row, start)
            assert first % 4 == 0
            assert [layout(row, start + i) for i in range(4 // wide)] == list(range(first, first + 4, wide))


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_ldmatrix_phases_have_no_bank_conflict(head_dim, values):
    """One 8x8 matrix of ldmatrix reads 16 bytes of eight consecutive rows: eight different groups of 4 banks."""
    for layout, wide in operands(TileImage(head_dim, values)):
        rows, columns = layout.extents()
        coordinate = rows_of(layout)
        for first, chunk in itertools.product(range(0, rows, 8), range(0, columns, 16 // wide)):
            groups = {layout(coordinate[first + i], chunk) // 16 % 8 for i in range(8)}
            assert len(groups) == 8


def test_score_columns_are_the_stated_tokens():
    image = TileImage(128)
    token_of_row = rows_of(image.k)
    for tile, column in itertools.product(range(TILE_TOKENS // 8), range(8)):
        token = token_of_row[8 * tile + column]
        assert token == 16 * (tile // 2) + 4 * (column >> 1) + 2 * (tile % 2) + (column & 1)
        assert token == image.score_tokens(column, tile)


def test_scores_of_a_lane_are_its_operand_of_p_v():
    """Accumulator columns 2t, 2t+1 of n8 tiles 2i, 2i+1 are tokens 4t…4t+3 of 16: mma's A operand."""
    image = TileImage(64)
    for half, lane in itertools.product(range(TILE_TOKENS // 16), range(4)):
        tokens = [image.score_tokens(2 * lane + e, 2 * half + n) for n in range(2) for e in range(2)]
        assert tokens == [16 * half + 4 * lane + i for i in range(4)]


def test_scores_of_a_lane_are_its_16_bit_operand_of_p_v():
    """Register ``half`` of mma.m16n8k16's A operand is k = 8·half + 2t, +1: accumulator columns of n8 tile 2i + half.

    V's row has the tokens of these columns there.
    """
    image = TileImage(64, "float16")
    for block, lane, half, e in itertools.product(range(TILE_TOKENS // 16), range(4), range(2), range(2)):
        token = image.score_tokens(2 * lane + e, 2 * block + half)
        place = image.v(0, token) - image.v(0, 16 * block)
        assert place == 2 * (8 * half + 2 * lane + e)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_output_columns_are_the_stated_channels(head_dim):
    image = TileImage(head_dim)
    channel_of_row = rows_of(image.v)
    for tile, lane, e in itertools.product(range(head_dim // 8), range(4), range(2)):
        channel = channel_of_row[8 * tile + 2 * lane + e]
        assert channel == 32 * (tile // 4) + 8 * lane + 2 * (tile % 4) + e
        assert channel == image.output_channels(2 * lane + e, tile)


def test_plain_evaluation_equals_cute():
    """The same numbers through CuTe's own layout algebra, evaluated while tracing."""
    seen = []

    @cute.jit
    def trace():
        for image in (TileImage(32), TileImage(128), TileImage(64, "float16")):
            for layout in (image.k, image.v, image.scales, image.score_tokens, image.output_channels):
                made = layout.cute()
                rows, columns = layout.extents()
                assert cute.size(made) == rows * columns
                for c in itertools.product(range(0, rows, 3), range(0, columns, 5)):
                    assert cute.crd2idx(c, made) == layout(*c)
                    seen.append(c)

    trace()
    assert len(seen) > 1000


def test_refusals():
    with pytest.raises(ValueError, match="multiple of 32"):
        TileImage(80)
    with pytest.raises(ValueError, match="values float32 is not one of int8, float16"):
        TileImage(64, "float32")
    with pytest.raises(IndexError, match="outside"):
        TileImage(64).k(64, 0)
