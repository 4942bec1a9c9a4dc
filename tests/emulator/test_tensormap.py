"""tensormap.replace and tensormap.cp_fenceproxy: a map is edited field by field into another one."""

from __future__ import annotations

import numpy as np
import pytest

from cute_attn.emulator.errors import DivergentWarp, Misaligned, OutOfBounds, UninitializedShared, UnknownInstruction

from .harness import run
from .tensor_maps import TYPES, encode
from .tma_programs import aligned

FROM = encode(0x7F0000001230, "u8", (256, 5, 6, 7, 8), (256, 512, 1024, 2048), (32, 1, 2, 1, 1))
TO = encode(
    0x6E1234567890,
    "tf32",
    (100, 70, 9, 11, 13),
    (208, 1 << 39, 0xF_1234_5670, 64),
    (32, 200, 8, 1, 256),
    swizzle="128",
    steps=(2, 1, 8, 3, 1),
    nan=True,
)
STRIDES = (208, 1 << 39, 0xF_1234_5670, 64)
EDITS = (
    [
        ("global_address", None, 0x6E1234567890),
        ("elemtype", None, 11),
        ("swizzle_mode", None, 3),
        ("fill_mode", None, 1),
    ]
    + [("global_dim", n, v) for n, v in enumerate((100, 70, 9, 11, 13))]
    + [("global_stride", n, v) for n, v in enumerate(STRIDES)]
    + [("box_dim", n, v) for n, v in enumerate((32, 200, 8, 1, 256))]
    + [("element_stride", n, v) for n, v in enumerate((2, 1, 8, 3, 1))]
)


def edit(space: str, address: str, edits=EDITS) -> str:
    lines = []
    for field, ordinal, value in edits:
        wide = field in ("global_address", "global_stride")
        where = address if ordinal is None else f"{address}, {ordinal}"
        register = "%rd9" if wide else "%r9"
        if field in ("elemtype", "swizzle_mode", "fill_mode", "interleave_layout", "swizzle_atomicity"):
            register = str(value)
        else:
            lines.append(f"mov.b{64 if wide else 32} {register}, {value};")
        kind = "b64" if wide else "b32"
        lines.append(f"@%p1 tensormap.replace.tile.{field}{space}.b1024.{kind} {where}, {register};")
    return "\n".join(lines)


# Copies the map in %rd0 to shared memory, edits it there in thread 0, and sends it to %rd1.
BODY = """
    setp.eq.u32 %p1, %r50, 0; mov.u32 %r1, dynamic; mul.lo.u32 %r2, %r50, 4; mad.wide.u32 %rd5, %r50, 4, %rd0;
    ld.global.u32 %r3, [%rd5]; add.u32 %r2, %r2, %r1; st.shared.u32 [%r2], %r3; bar.warp.sync 0xffffffff;
    EDITS
    bar.warp.sync 0xffffffff;
    tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%rd1], [%r1], 128;
    fence.proxy.tensormap::generic.acquire.gpu [%rd1], 128;
"""


def edited(body: str, before: np.ndarray = FROM) -> np.ndarray:
    out = aligned(np.zeros(128, np.uint8))
    run(body, {"map": aligned(before), "out": out}, shared=256)
    return out


def test_every_field_in_shared_memory():
    assert (edited(BODY.replace("EDITS", edit(".shared::cta", "[%r1]"))) == TO).all()
    assert (edited(BODY.replace("EDITS", "")) == FROM).all()


@pytest.mark.parametrize("space,address", [(".global", "[%rd0]"), ("", "[%rd0]"), ("", "[%rd8]")])
def test_every_field_by_other_addresses(space, address):
    """In global memory, and by the generic address of shared memory."""
    to_shared = "cvt.u64.u32 %rd7, %r1; cvta.shared.u64 %rd8, %rd7;"
    body = BODY.replace("EDITS", to_shared + edit(space, address))
    if address == "[%rd0]":
        copy = aligned(FROM)
        run(body, {"map": copy, "out": aligned(np.zeros(128, np.uint8))}, shared=256)
        assert (copy == TO).all()
    else:
        assert (edited(body) == TO).all()


@pytest.mark.parametrize("number", range(16))
def test_element_types(number):
    names = [*TYPES[:11], "tf32", "tf32.ftz", *TYPES[11:]]
    out = edited(BODY.replace("EDITS", edit(".shared::cta", "[%r1]", [("elemtype", None, number)])))
    expected = encode(0, names[number], (1,), (), (1,)).view(np.uint32)[2] & 0x10780
    assert out.view(np.uint32)[2] & 0x10780 == expected
    assert (np.delete(out.view(np.uint32), 2) == np.delete(FROM.view(np.uint32), 2)).all()


@pytest.mark.parametrize("rank", range(1, 6))
def test_rank_is_stored_less_one_already(rank):
    out = edited(BODY.replace("EDITS", edit(".shared::cta", "[%r1]", [("rank", None, rank - 1)])))
    assert out.view(np.uint32)[2] >> 4 & 7 == rank - 1


@pytest.mark.parametrize("value,bits", [(0, 0), (1, 0x80000), (2, 0x100000), (3, 0x180000)])
def test_atomicity(value, bits):
    out = edited(BODY.replace("EDITS", edit(".shared::cta", "[%r1]", [("swizzle_atomicity", None, value)])))
    assert out.view(np.uint32)[2] & 0x180000 == bits


def test_findings():
    edits = edit(".shared::cta", "[%r1]")
    with pytest.raises(Misaligned, match="not a multiple of 64"):
        edited(BODY.replace("EDITS", edits.replace("[%r1]", "[%r1+16]")))
    with pytest.raises(OutOfBounds, match="of shared memory"):
        edited(BODY.replace("EDITS", edits.replace("[%r1]", "[%r1+192]")))
    with pytest.raises(UninitializedShared):
        edited(BODY.replace("EDITS", edit(".shared::cta", "[%r1+128]", [("rank", None, 1)])))
    with pytest.raises(OutOfBounds, match="past the end of `map`|reaching"):
        edited(BODY.replace("EDITS", edit(".global", "[%rd0+64]")))
    with pytest.raises(DivergentWarp):
        edited(BODY.replace("EDITS", "").replace("tensormap.cp", "@%p1 tensormap.cp"))
    with pytest.raises(Misaligned, match="not a multiple of 128"):
        edited(BODY.replace("EDITS", "").replace("[%rd1], [%r1]", "[%rd1], [%r1+64]"))


@pytest.mark.parametrize("field,value", [("swizzle_mode", 4), ("elemtype", 16), ("fill_mode", 2)])
def test_values_that_do_not_exist(field, value):
    with pytest.raises(UnknownInstruction):
        edited(BODY.replace("EDITS", edit(".shared::cta", "[%r1]", [(field, None, value)])))
