"""cp.async.bulk.tensor and cp.reduce.async.bulk.tensor against a walk over the elements of the box."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from cute_attn.emulator.errors import (
    BarrierMismatch,
    DataRace,
    Deadlock,
    InvalidOperand,
    Misaligned,
    OutOfBounds,
    UninitializedShared,
    UnknownInstruction,
)
from cute_attn.emulator.launch import launch
from cute_attn.emulator.launch_size import LaunchSize
from cute_attn.emulator.memory import GlobalMemory, Span
from cute_attn.emulator.parser import parse
from cute_attn.emulator.settings import Settings

from .harness import run
from .tensor_maps import SWIZZLES, boxed, encode, encode_array
from .tma_programs import BARRIER, DUMP, SHARED, WAIT, aligned, coordinates, random_tensor, start


def load_body(rank: int, nbytes: int, offset: int = 0, *, expect: int | None = None, wait: str = WAIT) -> str:
    return f"""
        {start(rank)}
        mov.u32 %r3, {offset};
        @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {nbytes if expect is None else expect};
        @%p1 cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
            [%r3], [%rd0, {coordinates(rank)}], [%r2];
        {wait} {DUMP}
    """


def load(map_, tensor, at, nbytes, offset=0, body=None, **options) -> np.ndarray:
    """Shared memory [CTA, bytes] after a load at each of the coordinates `at`; 0xFF where nothing was written."""
    at = np.atleast_2d(np.array(at, np.int32))
    out = np.zeros((len(at), BARRIER), np.uint8)
    arrays = {"map": aligned(map_), "at": at, "out": out, "tensor": tensor}
    options = {"uninitialized_shared": "poison", "grid": (len(at), 1, 1)} | options
    run(body or load_body(at.shape[1], nbytes, offset), arrays, shared=SHARED, **options)
    return out


def expected_load(tensor, box, at, offset=0, **options) -> np.ndarray:
    shared = np.full((len(at), BARRIER), 0xFF, np.uint8)
    for row, first in zip(shared, at, strict=True):
        boxed(tensor, box, first, offset, row, **options)
    return shared


# ---- loads


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("offset", [0, 128, 640, 1024 + 384])
def test_swizzles_at_any_start(swizzle, offset):
    tensor = random_tensor((40, 96), np.uint16)
    box = (16 if swizzle == "32" else 32 if swizzle == "64" else 64, 19)
    at = [(0, 0), (16, 3), (8, 21)]
    map_ = encode_array(tensor, "bf16", box, swizzle=swizzle)
    out = load(map_, tensor, at, box[0] * box[1] * 2, offset)
    assert (out == expected_load(tensor, box, at, offset, swizzle=swizzle)).all()


@pytest.mark.parametrize("swizzle", ["64", "128", "128/32"])
def test_a_narrow_box_has_rows_as_wide_as_the_swizzle(swizzle):
    tensor = random_tensor((40, 96), np.uint16)
    map_ = encode_array(tensor, "f16", (16, 10), swizzle=swizzle)
    out = load(map_, tensor, [(3, 2)], 320)
    assert (out == expected_load(tensor, (16, 10), [(3, 2)], swizzle=swizzle)).all()


KINDS = [
    ("u8", np.uint8), ("u16", np.uint16), ("u32", np.uint32), ("s32", np.int32), ("u64", np.uint64), ("s64", np.int64),
    ("f16", np.uint16), ("f32", np.uint32), ("f32.ftz", np.uint32), ("f64", np.uint64), ("bf16", np.uint16),
]  # fmt: skip


@pytest.mark.parametrize("kind,dtype", KINDS)
def test_types_and_every_side(kind, dtype):
    """A box that leaves the tensor on each side, at distances of single elements."""
    whole = random_tensor((9, 64), dtype)
    tensor = whole[:, : 64 - 16 // whole.itemsize]
    width = 64 // tensor.itemsize
    box = (width, 4)
    columns, rows = tensor.shape[::-1]
    at = [(-3, -2), (columns - 5, 2), (1, rows - 1), (columns - width + 1, -3), (-width, 0), (columns, rows), (2, 3)]
    out = load(encode_array(tensor, kind, box), whole, at, 256)
    assert (out == expected_load(tensor, box, at)).all()


@pytest.mark.parametrize("rank", range(1, 6))
@pytest.mark.parametrize("strided", [False, True])
def test_ranks(rank, strided):
    shape = (3, 4, 5, 6, 32)[5 - rank :]
    tensor = random_tensor(shape, np.uint16, rank)
    box = (32, 3, 2, 2, 3)[:rank]
    steps = (1, 2, 2, 1, 2)[:rank] if strided else None
    counts = [-(-n // s) for n, s in zip(box, steps or [1] * rank, strict=True)]
    rng = np.random.default_rng(rank)
    at = [[int(rng.integers(-2, n)) for n in shape[::-1]] for _ in range(5)]
    map_ = encode_array(tensor, "u16", box, steps=steps, swizzle="64")
    out = load(map_, tensor, at, 2 * int(np.prod(counts)))
    assert (out == expected_load(tensor, box, at, steps=steps, swizzle="64")).all()


@pytest.mark.parametrize(
    "kind,dtype", [("f16", np.uint16), ("bf16", np.uint16), ("f32", np.uint32), ("f64", np.uint64)]
)
def test_fill_with_nan(kind, dtype):
    tensor = random_tensor((8, 16), dtype)
    box = (32 // tensor.itemsize, 4)
    at = [(-1, -1), (13, 6)]
    out = load(encode_array(tensor, kind, box, nan=True), tensor, at, 128)
    fill = b"\xf7\x7f" * (tensor.itemsize // 2)
    assert (out == expected_load(tensor, box, at, outside=fill)).all()
    value = np.frombuffer(fill, {"f16": np.float16, "f32": np.float32, "f64": np.float64}.get(kind, np.float16))
    assert np.isnan(value).all()


def test_tf32_rounds_to_nearest_even():
    bits = [0x3F800000, 0x3F801000, 0x3F801001, 0x3F803000, 0x3F800FFF, 0xBF802FFF, 0x7F800000, 0x7F7FFFFF]
    expected = [0x3F800000, 0x3F800000, 0x3F802000, 0x3F804000, 0x3F800000, 0xBF802000, 0x7F800000, 0x7F800000]
    tensor = aligned(np.array([bits], np.uint32))
    for kind, wanted in (("tf32", expected), ("tf32.ftz", expected), ("f32", bits)):
        out = load(encode(tensor.ctypes.data, kind, (8,), (), (8,)), tensor, [(0,)], 32)
        assert out[0, :32].view(np.uint32).tolist() == wanted


def test_four_bit_elements():
    tensor = random_tensor((12, 48), np.uint8)  # 96 elements a row
    map_ = encode(tensor.ctypes.data, "b4x16", (96, 12), (48,), (64, 5), swizzle="32")
    at = [(0, 0), (32, 4), (-6, -2), (70, 9)]
    out = load(map_, tensor, at, 32 * 5)
    in_bytes = [(c // 2, r) for c, r in at]
    assert (out == expected_load(tensor, (32, 5), in_bytes, swizzle="32")).all()
    with pytest.raises(InvalidOperand, match="first coordinate 3: with b4x16 it is a multiple of 2"):
        load(map_, tensor, [(3, 0)], 32 * 5)


@pytest.mark.parametrize("kind,packed", [("b4x16_p64", 8), ("b6x16_p32", 12)])
@pytest.mark.parametrize("swizzle", ["none", "128", "128/32", "128/64"])
def test_padded_elements(kind, packed, swizzle):
    tensor = random_tensor((6, 2, 8, packed), np.uint8)
    map_ = encode(tensor.ctypes.data, kind, (256, 6), (16 * packed,), (128, 3), swizzle=swizzle)
    at = [(0, 0), (128, 4), (128, -1)]
    out = load(map_, tensor, at, 8 * packed * 3)
    # The same in slots of 16 bytes; the padding of a slot is not written.
    slots = np.zeros((6, 2, 8, 16), np.uint8)
    slots[..., :packed] = tensor
    mark = np.zeros((6, 2, 8, 16), np.uint8)
    mark[..., packed:] = 1
    in_slots = [(c, r) for c, r in at]
    wanted = expected_load(slots.reshape(6, 256), (128, 3), in_slots, swizzle=swizzle)
    gaps = expected_load(mark.reshape(6, 256), (128, 3), in_slots, swizzle=swizzle, outside=b"\2")
    written = (gaps == 0) | ((gaps == 2) & (wanted == 0))
    assert (out[written] == wanted[written]).sum() >= 8 * packed * 3 * len(at)
    assert (out[gaps == 1] == 0xFF).all() and (out[gaps == 0xFF] == 0xFF).all()
    with pytest.raises(InvalidOperand, match="multiple of 128"):
        load(map_, tensor, [(64, 0)], 8 * packed * 3)


def test_gathered_rows():
    tensor = random_tensor((20, 64), np.uint16)
    map_ = encode_array(tensor, "f16", (32, 1), swizzle="64")
    at = [(8, 3, 19, 0, 7), (40, 5, 21, -1, 5)]
    body = load_body(5, 256).replace("tensor.5d", "tensor.2d").replace("tile.", "tile::gather4.")
    out = load(map_, tensor, at, 256, body=body)
    expected = np.full((2, BARRIER), 0xFF, np.uint8)
    for row, (column, *rows) in zip(expected, at, strict=True):
        for n, r in enumerate(rows):
            boxed(tensor, (32, 1), (column, r), 64 * n, row, swizzle="64")
    assert (out == expected).all()
    with pytest.raises(InvalidOperand, match="boxes of 2 rows"):
        load(encode_array(tensor, "f16", (32, 2)), tensor, at, 256, body=body)


def test_different_maps_in_one_instruction():
    tensors = [random_tensor((8, 64), np.uint8, n) for n in range(2)]
    maps = [encode_array(t, "u8", (32, 2), swizzle=s) for t, s in zip(tensors, ("32", "none"), strict=True)]
    body = load_body(2, 64).replace("mov.u32 %r3, 0;", "mov.u32 %r3, 0; mad.wide.u32 %rd0, %r53, 128, %rd0;")
    out = np.zeros((2, BARRIER), np.uint8)
    arrays = {"map": aligned(np.stack(maps)), "at": np.zeros((2, 2), np.int32), "out": out}
    arrays |= {"a": tensors[0], "b": tensors[1]}
    run(body, arrays, shared=SHARED, grid=(2, 1, 1), uninitialized_shared="poison")
    assert (out[:1] == expected_load(tensors[0], (32, 2), [(0, 0)], swizzle="32")).all()
    assert (out[1:] == expected_load(tensors[1], (32, 2), [(0, 0)])).all()


def test_map_among_the_parameters():
    tensor = random_tensor((16, 64), np.uint8)
    map_ = encode_array(tensor, "u8", (64, 4))
    out = np.zeros((1, BARRIER), np.uint8)
    at = np.array([[0, 5]], np.int32)
    body = load_body(2, 256).replace("mov.u32 %r3, 0;", "mov.u32 %r3, 0; mov.b64 %rd20, m; cvta.param.u64 %rd0, %rd20;")
    text = f"""
        .version 8.8\n.target sm_90a\n.address_size 64
        .extern .shared .align 16 .b8 dynamic[];
        .visible .entry kernel(.param .u64 at, .param .u64 out, .param .align 64 .b8 m[128]) {{
        .reg .pred %p<20>; .reg .b32 %r<60>; .reg .b64 %rd<40>;
        ld.param.u64 %rd1, [at]; ld.param.u64 %rd2, [out]; mov.u32 %r50, %tid.x; {body} ret; }}
    """
    parameters = struct.pack("<QQ", at.ctypes.data, out.ctypes.data).ljust(64, b"\0") + map_.tobytes()
    memory = GlobalMemory([Span(a.ctypes.data, a.nbytes, "array") for a in (tensor, out, at)])
    kernel = parse(text)["kernel"]
    size = LaunchSize((1, 1, 1), (32, 1, 1), SHARED)
    launch(kernel, size, parameters, memory, Settings(uninitialized_shared="poison"))
    assert (out == expected_load(tensor, (64, 4), [(0, 5)])).all()


MULTICAST = f"""
    {start(2)}
    mov.u32 %r3, 256; mov.u32 %r20, %cluster_ctarank;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], EXPECT;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    setp.eq.u32 %p2, %r20, 0; setp.eq.u32 %p3, %r20, 2; and.pred %p2, %p2, %p1; and.pred %p3, %p3, %p1;
    mov.b16 %h1, 0xb; mov.b16 %h2, 0x5; mov.b64 %rd11, 0;
    mapa.shared::cluster.u32 %r22, %r3, %r20; mapa.shared::cluster.u32 %r23, %r2, %r20;
    @%p2 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster
        [%r3], [%rd0, {coordinates(2)}], [%r2], %h1;
    add.u32 %r22, %r22, 512;
    @%p3 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint
        [%r22], [%rd0, {coordinates(2)}], [%r23], %h2, %rd11;
    {WAIT} {DUMP}
"""


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_multicast(seed):
    """Of four CTAs, 0 sends a box to 0, 1, 3 and 2 sends another to 0, 2."""
    tensor = random_tensor((8, 32), np.uint8)
    at = [(0, 0), (9, 9), (0, 4), (9, 9)] * 2
    body = MULTICAST.replace("[%r2], EXPECT", "[%r2], %r21").replace(
        "@%p1 mbarrier.arrive", "setp.eq.u32 %p4, %r20, 0; selp.u32 %r21, 256, 128, %p4; @%p1 mbarrier.arrive"
    )
    map_ = encode_array(tensor, "u8", (32, 4))
    out = load(map_, tensor, at, 0, body=body, cluster=(4, 1, 1), seed=seed)
    expected = np.full((8, BARRIER), 0xFF, np.uint8)
    for cluster in (0, 4):
        for cta in (0, 1, 3):
            boxed(tensor, (32, 4), (0, 0), 256, expected[cluster + cta])
        for cta in (0, 2):
            boxed(tensor, (32, 4), (0, 4), 768, expected[cluster + cta])
    assert (out == expected).all()
    with pytest.raises(InvalidOperand, match="multicast to CTAs 0xb: the cluster has 2"):
        load(map_, tensor, at, 0, body=body, cluster=(2, 1, 1))


def test_a_box_to_another_cta_of_the_cluster():
    tensor = random_tensor((8, 32), np.uint8)
    body = load_body(2, 128).replace(
        "@%p1 cp.async",
        """barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
        mov.u32 %r20, %cluster_ctarank; xor.b32 %r20, %r20, 1;
        mapa.shared::cluster.u32 %r3, %r3, %r20; mapa.shared::cluster.u32 %r21, %r2, %r20; @%p1 cp.async""",
    )
    body = body.replace(", [%r2];\n        \nWAIT", ", [%r21];\nWAIT").replace("WAIT:", "WAIT:", 1)
    assert "[%r21];" in body
    out = load(encode_array(tensor, "u8", (32, 4)), tensor, [(0, 0), (0, 4)], 0, body=body, cluster=(2, 1, 1))
    assert (out == expected_load(tensor, (32, 4), [(0, 4), (0, 0)])).all()


# ---- what loads get wrong


@pytest.fixture
def tensor() -> np.ndarray:
    return random_tensor((16, 64), np.uint8)


def test_missing_wait_reads_what_was_there(tensor):
    map_ = encode_array(tensor, "u8", (64, 4))
    with pytest.raises((UninitializedShared, BarrierMismatch)):
        load(map_, tensor, [(0, 0)], 256, body=load_body(2, 256, wait=""), uninitialized_shared="error", races=False)
    with pytest.raises(DataRace, match="no wait for that phase of the mbarrier"):
        load(map_, tensor, [(0, 0)], 256, body=load_body(2, 256, wait=""))


def test_bytes_that_do_not_add_up(tensor):
    map_ = encode_array(tensor, "u8", (64, 4))
    with pytest.raises(Deadlock, match="16 bytes announced by expect_tx are not being copied"):
        load(map_, tensor, [(0, 0)], 256, body=load_body(2, 256, expect=272))
    with pytest.raises(BarrierMismatch, match="expect_tx announced"):
        load(map_, tensor, [(0, 0)], 256, body=load_body(2, 256, expect=240))


def test_memory_of_the_map_that_was_not_passed(tensor):
    map_ = encode_array(tensor, "u8", (64, 4))
    longer = encode(tensor.ctypes.data, "u8", (64, 17), (64,), (64, 4))
    load(longer, tensor, [(0, 12)], 256)
    with pytest.raises(OutOfBounds, match="0 bytes past the end of `tensor`.*64 bytes in all"):
        load(longer, tensor, [(0, 12), (0, 13)], 256)
    load(map_, tensor, [(0, 13)], 256)
    with pytest.raises(OutOfBounds, match="the tensor map at .* is out of bounds"):
        load(map_, tensor, [(0, 0)], 256, body=load_body(2, 256).replace("[%rd0, {", "[%rd0+64, {"))


@pytest.mark.parametrize("offset", [16, 64])
def test_misaligned_destination(tensor, offset):
    with pytest.raises(Misaligned, match="not a multiple of 128"):
        load(encode_array(tensor, "u8", (64, 4)), tensor, [(0, 0)], 256, offset)


def test_box_past_the_end_of_shared_memory(tensor):
    map_ = encode_array(tensor, "u8", (64, 4))
    with pytest.raises(OutOfBounds, match="0x2000 to 0x2100 is out of bounds"):
        load(map_, tensor, [(0, 0)], 256, offset=8192)


def test_operands(tensor):
    map_ = encode_array(tensor, "u8", (64, 4))
    with pytest.raises(InvalidOperand, match="2 dimensions, the instruction 3"):
        load(map_, tensor, [(0, 0, 0)], 256)
    with pytest.raises(InvalidOperand, match="the tensor map at 0x.* is invalid: interleaved"):
        load(encode_array(tensor, "u8", (64, 4), interleave=2), tensor, [(0, 0)], 256)
    with pytest.raises(BarrierMismatch, match="nobody has initialised"):
        body = load_body(2, 256, wait="").replace("%r10, %r11}], [%r2]", "%r10, %r11}], [%r2+8]")
        load(map_, tensor, [(0, 0)], 256, body=body)


@pytest.mark.parametrize("mode", ["im2col", "cta_group::2", "im2col::w"])
def test_modes_that_are_not_modelled(tensor, mode):
    body = load_body(2, 256).replace("global.tile", f"global.{mode}")
    with pytest.raises(UnknownInstruction):
        load(encode_array(tensor, "u8", (64, 4)), tensor, [(0, 0)], 256, body=body)
