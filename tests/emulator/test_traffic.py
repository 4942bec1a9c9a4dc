"""Bytes of global memory that instructions move: sectors of 32 bytes, each once per warp and instruction."""

from __future__ import annotations

import numpy as np
import pytest

from .harness import run

ARRAYS = {"x": np.zeros(4096, np.uint32)}


def traffic(body: str, threads: int = 32, **options) -> dict[str, int]:
    start = -ARRAYS["x"].ctypes.data % 128  # the array's first byte at a multiple of a sector
    x = ARRAYS["x"][start // 4 :]
    return run(body, {"x": x}, block=(threads, 1, 1), traffic=True, **options).traffic


def address(stride: int) -> str:
    """%rd1 = x + stride · thread."""
    return f"mul.wide.u32 %rd1, %r50, {stride}; add.u64 %rd1, %rd0, %rd1;"


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (16, 16), (32, 32), (64, 32), (0, 1)])
def test_sectors_of_a_warp(stride, sectors):
    load = f"{address(stride)} ld.global.u32 %r1, [%rd1];"
    assert traffic(load) == {"read": 32 * sectors}
    assert traffic(load, threads=96) == {"read": 3 * 32 * sectors}
    assert traffic(f"{address(stride)} st.global.u32 [%rd1], %r50;") == {"write": 32 * sectors}


def test_wide_accesses_and_uniform_addresses():
    assert traffic(f"{address(16)} ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd1];") == {"read": 512}
    assert traffic("ld.global.u32 %r1, [%rd0];", threads=64) == {"read": 64}


def test_every_instruction_counts_again():
    assert traffic(f"{address(4)} ld.global.u32 %r1, [%rd1]; ld.global.u32 %r2, [%rd1];") == {"read": 256}


def test_only_lanes_that_take_part_count():
    assert traffic(f"{address(4)} setp.lt.u32 %p1, %r50, 9; @%p1 ld.global.u32 %r1, [%rd1];") == {"read": 64}


def test_asynchronous_copies_and_atomics():
    copy = f"{address(16)} mul.lo.u32 %r1, %r50, 16; cp.async.cg.shared.global [%r1], [%rd1], 16; cp.async.wait_all;"
    assert traffic(copy, shared=512) == {"read": 512}
    assert traffic(f"{address(4)} red.global.add.u32 [%rd1], %r50;") == {"atomic access": 128}


def test_nothing_is_counted_unasked():
    assert run(f"{address(4)} ld.global.u32 %r1, [%rd1];", ARRAYS).traffic == {}
