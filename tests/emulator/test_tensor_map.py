"""Tensor maps: decoding, and the places of boxes, against an encoder and a walk over elements of the tests' own."""

from __future__ import annotations

import numpy as np
import pytest

from cute_attn.emulator.tensor_map import InvalidTensorMap, decode

from .tensor_maps import SWIZZLES, encode, swizzled

A = 0x7F0000001230


def map_of(*args, **options):
    return decode(encode(*args, **options).tobytes())


def test_fields():
    found = map_of(
        A,
        "bf16",
        (100, 7, 9, 11, 13),
        (208, 1 << 39, 32, 64),
        (64, 3, 8, 1, 2),
        swizzle="128/32",
        steps=(1, 2, 8, 1, 1),
    )
    assert (found.address, found.element.name, found.rank) == (A, "bf16", 5)
    assert found.sizes == (100, 7, 9, 11, 13) and found.strides == (208, 1 << 39, 32, 64)
    assert found.box == (64, 2, 1, 1, 2) and found.steps == (1, 2, 8, 1, 1)
    assert found.row_bytes == 128 and found.nbytes == 128 * 4 and not found.fills_nan


# Parameter bytes of kernels that the CuTe DSL's host code launched: (words 2 to 14, address aside) of a map, and what
# it was made for.
COMPILED = [
    ((0x40012, 3, 0, 0, 0, 0, 47, 63, 0, 0, 0, 0xF000000, 0xF), ("u8", (48, 64), (48,), (16, 16), 0)),
    ((0x246312, 32, 0, 0, 0, 0, 255, 255, 0, 0, 0, 0x3F000000, 0xF), ("f16", (256, 256), (512,), (64, 16), 0x70)),
    ((0x2C6312, 32, 0, 0, 0, 0, 255, 255, 0, 0, 0, 0x3F000000, 0xF), ("f16", (256, 256), (512,), (64, 16), 0x60)),
    ((0x3C6312, 32, 0, 0, 0, 0, 255, 255, 0, 0, 0, 0x3F000000, 0xF), ("f16", (256, 256), (512,), (64, 16), 0x40)),
    ((0x50392, 16, 0, 0, 0, 0, 63, 63, 0, 0, 0, 0x1F000000, 0xF), ("tf32", (64, 64), (256,), (32, 16), 0)),
    ((0x40592, 2, 0, 0, 0, 0, 63, 63, 0, 0, 0, 0x1F000000, 0xF), ("b4x16", (64, 64), (32,), (32, 16), 0)),
    ((0x46612, 4, 0, 0, 0, 0, 127, 63, 0, 0, 0, 0x7F000000, 0xF), ("b4x16_p64", (128, 64), (64,), (128, 16), 0x70)),
    ((0x46692, 6, 0, 0, 0, 0, 127, 63, 0, 0, 0, 0x7F000000, 0xF), ("b6x16_p32", (128, 64), (96,), (128, 16), 0x70)),
    (
        (0x40342, 4, 24, 144, 864, 0, 31, 5, 5, 5, 5, 0xF000000, 0x1010101),
        ("f16", (32, 6, 6, 6, 6), (64, 384, 2304, 13824), (16, 2, 2, 2, 2), 0),
    ),
]


@pytest.mark.parametrize("words,expected", COMPILED)
def test_maps_that_host_code_wrote(words, expected):
    content = np.array([0x1000, 1, *words, 0], np.uint32).tobytes()
    found = decode(content)
    assert found.address == 0x1_0000_1000
    assert (found.element.name, found.sizes, found.strides, found.box, found.swizzle.mask) == expected


@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_swizzles_follow_the_tables(swizzle):
    mask = map_of(A, "u8", (256, 64), (256,), (32 if swizzle == "32" else 64, 4), swizzle=swizzle).swizzle
    addresses = np.arange(0, 4096, 8)
    assert mask.apply(addresses).tolist() == [swizzled(int(a), swizzle) for a in addresses]


INVALID = [
    ("no tiled tensor map", {}, (2, 0x30)),
    ("no tiled tensor map", {}, (2, 0x52)),
    ("no tiled tensor map", {}, (2, 0x712)),
    ("no tiled tensor map", {}, (15, 1)),
    ("address .* is not a multiple of 16", {"address": A + 8}, None),
    ("interleaved", {"interleave": 1}, None),
    ("96 bytes", {}, (2, 1 << 22 | 0x12)),
    ("atomicity", {}, (2, 1 << 19 | 1 << 13 | 0x12)),
    ("TF32", {}, (2, 1 << 16 | 0x12)),
    ("24 bytes, which is no multiple of 16", {"box": (24, 1)}, None),
    ("64 bytes, the swizzle's span is 32", {"box": (64, 1), "swizzle": "32"}, None),
    ("u8 cannot be filled with NaN", {"nan": True}, None),
    ("b4x16 cannot be filled with NaN", {"kind": "b4x16", "nan": True}, None),
    ("128 elements", {"kind": "b4x16_p64", "box": (64, 1), "address": A + 16, "strides": (512,)}, None),
    ("odd", {"kind": "b4x16", "sizes": (255, 4)}, None),
]


@pytest.mark.parametrize("message,options,word", INVALID, ids=[row[0] + str(n) for n, row in enumerate(INVALID)])
def test_invalid_maps(message, options, word):
    usual = {"address": A, "kind": "u8", "sizes": (256, 4), "strides": (256,), "box": (32, 2)}
    content = encode(**(usual | options))
    if word is not None:
        content.view(np.uint32)[word[0]] = word[1]
    with pytest.raises(InvalidTensorMap, match=message):
        decode(content.tobytes())
    decode(encode(**usual).tobytes())


def walk(sizes, strides, box, steps, first, itemsize):
    """(address, inside) of every element of a box, dimension 0 fastest."""
    places = [()]
    for n, step, f in list(zip(box, steps, first, strict=True))[::-1]:
        places = [(f + k * step, *p) for p in places for k in range(-(-n // step))]
    places = sorted(places, key=lambda p: p[::-1])
    inside = [all(0 <= c < s for c, s in zip(p, sizes, strict=True)) for p in places]
    address = [A + sum(c * s for c, s in zip(p, (itemsize, *strides), strict=True)) for p in places]
    return np.array(address), np.array(inside)


@pytest.mark.parametrize("seed", range(40))
def test_places_of_boxes(seed):
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 6))
    kind, size = [("u8", 1), ("f16", 2), ("f32", 4), ("u64", 8)][seed % 4]
    sizes = [int(rng.integers(1, 80)), *rng.integers(1, 6, rank - 1).tolist()]
    box = [int(rng.choice([16, 32, 48])) // size, *rng.integers(1, 4, rank - 1).tolist()]
    steps = [1, *rng.integers(1, 4, rank - 1).tolist()]
    strides = (16 * rng.integers(5, 30, rank - 1)).tolist()
    first = np.array([[int(rng.integers(-n, s + 1)) for n, s in zip(box, sizes, strict=True)] for _ in range(3)])
    found = map_of(A, kind, sizes, strides, box, steps=steps)
    places = found.places(first)
    per_element = size // places.unit if places.unit < size else 1
    for copy in range(3):
        address, inside = walk(sizes, strides, box, steps, first[copy].tolist(), size)
        got = places.start[copy].view(np.int64) + places.offsets
        used = np.ones(got.size, bool) if places.inside is None else places.inside[copy]
        per_unit = max(places.unit // size, 1)
        assert per_element == 1
        assert (got[used] == address[::per_unit][used]).all()
        assert (np.repeat(used, per_unit) == inside).all()
