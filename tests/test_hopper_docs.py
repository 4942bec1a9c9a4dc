"""What the figures and tables of docs/hopper.md claim is so. That they are current: `test_layout_docs`."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from layouts.permutations import QUAD
from layouts.warpgroup import timeline as trace
from layouts.warpgroup.cores import Operand, canonical, conflicts, operands
from layouts.warpgroup.draw_tile import tile_parts
from layouts.warpgroup.fragments import (
    p_operand,
    p_tokens,
    packed_scores,
    s_accumulator,
    score_element,
    sums_accumulator,
    v_tokens,
)
from layouts.warpgroup.kernels import (
    ARCH,
    HEAD_DIM,
    HEAD_DIMS,
    NAMES,
    SHOWN,
    elsewhere,
    image_of,
    kernel_of,
    kernel_report,
)
from layouts.warpgroup.lse import bias_of_lse
from layouts.warpgroup.machine import barriers, roles
from layouts.warpgroup.operands import parts_of_v, register_tensors
from layouts.warpgroup.passports import shared_tensors
from layouts.warpgroup.tabulated import waits
from layouts.warpgroup.timeline import P_V, WAIT, WORK, S, timeline

from cute_attn.arch import ARCHS
from cute_attn.kernels.softmax_warpgroup import FORMATS
from cute_attn.kernels.swizzled_tile import SwizzledTile
from cute_attn.kernels.tile_image import VALUE_BYTES, StaticLayout
from cute_attn.kernels.work_queue import WorkQueue
from cute_attn.tile_images import FORMAT_DTYPES, pack_tile_images

THREADS = range(128)
QUANTISED = tuple(name for name in NAMES if name not in ("fp16", "bf16"))
COMPILED = [*((name, HEAD_DIM) for name in NAMES), (trace.NAME, 64), (trace.NAME, 256), ("bf16", 256)]
"""Kernels of the tables that are looked into here; how all are compiled is for the tests of static costs."""
LARGEST = 65536
"""Registers of a multiprocessor."""


def swizzled(byte: int, swizzle: tuple[int, int, int]) -> int:
    bits, base, shift = swizzle
    return byte ^ ((byte >> shift) & (((1 << bits) - 1) << base))


@pytest.mark.parametrize("operand", operands(), ids=lambda o: o.name.replace("`", ""))
def test_operands_lie_as_their_descriptors_say(operand: Operand) -> None:
    """Every byte that an instruction reads: the canonical layout from its first byte on, and then the swizzle, which
    is one of addresses."""
    plain = canonical(operand)
    flat = replace(plain, swizzle=None)
    assert plain.swizzle is not None and operand.layout.swizzle == plain.swizzle
    along = operand.contiguous_bytes
    seen = set()
    for step, first in enumerate(operand.starts):
        for row, byte in itertools.product(range(operand.rows), range(0, along, 16)):
            at = swizzled(first + flat(row, byte), plain.swizzle)
            whole = (row, step * along + byte) if operand.major == "K" else (step * operand.rows + row, byte)
            assert operand.layout(*whole) == at
            seen.add(at)
    rows, row_bytes = operand.layout.extents()
    assert len(seen) == rows * row_bytes // 16 == len(operand.starts) * operand.rows * along // 16
    assert conflicts(operand) == 1


@pytest.mark.parametrize("name", QUANTISED)
def test_rows_of_k_and_v_are_rows_of_those_operands(name: str) -> None:
    """The image permutes whole rows, so K and V lie in planes as Q does; the ones close each plane."""
    image = image_of(name)
    size = VALUE_BYTES[image.values]
    row = 32
    k = {frozenset(image.k(token, byte) for byte in range(row)) for token in range(image.tokens)}
    assert k == {frozenset(range(first, first + row)) for first in range(0, image.tokens * row, row)}
    plane, values = image.value_rows * row, image.value_channels * row
    used = {image.v(c, t) + b for c in range(image.value_channels) for t in range(image.tokens) for b in range(size)}
    ones = {image.ones_offset - image.v_offset + image.ones(byte, i)
            for byte in range(image.sum_rows * row) for i in range(image.ones.extents()[1])}  # fmt: skip
    planes = image.tokens * size // row
    assert not used & ones
    assert used | ones == set(range(planes * plane))
    assert ones == {i * plane + byte for i in range(planes) for byte in range(values, plane)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [40, *HEAD_DIMS])
def test_parts_of_a_tile_follow_one_another(name: str, head_dim: int) -> None:
    kernel = kernel_of(name, head_dim)
    edges = [(part.begin, part.end) for part in tile_parts(kernel)]
    assert edges[0][0] == 0 and edges[-1][1] == kernel.image.nbytes
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(edges))


def test_the_ones_are_where_the_quantiser_writes_them() -> None:
    image = image_of(trace.NAME)
    empty = torch.zeros(1, 1, image.tokens, image.head_dim)
    v = empty.to(FORMAT_DTYPES[image.values])
    packed = pack_tile_images(empty.to(torch.int8), empty[..., 0], v, image.keys, image.tokens, image.sum_rows)
    one = int(torch.ones(1).to(v.dtype).view(torch.uint8))
    ones = [part for part in tile_parts(kernel_of(trace.NAME)) if part.name == "1"]
    assert packed.flatten().nonzero().flatten().tolist() == [b for part in ones for b in range(part.begin, part.end)]
    assert {int(packed[0, 0, 0, part.begin]) for part in ones} == {one}


@pytest.mark.parametrize("name", NAMES)
def test_every_element_of_a_fragment_has_one_owner(name: str) -> None:
    for fragment in (s_accumulator(name), p_operand(name), sums_accumulator(name)):
        assert sorted(fragment.owners()) == list(itertools.product(*map(range, fragment.shape)))


@pytest.mark.parametrize("name", NAMES)
def test_fragments_are_as_the_ptx_manual_has_them(name: str) -> None:
    """PTX ISA, "Register Fragments for wgmma": of warp w, lane 4·g + t, rows 16·w + g + 8·r."""
    c, a = s_accumulator(name), p_operand(name)
    each = a.packed
    for thread in THREADS:
        warp, (g, t) = thread // 32, divmod(thread % 32, QUAD)
        for i in range(c.values):
            assert c.place(thread, i) == (16 * warp + g + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * t + i % 2)
        for i in range(a.values):
            register, j = divmod(i, each)
            row, k = 16 * warp + g + 8 * (register & 1), 4 * each * (register >> 1) + each * t + j
            assert a.place(thread, i) == (row, k)


@pytest.mark.parametrize("name", NAMES)
def test_the_accumulator_of_s_is_the_operand_of_p_v(name: str) -> None:
    """Every element of every thread: the packed score is the (row, token) that the MMA multiplies with V's row."""
    a, tokens = p_operand(name), kernel_of(name).image.tokens
    seen = set()
    for thread, block in itertools.product(THREADS, range(tokens // a.shape[1])):
        assert packed_scores(name, thread, block) == p_tokens(name, thread, block)
        seen |= set(p_tokens(name, thread, block))
    assert seen == set(itertools.product(range(64), range(tokens)))
    assert sorted(v_tokens(name)) == list(range(tokens))


@pytest.mark.parametrize("name", QUANTISED)
def test_a_lane_has_four_neighbouring_tokens_of_16(name: str) -> None:
    """Those that share a scale with qk_scale="thread"."""
    for thread in THREADS:
        tokens = {score_element(name, thread, i)[1] for i in range(s_accumulator(name).values)}
        assert tokens == {16 * i + 4 * (thread % QUAD) + j for i in range(8) for j in range(4)}


@pytest.mark.parametrize("name", QUANTISED)
def test_every_lane_of_a_row_gets_its_sum(name: str) -> None:
    """In the last n8 tile, in the accumulators that the softmax reads: ((e, r), 0, last)."""
    image, c = image_of(name), sums_accumulator(name)
    for thread in THREADS:
        places = [c.place(thread, i) for i in range(c.values - 4, c.values)]
        assert all(image.value_channels <= column < image.value_rows for _, column in places)
        assert len({row for row, _ in places}) == 2


@pytest.mark.parametrize("name", SHOWN)
def test_shared_tensors_follow_one_another_and_are_aligned(name: str) -> None:
    kernel = kernel_of(name)
    for (tensor, _, layout, _, _, first, _, _), aligned in shared_tensors(name):
        if layout.swizzle:  # the bits that it looks at are those of an address
            bits, base, shift = layout.swizzle
            assert aligned >= 1 << (base + shift + bits), tensor
        assert first < kernel.shared_bytes
    barriers, mailbox = (tensor[5] for tensor, _ in shared_tensors(name)[-2:])
    assert mailbox == barriers + 8 * (2 * kernel.config.stages + 1) == kernel.shared_bytes - WorkQueue.nbytes()


@pytest.mark.parametrize(("name", "head_dim"), COMPILED)
def test_budgets(name: str, head_dim: int) -> None:
    """Shared memory and registers fit; what is alive at once fits into what a consumer may have."""
    kernel, registers = kernel_of(name, head_dim), roles(name, head_dim)
    config = kernel.config
    queries, ring = config.warpgroups * kernel.q_bytes, config.stages * kernel.stage_bytes
    assert queries + ring < kernel.shared_bytes <= ARCHS[ARCH].shared_bytes
    assert kernel.consumers * registers.consumer + 128 * registers.producer <= LARGEST
    held = {key: tensor.registers for key, tensor in register_tensors(name, head_dim).items()}
    rows = kernel.image.value_rows
    assert held["O"] == rows // 2 and held["S"] == kernel.image.tokens // 2
    assert sum(parts_of_v(name, head_dim)) == rows
    assert held.get("PV", 0) == (max(parts_of_v(name, head_dim)) // 2 if "+" in config.accumulate else 0)
    used = kernel_report(name, head_dim).highest_register + 1
    alive = max(held["O"] + held["S"], held["O"] + held["P"] + held.get("PV", 0))
    assert max(alive, held["O"]) < used <= registers.consumer


@pytest.mark.parametrize(("name", "head_dim"), COMPILED)
def test_a_tile_waits_for_its_products_and_spills_nothing(name: str, head_dim: int) -> None:
    """One wait for S; for P·V one, and one for each part that is added up apart."""
    steady = kernel_report(name, head_dim).steady
    assert steady is not None
    apart = len(parts_of_v(name, head_dim)) if "+" in kernel_of(name, head_dim).config.accumulate else 1
    assert waits(steady) == 1 + apart
    assert steady.spills == 0


@pytest.mark.parametrize(("name", "head_dim"), COMPILED)
def test_what_bounds_a_tile(name: str, head_dim: int) -> None:
    """2^x takes 8 cycles of the XU pipe, which has nothing else to do; the tensor pipe more, from head dim 128 on."""
    steady = kernel_report(name, head_dim).steady
    assert steady is not None
    assert steady.floors["xu"] == 8.0
    largest = steady.floors["tensor" if head_dim >= 128 else "xu"]
    assert largest == max(steady.slots["fast"], *steady.floors.values())


@pytest.mark.parametrize(("name", "head_dim"), COMPILED)
def test_barriers_count_what_arrives(name: str, head_dim: int) -> None:
    config, found = kernel_of(name, head_dim).config, barriers(name, head_dim)
    assert found.full == (1,) * config.stages
    assert found.empty == (4 * config.warpgroups,) * config.stages
    assert found.own == 1
    assert (found.queue_full, found.queue_empty) == ((1, 1), (4 * config.warpgroups,) * 2)


def test_the_timeline_is_that_of_a_ring() -> None:
    """Tiles from the last to the first through the stages in turn; no tile is requested for a stage before all
    warpgroups are done with the one before, nor used before it is there."""
    seen, config = timeline(), kernel_of(trace.NAME).config
    assert [copy.tile for copy in seen.copies] == list(reversed(range(trace.TILES)))
    assert [copy.stage for copy in seen.copies] == [i % config.stages for i in range(trace.TILES)]
    assert len(seen.warpgroups) == config.warpgroups
    for spans in seen.warpgroups:
        assert [span.tile for span in spans if span.kind == S] == list(reversed(range(trace.TILES)))
        assert [span.tile for span in spans if span.kind == P_V] == list(reversed(range(trace.TILES)))
        assert all(a.end == b.begin for a, b in itertools.pairwise(spans))
        assert spans[0].begin == 0 and spans[-1].end <= seen.end
        assert {span.kind for span in spans} == {S, P_V, WAIT, WORK}
    last_use: dict[int, int] = {}
    for copy in seen.copies:
        uses = [s for spans in seen.warpgroups for s in spans if s.tile == copy.tile and s.kind in (S, P_V)]
        assert copy.begin >= last_use.get(copy.stage, 0)
        assert copy.end <= min(use.begin for use in uses)
        last_use[copy.stage] = max(use.end for use in uses)
    assert len(seen.producer) == trace.TILES - config.stages


@pytest.mark.parametrize("name", NAMES)
def test_three_warpgroups_as_far_as_the_page_says(name: str) -> None:
    most = 128 if name in QUANTISED else 160
    assert [kernel_of(name, head_dim).config.warpgroups for head_dim in (most, most + 8)] == [3, 2]


def test_what_the_warpgroup_mmas_do_not_serve() -> None:
    """The page says why for these two fields, and that all others are served."""
    assert {field for field, _ in elsewhere()} == {"smooth_q", "accumulate"}


def test_p_never_passes_the_largest_e4m3() -> None:
    """The top is the last float32 whose power does not; a row's largest P is 112 or more when its maximum is raised."""
    e4m3 = FORMATS["e4m3"]
    largest = torch.finfo(torch.float8_e4m3fn).max
    above = float(torch.nextafter(torch.tensor(e4m3.top), torch.tensor(math.inf)))
    assert 2.0**e4m3.top <= largest < 2.0**above
    assert round(2.0 ** (e4m3.top - e4m3.headroom - 1)) == 112


def test_bias_of_the_lse_is_bounded() -> None:
    bound = math.log(1 + 2.0**-4)
    assert 0.9 * bound < bias_of_lse(0.0).largest <= bound
    for spread in (0.25, 1.0, 2.0, 4.0):
        assert abs(bias_of_lse(spread).mean) < 0.002
        assert bias_of_lse(spread).largest < bound / 2


def test_unquantised_tiles_are_what_tma_writes() -> None:
    """A block of 64 channels of K and V as operands is the box of one TMA copy, byte for byte."""
    tile = kernel_of("bf16").image
    assert isinstance(tile, SwizzledTile)
    box: StaticLayout = replace(tile.block, swizzle=None)
    for token, channel in itertools.product(range(tile.tokens), range(tile.head_dim)):
        at = channel // 64 * tile.tokens * 64 + box(token, channel % 64)
        assert tile.rows(token, channel) == tile.columns(channel, token) == at
