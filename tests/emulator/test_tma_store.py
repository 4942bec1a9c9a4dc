"""cp.async.bulk.tensor and cp.reduce.async.bulk.tensor out of shared memory, against a walk over the elements."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cute_attn.emulator.errors import (
    DataRace,
    InvalidOperand,
    Misaligned,
    OutOfBounds,
    UninitializedShared,
    UnknownInstruction,
)
from cute_attn.emulator.formats import bf16_to_f32, f32_to_bf16

from .harness import run
from .tensor_maps import SWIZZLES, elements, encode, encode_array, is_inside
from .tma_programs import BARRIER, FILL, SHARED, aligned, coordinates, random_tensor, start

STORE = "cp.async.bulk.tensor.RANK.global.shared::cta.tile.bulk_group"
DONE = "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"
START = 256


def body_of(rank: int, instruction: str = STORE, fill: str = FILL, offset: int = START) -> str:
    return f"""
        {start(rank)} {fill} mov.u32 %r3, {offset};
        @%p1 {instruction.replace("RANK", f"{rank}d")} [%rd0, {coordinates(rank)}], [%r3];
        {DONE}
    """


def store(map_, tensor, at, shared, body=None, **options) -> None:
    at = np.array(at, np.int32)
    arrays = {"map": aligned(map_), "at": at, "from": shared, "tensor": tensor}
    run(body or body_of(at.shape[1]), arrays, shared=SHARED, grid=(len(at), 1, 1), **options)


def random_shared(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, BARRIER), np.uint8)


def stored(
    tensor: np.ndarray, box, at, shared: np.ndarray, combine: Callable | None = None, start: int = START, **options
) -> np.ndarray:
    """The tensor after boxes of shared memory went to the coordinates `at`, one after another."""
    result = tensor.copy()
    for row, first in zip(shared, at, strict=True):
        for place, addresses in elements(box, first, start, tensor.itemsize, **options):
            if is_inside(place, tensor.shape):
                value = row[addresses].view(tensor.dtype)[0]
                result[place] = value if combine is None else combine(result[place], value)
    return result


@pytest.mark.parametrize("swizzle", [name for name in SWIZZLES if name != "flip"])
@pytest.mark.parametrize("kind,dtype", [("u8", np.uint8), ("bf16", np.uint16), ("f32", np.uint32), ("u64", np.uint64)])
def test_stores_write_what_is_inside(swizzle, kind, dtype):
    """Rows have a margin that is no part of the tensor."""
    whole = random_tensor((10, 80), dtype)
    before = whole.copy()
    tensor = whole[:, : 80 - 16 // whole.itemsize]
    box = (32 // whole.itemsize, 4)
    at = [(0, 0), (tensor.shape[1] - 2, 1), (3, 8), (40, 6)]
    shared = random_shared(4)
    expected = stored(tensor, box, at, shared, swizzle=swizzle)
    store(encode_array(tensor, kind, box, swizzle=swizzle), whole, at, shared)
    assert (tensor == expected).all() and not (tensor == before[:, : tensor.shape[1]]).all()
    assert (whole[:, tensor.shape[1] :] == before[:, tensor.shape[1] :]).all()


@pytest.mark.parametrize("rank", range(1, 6))
def test_ranks(rank):
    tensor = random_tensor((3, 4, 5, 6, 32)[5 - rank :], np.uint16)
    box, steps = (32, 3, 2, 2, 3)[:rank], (1, 2, 2, 1, 2)[:rank]
    at = [[1, 2, 3, 1, 0][:rank]]
    expected = stored(tensor, box, at, shared := random_shared(1), steps=steps, swizzle="64")
    store(encode_array(tensor, "u16", box, steps=steps, swizzle="64"), tensor, at, shared)
    assert (tensor == expected).all()


def test_four_bit_elements():
    tensor = random_tensor((12, 48), np.uint8)
    map_ = encode(tensor.ctypes.data, "b4x16", (96, 12), (48,), (64, 5))
    expected = stored(tensor, (32, 5), [(20, 3)], shared := random_shared(1))
    store(map_, tensor, [(40, 3)], shared)
    assert (tensor == expected).all()


def test_scattered_rows():
    tensor = random_tensor((20, 64), np.uint8)
    at, shared = [(16, 3, 19, 0, 40)], random_shared(1)
    expected = tensor.copy()
    for n, r in enumerate(at[0][1:4]):
        expected[r, 16:48] = shared[0, START + 32 * n : START + 32 * n + 32]
    body = body_of(5).replace("tensor.5d", "tensor.2d").replace("tile.", "tile::scatter4.")
    store(encode_array(tensor, "u8", (32, 1)), tensor, at, shared, body)
    assert (tensor == expected).all()


@pytest.mark.parametrize("seed", [None, 3, 4, 5])
def test_the_source_is_read_when_the_thread_waits(seed):
    """Overwriting it before is a race: the new bytes are stored; after the wait, the old ones are."""
    tensor = random_tensor((4, 32), np.uint8)
    shared = random_shared(1)
    shared[:] = 7
    overwrite = "bar.sync 0; mov.b32 %r40, 0; mad.lo.u32 %r41, %r50, 4, 256; st.shared.u32 [%r41], %r40;"
    map_ = encode_array(tensor, "u8", (32, 4))
    late = body_of(2).replace(DONE, f"cp.async.bulk.commit_group; {overwrite} cp.async.bulk.wait_group 0;")
    store(map_, tensor, [(0, 0)], shared, late, races=False)
    assert (tensor == 0).all()
    with pytest.raises(DataRace, match="cp.async.bulk.wait_group is missing"):
        store(map_, tensor, [(0, 0)], shared, late, seed=seed)
    store(map_, tensor, [(0, 0)], shared, body_of(2) + overwrite, seed=seed)
    assert (tensor == 7).all()
    one_left = late.replace("commit_group;", "commit_group; cp.async.bulk.wait_group 1;")
    store(map_, tensor, [(0, 0)], shared, one_left, races=False)
    assert (tensor == 0).all()


def test_groups_that_nobody_waits_for_complete_at_the_end():
    tensor = random_tensor((4, 32), np.uint8)
    expected = stored(tensor, (32, 4), [(0, 0)], shared := random_shared(1))
    store(encode_array(tensor, "u8", (32, 4)), tensor, [(0, 0)], shared, body_of(2).replace(DONE, ""))
    assert (tensor == expected).all()


# ---- reductions


def wrapping(function: Callable) -> Callable:
    return lambda old, new: function(np.array([old]), np.array([new]))[0]


def bf16(function: Callable) -> Callable:
    def combine(old, new):
        result = function(bf16_to_f32(np.array([old])), bf16_to_f32(np.array([new])))
        return f32_to_bf16(result.astype(np.float32))[0]

    return combine


REDUCTIONS = [
    ("add", "u32", np.uint32, wrapping(np.add)),
    ("add", "s32", np.int32, wrapping(np.add)),
    ("add", "u64", np.uint64, wrapping(np.add)),
    ("add", "f32", np.float32, np.add),
    ("add", "f16", np.float16, np.add),
    ("add", "bf16", np.uint16, bf16(np.add)),
    ("min", "s32", np.int32, min),
    ("max", "u32", np.uint32, max),
    ("min", "u64", np.uint64, min),
    ("max", "s64", np.int64, max),
    ("min", "f16", np.float16, np.fmin),
    ("max", "bf16", np.uint16, bf16(np.fmax)),
    ("inc", "u32", np.uint32, lambda old, new: 0 if old >= new else old + 1),
    ("dec", "u32", np.uint32, lambda old, new: new if old == 0 or old > new else old - 1),
    ("and", "u32", np.uint32, lambda old, new: old & new),
    ("or", "u64", np.uint64, lambda old, new: old | new),
    ("xor", "s32", np.int32, lambda old, new: old ^ new),
]


def numbers(shape, dtype, kind: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind in ("f16", "f32"):
        return aligned(rng.standard_normal(shape).astype(dtype))
    if kind == "bf16":
        return aligned(f32_to_bf16(rng.standard_normal(shape).astype(np.float32)))
    return aligned(rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype))


@pytest.mark.parametrize("name,kind,dtype,combine", REDUCTIONS, ids=lambda x: x if isinstance(x, str) else "")
def test_reductions(name, kind, dtype, combine):
    """Boxes of several CTAs meet in the same elements, and leave the tensor."""
    tensor = numbers((10, 64), dtype, kind, 0)
    box = (32 // tensor.itemsize, 4)
    at = [(0, 0), (4, 1), (0, 0), (64 - 3, 8)]
    values = numbers((4, BARRIER // tensor.itemsize), dtype, kind, 1)
    expected = stored(tensor, box, at, values.view(np.uint8), combine, swizzle="32")
    instruction = f"cp.reduce.async.bulk.tensor.RANK.global.shared::cta.{name}.tile.bulk_group"
    map_ = encode_array(tensor, kind, box, swizzle="32")
    store(map_, tensor, at, values.view(np.uint8), body_of(2, instruction))
    assert (tensor == expected).all()


def test_sums_with_and_without_flushing():
    tiny = np.float32(2.0**-130)
    for kind, expected in (("f32", 2 * tiny), ("f32.ftz", 0)):
        tensor = aligned(np.full((1, 8), tiny, np.float32))
        values = np.full((1, BARRIER // 4), tiny, np.float32).view(np.uint8)
        instruction = "cp.reduce.async.bulk.tensor.RANK.global.shared::cta.add.bulk_group"
        store(encode_array(tensor, kind, (8, 1)), tensor, [(0, 0)], values, body_of(2, instruction))
        assert (tensor == expected).all()


# ---- findings


@pytest.fixture
def tensor() -> np.ndarray:
    return random_tensor((16, 64), np.uint8)


def test_source_that_nobody_wrote(tensor):
    map_ = encode_array(tensor, "u8", (64, 4))
    with pytest.raises(UninitializedShared, match="at offset 0x100"):
        store(map_, tensor, [(0, 0)], random_shared(1), body_of(2, fill=""))
    partly = (
        "mul.lo.u32 %r30, %r50, 8; add.u32 %r30, %r30, 256; st.shared.b64 [%r30], %rd0; fence.proxy.async; bar.sync 0;"
    )
    store(map_, tensor, [(0, 0)], random_shared(1), body_of(2, fill=partly))
    with pytest.raises(UninitializedShared, match="at offset 0x1f0"):
        store(map_, tensor, [(0, 0)], random_shared(1), body_of(2, fill=partly.replace("bar", "@!%p1 bar", 0).replace(
            "mul.lo", "min.u32 %r50, %r50, 29; mul.lo")))  # fmt: skip


def test_a_store_outside_the_tensors_that_were_passed(tensor):
    longer = encode(tensor.ctypes.data, "u8", (64, 17), (64,), (64, 4))
    store(longer, tensor, [(0, 12)], random_shared(1))
    with pytest.raises(OutOfBounds, match="global write of 16 bytes.*0 bytes past the end of `tensor`"):
        store(longer, tensor, [(0, 13)], random_shared(1))


def test_operands(tensor):
    map_ = encode_array(tensor, "u8", (64, 4))
    store(map_, tensor, [(0, 2)], random_shared(1))
    with pytest.raises(InvalidOperand, match=r"coordinates \(0, -1\): only loads"):
        store(map_, tensor, [(0, 2), (0, -1)], random_shared(2))
    with pytest.raises(Misaligned, match="not a multiple of 128"):
        store(map_, tensor, [(0, 2)], random_shared(1), body_of(2, offset=272))
    with pytest.raises(InvalidOperand, match="flips"):
        store(encode_array(tensor, "u8", (64, 4), swizzle="flip"), tensor, [(0, 0)], random_shared(1))
    with pytest.raises(InvalidOperand, match="b4x16_p64 can be loaded only"):
        padded = encode(tensor.ctypes.data, "b4x16_p64", (128, 16), (64,), (128, 4))
        store(padded, tensor, [(0, 0)], random_shared(1))
    with pytest.raises(InvalidOperand, match="add of u8"):
        add = "cp.reduce.async.bulk.tensor.RANK.global.shared::cta.add.bulk_group"
        store(map_, tensor, [(0, 0)], random_shared(1), body_of(2, add))
    with pytest.raises(UnknownInstruction):
        store(map_, tensor, [(0, 0)], random_shared(1), body_of(2, STORE.replace("tile", "im2col_no_offs")))


def test_prefetches_change_nothing(tensor):
    before = tensor.copy()
    body = """
        cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%rd0, {%r1, %r2}]; prefetch.tensormap [%rd0];
        cp.async.bulk.prefetch.L2.global [%rd3], 32;
    """
    store(encode_array(tensor, "u8", (64, 4)), tensor, [(0, 0)], random_shared(1), body)
    assert (tensor == before).all()
