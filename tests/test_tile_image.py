"""The tile image is a permutation that the tensor cores and the shared-memory banks like."""

import itertools

import cutlass.cute as cute
import pytest
import torch

from cute_attn.kernels.tile_image import KEY_BITS, TILE_TOKENS, VALUE_BYTES, StaticLayout, TileImage
from cute_attn.tile_images import FORMAT_DTYPES, pack_tile_images, unpack_tile_images

HEAD_DIMS = [32, 64, 96, 128, 256, *(pytest.param(d, marks=pytest.mark.slow) for d in (160, 192, 224))]
"""The others have the layouts of these, see `test_padding`."""

FORMATS = [*itertools.product(["int8", "float16"], ["int8", "int4"]), ("e4m3", "int8"), ("e4m3", "e4m3")]
"""Of V and of K."""

KINDS = [
    *((*formats, 64, 0) for formats in FORMATS),
    *((*formats, 128, 8) for formats in FORMATS if formats[1] != "int4"),
]
"""Formats of V and K, tokens of a tile and rows of ones: of the warp MMAs, and of the warpgroup MMA."""


def operands(image: TileImage) -> list[tuple[StaticLayout, int]]:
    """K's and V's layouts, each with the bytes of what a coordinate names: a byte of K, an element of V."""
    return [(image.k, 1), (image.v, VALUE_BYTES[image.values])]


def rows_of(layout: StaticLayout) -> dict[int, int]:
    """Row of the plane (32 bytes each) -> first mode's coordinate."""
    return {layout(c, 0) // 32: c for c in range(layout.extents()[0])}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_byte_is_used_once(head_dim, kind):
    image = TileImage(head_dim, *kind)
    used = []
    for (layout, wide), offset in zip(operands(image), (image.k_offset, image.v_offset), strict=True):
        rows, columns = layout.extents()
        used += [offset + layout(r, c) + b for r in range(rows) for c in range(columns) for b in range(wide)]
    row_bytes, planes = image.ones.extents()
    used += [image.ones_offset + image.ones(byte, plane) for byte in range(row_bytes) for plane in range(planes)]
    rows, tokens = image.scales.extents()
    used += [
        image.scale_offset + 4 * image.scales(r, t) + b for r in range(rows) for t in range(tokens) for b in range(4)
    ]
    assert sorted(used) == list(range(image.nbytes))


@pytest.mark.parametrize(
    ("head_dim", "keys", "key_dims", "key_bytes", "value_channels"),
    [
        (8, "int8", 32, 32, 32),
        (40, "int8", 64, 64, 64),
        (72, "int8", 96, 96, 96),
        (128, "int8", 128, 128, 128),
        (8, "int4", 64, 32, 32),
        (64, "int4", 64, 32, 64),
        (72, "int4", 128, 64, 96),
        (96, "int4", 128, 64, 96),
        (256, "int4", 256, 128, 256),
    ],
)
def test_padded_sizes(head_dim, keys, key_dims, key_bytes, value_channels):
    for values, wide in VALUE_BYTES.items():
        image = TileImage(head_dim, values, keys)
        assert (image.key_dims, image.key_bytes, image.value_channels) == (key_dims, key_bytes, value_channels)
        assert image.nbytes == 64 * key_bytes + 64 * value_channels * wide + 512


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_padding(head_dim, kind):
    """Padded head dims have the layouts of the next multiple of 32 channels, and of 32 bytes of K."""
    image, full = TileImage(head_dim, *kind), TileImage(-(-head_dim // 32) * 32, *kind)
    assert (image.k, image.v, image.nbytes) == (full.k, full.v, full.nbytes)
    assert 0 <= image.key_dims - head_dim < 32 * (8 // KEY_BITS[image.keys])
    assert image.key_bytes * 8 == image.key_dims * KEY_BITS[image.keys]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_words_stay_together(head_dim, kind):
    """The quantiser stores four bytes at a time: four tokens or dims of one byte, or two of two."""
    for layout, wide in operands(TileImage(head_dim, *kind)):
        rows, columns = layout.extents()
        for row, start in itertools.product(range(rows), range(0, columns, 4 // wide)):
            first = layout(row, start)
            assert first % 4 == 0
            assert [layout(row, start + i) for i in range(4 // wide)] == list(range(first, first + 4, wide))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_ldmatrix_phases_have_no_bank_conflict(head_dim, kind):
    """One 8x8 matrix of ldmatrix reads 16 bytes of eight consecutive rows: eight different groups of 4 banks."""
    for layout, wide in operands(TileImage(head_dim, *kind)):
        rows, columns = layout.extents()
        coordinate = rows_of(layout)
        for first, chunk in itertools.product(range(0, rows, 8), range(0, columns, 16 // wide)):
            groups = {layout(coordinate[first + i], chunk) // 16 % 8 for i in range(8)}
            assert len(groups) == 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 256])
def test_images_hold_what_was_packed(head_dim, kind):
    """And nothing else but the ones: the padding and the tokens past the end are zeros."""
    values, keys, tokens, sum_rows = kind
    generator = torch.Generator().manual_seed(head_dim)
    levels = 7 if keys == "int4" else 127
    shape = (2, 1, tokens + 6, head_dim)
    k = torch.randint(-levels, levels + 1, shape, generator=generator).to(FORMAT_DTYPES[keys])
    v = torch.randint(-127, 128, shape, generator=generator).to(FORMAT_DTYPES[values])
    scale = torch.rand(shape[:3], generator=generator) + 0.1
    image = pack_tile_images(k, scale, v, keys, tokens, sum_rows)
    plain = unpack_tile_images(image, head_dim, tokens + 6, values, keys, tokens, sum_rows)
    for part, packed in zip(plain, (k, scale, v), strict=True):
        assert part.dtype == packed.dtype
        assert torch.equal(part.view(torch.uint8), packed.view(torch.uint8))
    layout = TileImage(head_dim, *kind)
    in_k = image[..., : layout.v_offset]
    written = torch.stack([in_k & 15, in_k >> 4], -1) if keys == "int4" else in_k.contiguous().view(k.dtype).float()
    assert written.count_nonzero() == k.float().count_nonzero()
    in_v = image[..., layout.v_offset : layout.scale_offset].contiguous().view(v.dtype).float()
    assert in_v.count_nonzero() == v.float().count_nonzero() + 2 * 2 * sum_rows * tokens
    if sum_rows:
        planes = in_v.reshape(2, 1, 2, -1, layout.value_rows, 32 // v.element_size())
        assert (planes[..., layout.value_channels :, :] == 1).all()


@pytest.mark.parametrize(("values", "keys"), [("int8", "int8"), ("float16", "int8"), ("e4m3", "e4m3")])
@pytest.mark.parametrize("head_dim", [40, 128])
def test_planes_are_wgmma_operands_with_the_32_byte_swizzle(head_dim, values, keys):
    """K-major operands with 32 bytes of K: eight rows of 32 bytes are 256 bytes, and the next ones follow.

    Row r's chunk c of 16 bytes lies at chunk c XOR bit 2 of r. A plane is the K extent of one wgmma instruction.
    """

    def operand(row: int, byte: int) -> int:
        return row // 8 * 256 + row % 8 * 32 + (byte // 16 ^ row % 8 // 4) * 16 + byte % 16

    image = TileImage(head_dim, values, keys, 128, 8)
    for row, byte in itertools.product(range(128), range(image.key_bytes)):
        token = image.score_tokens(row % 8, row // 8)
        assert image.k(token, byte) == byte // 32 * 128 * 32 + operand(row, byte % 32)
    plane_bytes = (image.value_channels + 8) * 32
    wide = VALUE_BYTES[values]
    for row, element in itertools.product(range(image.value_channels), range(128)):
        token = (
            element if wide == 1 else element // 16 * 16 + element % 8 // 2 * 4 + element % 16 // 8 * 2 + element % 2
        )
        place = element * wide // 32 * plane_bytes + operand(row, element * wide % 32)
        assert image.v(image.output_channels(row % 8, row // 8), token) == place
    ones = [operand(row, byte) for row in range(image.value_channels, image.value_rows) for byte in range(32)]
    for plane in range(128 * wide // 32):
        held = {image.ones_offset - image.v_offset + image.ones(byte, plane) for byte in range(256)}
        assert held == {plane * plane_bytes + place for place in ones}
    assert image.v_offset % 256 == 0
    assert plane_bytes % 256 == 0


def test_int4_puts_dim_2i_into_the_low_half():
    k = torch.zeros(1, 1, 1, 64, dtype=torch.int8)
    k[..., 6], k[..., 7] = -3, 5
    image = pack_tile_images(k, torch.ones(1, 1, 1), torch.zeros_like(k), "int4")
    assert image[0, 0, 0, TileImage(64, keys="int4").k(0, 3)] == 0x5D


@pytest.mark.parametrize("tokens", [64, 128])
def test_score_columns_are_the_stated_tokens(tokens):
    image = TileImage(128, tokens=tokens)
    token_of_row = rows_of(image.k)
    for tile, column in itertools.product(range(tokens // 8), range(8)):
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


@pytest.mark.parametrize("sum_rows", [0, 8])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_output_columns_are_the_stated_channels(head_dim, sum_rows):
    image = TileImage(head_dim, sum_rows=sum_rows)
    channel_of_row = rows_of(image.v)
    for tile, lane, e in itertools.product(range(image.value_channels // 8), range(4), range(2)):
        channel = channel_of_row[8 * tile + 2 * lane + e]
        assert channel == 32 * (tile // 4) + 8 * lane + 2 * (tile % 4) + e
        assert channel == image.output_channels(2 * lane + e, tile)


def test_plain_evaluation_equals_cute():
    """The same numbers through CuTe's own layout algebra, evaluated while tracing."""
    seen = []

    @cute.jit
    def trace():
        hopper = TileImage(72, "float16", "int8", 128, 8)
        for image in (TileImage(32), TileImage(128), TileImage(72, "float16", "int4"), hopper):
            ones = (image.ones,) if image.sum_rows else ()
            for layout in (image.k, image.v, image.scales, image.score_tokens, image.output_channels, *ones):
                made = layout.cute()
                rows, columns = layout.extents()
                assert cute.size(made) == rows * columns
                for c in itertools.product(range(0, rows, 3), range(0, columns, 5)):
                    assert cute.crd2idx(c, made) == layout(*c)
                    seen.append(c)

    trace()
    assert len(seen) > 1000


def test_refusals():
    for head_dim in (0, -8, 84, 264):
        with pytest.raises(ValueError, match=f"head dim {head_dim} is not a multiple of 8 from 8 to 256"):
            TileImage(head_dim)
    with pytest.raises(ValueError, match="keys int2 is not one of int8, int4"):
        TileImage(64, keys="int2")
    with pytest.raises(ValueError, match="values float32 is not one of int8, float16"):
        TileImage(64, "float32")
    with pytest.raises(ValueError, match="tokens 96 is not one of 64, 128"):
        TileImage(64, tokens=96)
    with pytest.raises(ValueError, match="sum_rows 1 is not one of 0, 8"):
        TileImage(64, sum_rows=1)
    with pytest.raises(IndexError, match="outside"):
        TileImage(64).k(64, 0)
