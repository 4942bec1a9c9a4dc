"""The generated pages are what the kernels' objects say; what the figures of int8_layouts.md claim is so."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from math import prod
from pathlib import Path

import pytest
from layouts.banks import conflict_ways, phases, placements
from layouts.budgets import LARGEST, REGISTERS_PER_SM, WARPS, registers, shared
from layouts.copies import copies
from layouts.fragments import MMAS, S8, U8, Mma, fragments, ldmatrix_layouts
from layouts.main_loop import STEPS
from layouts.operands import register_tensors
from layouts.padding import padding
from layouts.passports import shared_alignments
from layouts.permutations import QUAD, lane_channels, p_tokens, packed_scores
from layouts.ring import record, record_split
from layouts.tabulated import CONFIG_DIMS, PADDED_DIMS
from layouts.tiles import ARCH_NAMES, HEAD_DIM, HEAD_DIMS, LOOP_NAMES, NAMES, config_of, has, mmas_of, parts

from cute_attn import jit
from cute_attn.arch import ARCHS
from cute_attn.kernels.attention_sm80 import AttentionSm80
from cute_attn.kernels.epilogue import OUTPUT_VECTOR
from cute_attn.kernels.operand_planes import a_fragment_row, b_fragment_row, operand_planes
from cute_attn.kernels.tile_image import KEY_BITS, TILE_TOKENS, VALUE_BYTES, StaticLayout, TileImage
from cute_attn.sass import disassemble

from .conftest import assert_page_is_current

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "int8_layouts.md"
PAGES = (PAGE, DOCS / "hopper.md")
FIGURES = sorted((DOCS / "figures").glob("*.svg"))
LANES = range(32)


def test_pages_and_figures_are_what_the_kernels_say() -> None:
    assert_page_is_current("make_layouts.py")


@pytest.mark.parametrize("figure", FIGURES, ids=lambda path: path.stem)
def test_figures_stand_alone(figure: Path) -> None:
    """They scale, bring their background, need no font, image or style from elsewhere, and one page shows them."""
    text = figure.read_text(encoding="utf-8")
    root = ET.fromstring(text)
    assert root.get("viewBox") and root.get("width") is None
    width, height = root.get("viewBox", "").split()[2:]
    background = next(child for child in root if child.tag.endswith("rect"))
    assert (background.get("width"), background.get("height")) == (width, height)
    assert len(text.encode()) < 150_000
    assert not re.search(r"href|url\(|@import|<image|<script", text)
    assert sum(f"](figures/{figure.name})" in page.read_text(encoding="utf-8") for page in PAGES) == 1


@pytest.mark.parametrize("mma", MMAS, ids=lambda mma: mma.name)
def test_fragments_are_as_the_ptx_manual_has_them(mma: Mma) -> None:
    """PTX ISA, "Matrix Fragments for mma.m16n8k…": the formulas in the docstring of `MmaInt8Op`, for any element."""
    a, b, c = fragments(mma).values()
    each = a.packed  # k in a register
    for lane in LANES:
        g, t = divmod(lane, QUAD)
        for value in range(a.values):
            register, j = divmod(value, each)
            row, k = g + 8 * (register & 1), 4 * each * (register >> 1) + each * t + j
            assert a.place(lane, value) == (row, k)
        for value in range(b.values):
            register, j = divmod(value, each)
            assert b.place(lane, value) == (g, 4 * each * register + each * t + j)
        for register in range(c.values):
            assert c.place(lane, register) == (g + 8 * (register >> 1), 2 * t + (register & 1))


@pytest.mark.parametrize("mma", MMAS, ids=lambda mma: mma.name)
def test_every_element_of_an_mma_has_one_owner(mma: Mma) -> None:
    for fragment in fragments(mma).values():
        assert sorted(fragment.owners()) == list(itertools.product(*map(range, fragment.shape)))
        assert len(fragment.owners()) == len(LANES) * fragment.values


def test_signed_and_unsigned_operands_lie_alike() -> None:
    """One figure serves both."""
    assert [f.layout for f in fragments(S8).values()] == [f.layout for f in fragments(U8).values()]


def received(addressed: dict[int, tuple[int, int]], transpose: bool) -> dict[tuple[int, int], tuple[int, int]]:
    """(lane, register, half) -> (row, byte) of the 16 bits that ldmatrix.x4 puts there.

    addressed: lane -> (row, byte) of the 16 bytes whose address it gives
    """
    source, target = ldmatrix_layouts(transpose)
    place = {}
    for lane, element in itertools.product(LANES, range(8)):
        row, byte = addressed[lane]
        place[source(lane, element)] = row, byte + 2 * element
    return {(lane, value): place[target(lane, value)] for lane, value in itertools.product(LANES, range(8))}


@pytest.mark.parametrize("mma", MMAS, ids=lambda mma: mma.name)
def test_ldmatrix_brings_what_the_mma_wants(mma: Mma) -> None:
    """The rows that the kernels address become an A fragment, and two B fragments of 8 columns each."""
    per_half = 16 // mma.bits
    a, b, _ = fragments(mma).values()
    for (lane, value), (row, byte) in received({lane: a_fragment_row(lane) for lane in LANES}, False).items():
        assert a.place(lane, value * per_half) == (row, byte * 8 // mma.bits)
    for (lane, value), (row, byte) in received({lane: b_fragment_row(lane) for lane in LANES}, False).items():
        column, k = b.place(lane, value % 4 * per_half)
        assert (column + 8 * (value // 4), k) == (row, byte * 8 // mma.bits)


def test_transposed_ldmatrix_brings_b_of_unquantised_values() -> None:
    """Rows are k there, and 16 columns of 2 bytes make the two fragments."""
    b = fragments(mmas_of(config_of("bf16"))[1])["B"]
    for (lane, value), (row, byte) in received({lane: a_fragment_row(lane) for lane in LANES}, True).items():
        column, k = b.place(lane, value % 4)
        assert (k, column + 8 * (value // 4)) == (row, byte // 2)


@pytest.mark.parametrize("row_bytes", [64, 128, 256, 512])
def test_bank_conflicts_of_the_placements(row_bytes: int) -> None:
    ways = [{conflict_ways(phase) for phase in phases(placement.layout)} for placement in placements(row_bytes)]
    assert ways == [{min(row_bytes // 16, 8)}, {2}, {1}]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, *PADDED_DIMS])
def test_operands_of_the_kernels_lie_in_swizzled_planes(name: str, head_dim: int) -> None:
    """Q, K and V are rows of `operand_planes`, which has no conflicts, in some order of rows and of elements."""
    kernel = AttentionSm80(config_of(name, head_dim))
    image = kernel.image
    layouts: list[tuple[StaticLayout, int, int]] = [(kernel.q_planes, kernel.rows, kernel.q_bytes // kernel.rows)]
    if isinstance(image, TileImage):
        wide = VALUE_BYTES[image.values]
        layouts += [(image.k, TILE_TOKENS, image.k.extents()[1]), (image.v, image.v.extents()[0], TILE_TOKENS * wide)]
    else:
        layouts.append((image.planes, TILE_TOKENS, image.key_bytes))
    for layout, rows, row_bytes in layouts:
        planes = operand_planes(rows, row_bytes)
        assert {conflict_ways(phase) for phase in phases(planes)} == {1}
        whole_rows = {frozenset(planes(row, byte) for byte in range(row_bytes)) for row in range(rows)}
        step = row_bytes // layout.extents()[1]
        assert whole_rows == {
            frozenset(layout(row, i) + byte for i in range(layout.extents()[1]) for byte in range(step))
            for row in range(rows)
        }


@pytest.mark.parametrize("values", ["int8", "float16"])
def test_the_accumulator_of_s_is_the_operand_of_p_v(values: str) -> None:
    """Every element of every lane: the packed score is the (row, token) that the MMA multiplies with V's row."""
    image = TileImage(HEAD_DIM, values)
    k = fragments(mmas_of(config_of("int8" if values == "int8" else "int8_fp16"))[1])["A"].shape[1]
    seen = set()
    for lane, block in itertools.product(LANES, range(TILE_TOKENS // k)):
        assert packed_scores(image, lane, block) == p_tokens(image, lane, block)
        seen |= set(p_tokens(image, lane, block))
    assert seen == set(itertools.product(range(16), range(TILE_TOKENS)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, *PADDED_DIMS])
def test_stores_are_runs_of_neighbouring_channels(name: str, head_dim: int) -> None:
    """And each channel of D is stored once, by the lanes that the table of padding counts; none past D is."""
    kernel = AttentionSm80(config_of(name, head_dim))
    image = kernel.image
    run = OUTPUT_VECTOR
    stored, storing = [], 0
    for lane, group in itertools.product(range(QUAD), range(-(-head_dim // (QUAD * run)))):
        if QUAD * group + lane >= head_dim // run:
            continue  # as `store_output` predicates runs
        storing += 1
        if image.output_run == run:  # a lane's own, of four n8 tiles
            places = [(2 * lane + i % 2, QUAD * group + i // 2) for i in range(run)]
        else:  # after `quad_transpose` those of one n8 tile, of four lanes
            places = [(i, QUAD * group + lane) for i in range(run)]
        channels = [image.output_channels(*place) for place in places]
        assert channels == list(range(QUAD * run * group + run * lane, QUAD * run * group + run * lane + run))
        if isinstance(image, TileImage):
            assert lane_channels(image, lane, group) == channels
        stored += channels
    assert sorted(stored) == list(range(head_dim))
    terms = [term.split(" × ") for term in padding(kernel).runs.split(" + ")]
    assert storing == sum(prod(map(int, term)) for term in terms)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, *PADDED_DIMS])
def test_padding_is_the_bytes_that_no_element_lies_in(name: str, head_dim: int) -> None:
    """Counted byte by byte in the image, from the layouts."""
    kernel = AttentionSm80(config_of(name, head_dim))
    image, there = kernel.image, padding(kernel)
    used: set[int] = set()
    if isinstance(image, TileImage):
        row, wide = head_dim * KEY_BITS[image.keys] // 8, VALUE_BYTES[image.values]
        keys = (image.k(token, byte) for token in range(TILE_TOKENS) for byte in range(row))
        values = (image.v(channel, token) for channel in range(head_dim) for token in range(TILE_TOKENS))
        used |= {image.k_offset + offset for offset in keys}
        used |= {image.v_offset + offset + byte for offset in values for byte in range(wide)}
        used |= set(range(image.scale_offset, image.nbytes))
    else:
        rows = [image.planes(token, byte) for token in range(TILE_TOKENS) for byte in range(2 * head_dim)]
        used |= {first + offset for first in (image.k_offset, image.v_offset) for offset in rows}
        read, chunks = map(int, there.chunks.split(" of "))
        assert (16 * read, 16 * chunks) == (2 * head_dim, image.planes.extents()[1])
    assert used <= set(range(image.nbytes))
    assert there.share == pytest.approx(1 - len(used) / image.nbytes)
    k = fragments(mmas_of(kernel.config)[0])["A"].shape[1]
    assert there.key_dims == -(-head_dim // k) * k


@pytest.mark.parametrize("name", NAMES)
def test_machine_code_moves_as_many_bytes_as_the_page_says(name: str) -> None:
    config = config_of(name)
    functions = disassemble(jit.build(AttentionSm80, config, "sm_80").cubin)
    opcodes = {i.opcode.replace(".MT88", ".M(T)88").replace(".M88", ".M(T)88").replace(".LTC128B", "")
               for function in functions.values() for i in function.instructions}  # fmt: skip
    for copy in copies(config):
        assert copy.instruction in opcodes, copy
    others = {"STG.E", "STG.E.64", "STG.E.128"} - {copies(config)[-1].instruction}
    assert not opcodes & others


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_parts_of_a_tile_follow_one_another(name: str, head_dim: int) -> None:
    kernel = AttentionSm80(config_of(name, head_dim))
    edges = [(part.begin, part.end) for part in parts(kernel)]
    assert edges[0][0] == 0 and edges[-1][1] == kernel.stage_bytes
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(edges))


@pytest.mark.parametrize("name", NAMES)
def test_alignments_suffice(name: str) -> None:
    """256 bytes for what is swizzled on address bit 7, 16 for scales that are read four at a time."""
    for tensor, aligned in shared_alignments(name).items():
        assert aligned >= (16 if tensor in ("sScale", "sDelta") else 256)


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("tiles", [1, 2, 6])
def test_the_ring_is_as_drawn(stages: int, tiles: int) -> None:
    """`stages` - 1 tiles ahead, and nothing is requested into a stage before the iteration after its last use."""
    stays = record(stages, tiles)
    assert [stay.tile for stay in stays] == list(reversed(range(tiles)))
    free = dict.fromkeys(range(stages), -1)
    for stay in stays:
        assert stay.requested == max(stay.used - (stages - 1), -1)
        assert stay.requested >= free[stay.stage]
        free[stay.stage] = stay.used + 1


@pytest.mark.parametrize("tiles", [1, 2, 6])
def test_one_stage_is_as_drawn(tiles: int) -> None:
    """Each operand is on its way for one half of a tile's time, and in use for the next; the two take turns, and none
    is asked for before the half in which the one before it in its place was used is over."""
    stays = record_split(tiles)
    assert [(stay.operand, stay.tile) for stay in stays] == [(x, t) for t in reversed(range(tiles)) for x in "KV"]
    assert [stay.requested for stay in stays] == list(range(-1, 2 * tiles - 1))
    free = dict.fromkeys("KV", -1)
    for stay in stays:
        assert stay.used == stay.requested + 1
        assert stay.requested >= free[stay.operand]
        free[stay.operand] = stay.used + 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_registers_by_tensor(name: str, head_dim: int) -> None:
    """What a warp holds, divided by its lanes; and all of it fits into what ptxas used."""
    config = config_of(name, head_dim)
    budget, rows = registers(config), 16 * config.m_tiles
    assert budget.parts["O"] == rows * head_dim // len(LANES)
    assert budget.parts["S"] == rows * TILE_TOKENS // len(LANES)
    p_bytes = mmas_of(config)[1].bits // 8
    assert budget.parts["P"] == rows * TILE_TOKENS * p_bytes // 4 // len(LANES)
    assert budget.softmax < budget.used <= LARGEST
    scales = sum(tensor.endswith("row_scale") for tensor in register_tensors(config))
    assert scales == (2 if config.smooth_q else 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", CONFIG_DIMS)
def test_registers_hold_no_more_ctas_than_eight_warps(name: str, head_dim: int) -> None:
    """What the table of default configs says of kernels of which shared memory would hold more."""
    assert WARPS == 8
    for arch in (arch for arch in ARCH_NAMES if has(name, arch)):
        config = config_of(name, head_dim, arch)
        more = WARPS // config.warps + 1
        if more <= shared(config, arch).by_shared:
            # At the fullest point of the loop; with little of O, there is more that ptxas keeps.
            alive = sum(tensor.registers for key, tensor in register_tensors(config).items() if key != "P")
            used = registers(config).used if head_dim == 64 else alive
            assert used * more * 32 * config.warps > REGISTERS_PER_SM


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arch", ARCH_NAMES)
def test_shared_memory_fits(name: str, arch: str) -> None:
    for head_dim in CONFIG_DIMS if has(name, arch) else ():
        budget = shared(config_of(name, head_dim, arch), arch)
        assert budget.total == budget.queries + budget.stages * budget.stage <= ARCHS[arch].shared_bytes
        assert budget.ctas >= 1
    assert ARCHS["sm_86"].shared_bytes == ARCHS["sm_89"].shared_bytes
    assert all(config_of(name, d, "sm_86") == config_of(name, d, "sm_89") for d in CONFIG_DIMS)


def loop_table(name: str) -> dict[str, dict[str, int]]:
    """Instructions by step and name, as the page has them."""
    page = PAGE.read_text(encoding="utf-8")
    lines = page[page.index(f"\n`{name}`, cycles") :].split("\n\n")[1].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: {key: int(cell or 0) for key, cell in zip(head[1:-1], row[1:-1], strict=True)} for row in rows}


@pytest.mark.parametrize("name", LOOP_NAMES)
def test_the_main_loop_has_the_instructions_that_its_tiles_need(name: str) -> None:
    """MMAs and 2^x by the arithmetic of the tiles, each in its step; at most a tenth belongs to no step."""
    config, table = config_of(name), loop_table(name)
    qk, pv = mmas_of(config)
    (m, k_qk), (_, k_pv) = fragments(qk)["A"].shape, fragments(pv)["A"].shape
    s, o = (table[step] for step in STEPS if "·Kᵀ" in step or "P·V" in step)
    rows = m * config.m_tiles
    row_sums = TILE_TOKENS // k_pv * config.m_tiles
    assert s.get("IMMA", 0) + s.get("HMMA", 0) == rows * TILE_TOKENS * HEAD_DIM // (m * 8 * k_qk)
    assert o.get("IMMA", 0) + o.get("HMMA", 0) == rows * TILE_TOKENS * HEAD_DIM // (m * 8 * k_pv) + row_sums
    assert table["P = 2^x"]["MUFU"] == table["**all**"]["MUFU"] == rows * TILE_TOKENS // len(LANES)
    total = sum(table["**all**"].values())
    assert total == sum(sum(counts.values()) for step, counts in table.items() if step != "**all**")
    assert sum(table[list(STEPS)[-1]].values()) <= total / 10
