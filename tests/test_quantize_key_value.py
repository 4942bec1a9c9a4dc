"""The quantisers of K and V in every format, head dim and length against their simulators: equal bit for bit."""

from __future__ import annotations

import math
import mmap
import resource
from dataclasses import dataclass, replace

import pytest
import torch

from cute_attn import emulator, jit, quantizer_simulator
from cute_attn.arguments import resolve_arch
from cute_attn.cubin import kernel_resources
from cute_attn.emulator.errors import DataRace
from cute_attn.kernels.quantize_key_value import KEY_SCALES, KeyValueTiles, TilesConfig, key_groups
from cute_attn.kernels.quantize_statistics import (
    CHUNK_TOKENS,
    FinishConfig,
    FinishStatistics,
    KeyValueStatistics,
    StatisticsConfig,
    partial_rows,
)
from cute_attn.kernels.rows import QuantizerConfig
from cute_attn.kernels.tile_image import TILE_TOKENS, TileImage
from cute_attn.recipe import Recipe, recipes
from cute_attn.tensors import DTYPE_NAMES, alignment
from cute_attn.tile_images import pack_tile_images, unpack_tile_images

from .mutants import findings


@dataclass(frozen=True)
class Format:
    """What K and V become, and in what tiles. accumulate: for which accumulators, None: the format's first ones."""

    values: str = "int8"
    keys: str = "int8"
    k_scale: str = "token"
    v_scale: str = "channel"
    smooth_v: bool = False
    tokens: int = TILE_TOKENS
    sum_rows: int = 0
    accumulate: str | None = None

    @property
    def arch(self) -> str:
        """The oldest target that has such tiles."""
        if self.tokens == 128:
            return "sm_90a"
        return "sm_89" if "e4m3" in (self.values, self.keys) else "sm_80"

    @property
    def recipe(self) -> Recipe:
        name = {"int8": "int8", "float16": "int8_fp16", "e4m3": "int8_fp8"}[self.values]
        recipe = recipes()[name].replace(v_scale=self.v_scale)
        return recipe.replace(accumulate=self.accumulate) if self.accumulate else recipe

    def image(self, head_dim: int) -> TileImage:
        return TileImage(head_dim, self.values, self.keys, self.tokens, self.sum_rows)

    def kernels(self, head_dim: int, dtype: str, varlen: bool = False, align: int = 16) -> dict[type, object]:
        """The three kernels in the order of their launches, with their configurations."""
        rows = QuantizerConfig(head_dim, dtype, align)
        return {
            KeyValueStatistics: StatisticsConfig(rows, self.smooth_v, varlen),
            FinishStatistics: FinishConfig(
                head_dim, self.v_scale, self.values, self.smooth_v, varlen, self.recipe.largest_value
            ),
            KeyValueTiles: TilesConfig(
                rows, self.values, self.keys, self.k_scale, self.smooth_v, varlen, self.tokens, self.sum_rows
            ),
        }


FORMATS = {
    "int8": Format(),
    "int8 tensor": Format(v_scale="tensor"),
    "int8 smooth": Format(v_scale="tensor", smooth_v=True),
    "int8_fp16": Format(values="float16", k_scale="thread"),
    "int8_fp16 smooth": Format(values="float16", k_scale="warp", smooth_v=True),
    "int4_fp16": Format(values="float16", keys="int4", k_scale="thread"),
    "int4_int8": Format(keys="int4", k_scale="block"),
    "int4_int8 smooth": Format(keys="int4", smooth_v=True),
    "int8_fp8": Format("e4m3", k_scale="thread"),
    "int8_fp8 2.25": Format("e4m3", accumulate="float16+float32"),
    "fp8 smooth": Format("e4m3", "e4m3", "thread", smooth_v=True),
    "fp8 warp": Format("e4m3", "e4m3", "warp"),
    "int8 of 128": Format(k_scale="thread", tokens=128, sum_rows=8),
    "int8_fp16 of 128": Format("float16", tokens=128, sum_rows=8),
    "int8_fp8 of 128": Format("e4m3", k_scale="block", smooth_v=True, tokens=128, sum_rows=8),
    "fp8 of 128": Format("e4m3", "e4m3", "thread", tokens=128, sum_rows=8),
    "fp8 token of 128": Format("e4m3", "e4m3", tokens=128, sum_rows=8),
}


@dataclass
class KeyValue:
    """Results of the kernels. They start as 7, so that what is not written shows."""

    image: torch.Tensor
    k_mean: torch.Tensor
    v_scale: torch.Tensor
    v_mean: torch.Tensor | None
    partial: torch.Tensor

    @staticmethod
    def empty(k: torch.Tensor, form: Format) -> KeyValue:
        batch, heads, tokens, head_dim = k.shape
        chunks, tiles = -(-tokens // CHUNK_TOKENS), -(-tokens // form.tokens)
        nbytes = form.image(head_dim).nbytes

        def sevens(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.full(shape, 7, dtype=dtype, device=k.device)

        k_mean, v_scale, v_mean = (sevens(batch, heads, head_dim) for _ in range(3))
        partial = sevens(batch, heads, chunks, partial_rows(form.smooth_v), head_dim)
        image = sevens(batch, heads, tiles, nbytes, dtype=torch.uint8)
        return KeyValue(image, k_mean, v_scale, v_mean if form.smooth_v else None, partial)


def quantise(
    k: torch.Tensor,
    v: torch.Tensor,
    form: Format,
    key_lengths: torch.Tensor | None = None,
    results: KeyValue | None = None,
) -> KeyValue:
    """What the three kernels make of K and V."""
    r = results or KeyValue.empty(k, form)
    align = min(alignment(k), alignment(v))
    kernels = form.kernels(k.shape[3], DTYPE_NAMES[k.dtype], key_lengths is not None, align)
    arch = resolve_arch(None if k.is_cuda else form.arch, k).name
    statistics, finish, tiles = (jit.load(kernel, config, arch, jit.backend()) for kernel, config in kernels.items())
    statistics(k, v, r.partial, key_lengths)
    finish(r.partial, r.k_mean, r.v_scale, r.v_mean, k.shape[2], key_lengths)
    tiles(k, v, r.k_mean, r.v_scale, r.v_mean, r.image, key_lengths)
    return r


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, a NaN being equal to a NaN; of E4M3, bit for bit."""
    if a.dtype == b.dtype == torch.float8_e4m3fn:
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def unpacked(image: torch.Tensor, form: Format, head_dim: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """k, k_scale and v in an image."""
    return unpack_tile_images(image, head_dim, tokens, form.values, form.keys, form.tokens, form.sum_rows)


def check(
    k: torch.Tensor,
    v: torch.Tensor,
    form: Format,
    key_lengths: torch.Tensor | None = None,
    results: KeyValue | None = None,
) -> KeyValue:
    """All results of the kernels, image bytes included, equal the simulators'; returns them, on the CPU."""
    given = quantise(k, v, form, key_lengths, results)
    image, k_mean, v_scale = (x.cpu() for x in (given.image, given.k_mean, given.v_scale))
    v_mean = None if given.v_mean is None else given.v_mean.cpu()
    k, v = k.cpu(), v.cpu()
    lengths = None if key_lengths is None else key_lengths.cpu()
    recipe = form.recipe
    assert same(k_mean, quantizer_simulator.key_mean(k, lengths))
    if v_mean is not None:
        assert same(v_mean, quantizer_simulator.value_mean(v, lengths))
    assert same(v_scale, quantizer_simulator.value_scale(v, recipe, v_mean, lengths))
    keys, k_scale = quantizer_simulator.quantize_keys(k, k_mean, form.keys, form.k_scale, lengths, form.tokens)
    values = quantizer_simulator.quantize_values(v, v_scale, recipe, v_mean, lengths)
    expected = pack_tile_images(keys, k_scale, values, form.keys, form.tokens, form.sum_rows)
    layout = form.image(k.shape[-1])
    assert torch.equal(image[..., : layout.v_offset], expected[..., : layout.v_offset])
    for begin, end, dtype in (
        (layout.v_offset, layout.scale_offset, values.dtype),
        (layout.scale_offset, layout.nbytes, torch.float32),
    ):
        assert same(*(x[..., begin:end].contiguous().view(dtype) for x in (image, expected)))
    return KeyValue(image, k_mean, v_scale, v_mean, given.partial.cpu())


@pytest.mark.parametrize(
    ("head_dim", "tokens", "form"),
    [
        (16, 65, "int8"),
        (16, 257, "int4_int8 smooth"),
        (40, 63, "int8_fp16 smooth"),
        (40, 1, "int4_fp16"),
        (64, 257, "int8 smooth"),
        (64, 65, "int4_int8"),
        (72, 65, "int4_fp16"),
        (72, 257, "int8 tensor"),
        (96, 63, "int8_fp16"),
        (96, 65, "int4_int8"),
        (128, 65, "int8_fp16"),
        (128, 1, "int8_fp16 smooth"),
        (128, 63, "int4_int8 smooth"),
        (160, 65, "int8_fp16 smooth"),
        (160, 63, "int4_int8"),
        (256, 65, "int8"),
        (256, 63, "int4_fp16"),
        (16, 65, "fp8 warp"),
        (40, 63, "int8_fp8"),
        (72, 65, "fp8 smooth"),
        (128, 1, "int8_fp8 2.25"),
        (256, 65, "fp8 smooth"),
        (16, 130, "int8 of 128"),
        (40, 257, "fp8 of 128"),
        (64, 129, "fp8 token of 128"),
        (72, 127, "int8_fp8 of 128"),
        (128, 129, "fp8 of 128"),
        (136, 129, "int8 of 128"),
        (256, 130, "int8_fp16 of 128"),
        (256, 1, "fp8 of 128"),
    ],
)
def test_formats(normal, head_dim, tokens, form):
    dtype = torch.bfloat16 if tokens % 4 == 1 else torch.float16
    check(*(normal(1, 2, tokens, head_dim, dtype=dtype, seed=s) for s in range(2)), FORMATS[form])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("head_dim", range(16, 257, 8))
def test_all_formats_of_all_head_dims(normal, head_dim, form):
    for tokens, dtype in ((1, torch.float16), (63, torch.bfloat16), (65, torch.float16), (257, torch.bfloat16)):
        k, v = (normal(1, 2, tokens, head_dim, dtype=dtype, seed=s) for s in range(2))
        check(k, v, form)
        check(k, v, form, torch.tensor([tokens // 2], dtype=torch.int32, device=k.device))


@pytest.mark.parametrize("padding", [0, 4, 1], ids=lambda p: f"row+{p}")
def test_strides_of_a_padded_head_dim(normal, padding):
    """Loads of 16, 8 and 2 bytes; the lanes without channels of their own read nothing past a row."""
    storage = [normal(1, 2 * 65, 1, 40 + padding, seed=s) for s in range(2)]
    k, v = (x[:, ::2, :, :40].transpose(1, 2) for x in storage)
    check(k, v, FORMATS["int8_fp16"])


# ---- granularity of K's scales


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("granularity", KEY_SCALES)
def test_groups_cover_a_tile(granularity, tile):
    layout = key_groups(granularity, tile)
    members, groups = layout.extents()
    tokens = [layout(m, g) for g in range(groups) for m in range(members)]
    assert sorted(tokens) == list(range(tile))


@pytest.mark.parametrize("tile", [64, 128])
def test_a_thread_of_the_mma_holds_the_tokens_of_one_group(tile):
    layout, columns = key_groups("thread", tile), TileImage(64, tokens=tile).score_tokens
    for t in range(4):
        held = {columns(2 * t + e, n) for e in range(2) for n in range(tile // 8)}
        assert held == {layout(m, t) for m in range(tile // 4)}


@pytest.mark.parametrize("form", ["int8", "fp8 of 128"])
def test_tokens_of_a_group_share_their_scale(normal, form):
    k, v = normal(1, 1, 180, 64), normal(1, 1, 180, 64, seed=1)
    k[0, 0, 5] *= 50
    tile = FORMATS[form].tokens
    scales = {}
    for granularity in KEY_SCALES:
        grouped = replace(FORMATS[form], k_scale=granularity)
        scales[granularity] = unpacked(check(k, v, grouped).image, grouped, 64, 180)[1][0, 0]
    assert torch.equal(scales["warp"], scales["block"])
    for granularity in KEY_SCALES:
        layout = key_groups(granularity, tile)
        members, groups = layout.extents()
        for begin, group in ((begin, g) for begin in range(0, 180, tile) for g in range(groups)):
            tokens = [t for t in (begin + layout(m, group) for m in range(members)) if t < 180]
            for token in tokens:
                assert scales[granularity][token] == scales["token"][tokens].max()


@pytest.mark.parametrize("form", ["int8", "fp8 of 128"])
def test_a_token_out_of_range_spoils_no_other_scale(device, form):
    """Its distance from a finite mean overflows: only its own scale may say so."""
    k = torch.full((1, 1, 70, 64), -6.5e36, dtype=torch.bfloat16, device=device)
    k[0, 0, 3] = torch.finfo(torch.bfloat16).max
    v = torch.ones_like(k)
    for granularity in KEY_SCALES:
        grouped = replace(FORMATS[form], k_scale=granularity)
        scale = unpacked(check(k, v, grouped).image, grouped, 64, 70)[1]
        assert (~scale.isfinite()).nonzero().tolist() == [[0, 0, 3]]


# ---- V's mean


@pytest.mark.parametrize("values", ["int8", "float16", "e4m3"])
def test_smoothed_values_are_smaller_and_come_back(normal, values):
    k, v = normal(1, 2, 130, 40), normal(1, 2, 130, 40, seed=1)
    v[..., 7] += 100
    plain, smooth = (check(k, v, Format(values, smooth_v=s)) for s in (False, True))
    assert smooth.v_scale[..., 7].max() < plain.v_scale[..., 7].min() / 8
    stored = unpack_tile_images(smooth.image, 40, 130, values)[2]
    restored = stored.float() * smooth.v_scale[:, :, None] + smooth.v_mean[:, :, None]
    step = smooth.v_scale * {"int8": 1, "float16": 2.0**-10, "e4m3": 32}[values]
    assert ((restored - v.cpu().float()).abs() <= 0.51 * step[:, :, None] + 1e-4).all()


@pytest.mark.parametrize("values", ["int8", "float16", "e4m3"])
def test_equal_values_leave_nothing_after_smoothing(normal, values):
    k = normal(1, 1, 70, 64)
    result = check(k, torch.full_like(k, 3.0), Format(values, smooth_v=True))
    assert (result.v_mean == 3).all()
    assert not result.v_scale.any()
    assert not unpack_tile_images(result.image, 64, 70, values)[2].float().any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", ["int8 smooth", "int8_fp16 smooth", "fp8 smooth"])
def test_non_finite_values_show_in_scale_and_mean(normal, form, poison):
    k, v = normal(1, 2, 70, 64), normal(1, 2, 70, 64, seed=1)
    v[0, 1, 66, 9] = poison
    result = check(k, v, FORMATS[form])
    spoilt = torch.zeros(1, 2, 64, dtype=torch.bool)
    spoilt[0, 1, 9] = True
    assert torch.equal(~result.v_mean.isfinite(), spoilt)
    if FORMATS[form].v_scale == "tensor":
        spoilt[0, 1] = True
    assert torch.equal(~result.v_scale.isfinite(), spoilt)


# ---- lengths of the batch elements


@pytest.mark.parametrize(
    ("head_dim", "form"),
    [
        (64, "int8"),
        (72, "int8 smooth"),
        (64, "int8_fp16 smooth"),
        (40, "int4_fp16"),
        (64, "fp8 smooth"),
        (64, "int8_fp8 of 128"),
        (40, "fp8 of 128"),
    ],
)
def test_lengths(normal, head_dim, form):
    """What lies past a sequence's end does not matter; lengths beyond 0…Sk are clamped; no keys give zeros."""
    lengths = torch.tensor([0, 1, 64, 65, 270, 999, -5], dtype=torch.int32)
    k, v = (normal(7, 1, 270, head_dim, seed=s) for s in range(2))
    for b, length in enumerate(lengths.tolist()):
        k[b, :, max(length, 0) :] = math.nan
        v[b, :, max(length, 0) :] = math.inf
    result = check(k, v, FORMATS[form], lengths.to(k.device))
    plain = unpacked(result.image, FORMATS[form], head_dim, 270)
    for empty in (0, 6):
        for x in (*plain, result.k_mean, result.v_scale, result.v_mean):
            assert x is None or not x[empty].float().any()
    assert result.v_scale.isfinite().all()


def test_full_lengths_change_nothing(normal):
    k, v = (normal(2, 2, 130, 64, seed=s) for s in range(2))
    form = FORMATS["int8_fp16 smooth"]
    plain = check(k, v, form)
    given = check(k, v, form, torch.full((2,), 130, dtype=torch.int32, device=k.device))
    for name in ("image", "k_mean", "v_scale", "v_mean"):
        assert torch.equal(getattr(plain, name), getattr(given, name))


@pytest.mark.parametrize(("length", "read"), [(None, 256), (256, 256), (128, 128), (64, 64), (0, 0)])
def test_bytes_moved(monkeypatch, length, read):
    """The statistics read K and V once, the tiles once more; what lies past the end costs its zeros alone."""
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    k, v = (torch.randn(1, 1, 256, 128, generator=torch.Generator().manual_seed(s)).half() for s in range(2))
    emulator.clear_launches()
    quantise(k, v, Format(), None if length is None else torch.tensor([length], dtype=torch.int32))
    statistics, _, tiles = (
        [r.instructions.get(f"{o}.global.v4.b32", 0) for o in ("ld", "st")] for r in emulator.launches()
    )
    warp, inputs, image = 32 * 16, 2 * 2 * 128 * read, 4 * TileImage(128).nbytes
    assert [warp * n for n in statistics] == [inputs, 0]
    # Mean and scales: 2 x 16 bytes of each a thread, in the tiles that hold tokens.
    assert [warp * n for n in tiles] == [inputs + read // TILE_TOKENS * 128 * 2 * 2 * 16, image]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("head_dim", "form"), [(72, "int4_fp16"), (160, "int4_fp16"), (72, "fp8 of 128")])
def test_order_of_warps_and_ctas_does_not_matter(normal, head_dim, form, seed):
    k, v = (normal(2, 1, 140, head_dim, seed=s) for s in range(2))
    with emulator.settings(seed=seed):
        check(k, v, FORMATS[form], torch.tensor([140, 3], dtype=torch.int32, device=k.device))


def test_every_barrier_of_a_tile_with_padding_and_ones_is_needed(monkeypatch):
    """Between zeros and ones, around the scales, and before the image is written."""
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    k, v = (torch.randn(1, 1, 128, 40, generator=torch.Generator().manual_seed(s)).half() for s in range(2))
    found = findings("KeyValueTiles", r"bar\.sync", lambda: quantise(k, v, FORMATS["fp8 token of 128"]))
    assert [type(error) for error in found.values()] == 4 * [DataRace]


# ---- offsets beyond 32 bits


_MAP_NORESERVE = 0x4000  # Linux, asm-generic/mman.h; Python 3.11 has no name for it


def virtual(dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """A tensor whose memory is reserved, not there: only the pages that are touched cost anything."""
    elements = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, stride)


@pytest.mark.parametrize("varlen", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((2, 1, 65, 64), (2**32 + 8, 8, 72, 1)),
        ((1, 3, 65, 64), (8, 2**31 + 8, 72, 1)),
        ((1, 1, 65, 64), (8, 8, 2**26 + 8, 1)),
    ],
    ids=["batch", "head", "token"],
)
def test_offsets_beyond_32_bits(monkeypatch, shape, stride, varlen):
    """Strides of K and V, of the image and of the partial results; memory that nothing uses is not touched."""
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    form = FORMATS["int8 smooth"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    k, v = (virtual(torch.float16, shape, stride) for _ in range(2))
    for seed, x in enumerate((k, v)):
        x.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    results = KeyValue.empty(k, form)
    nbytes = results.image.shape[-1]
    results.image = virtual(torch.uint8, (*shape[:2], 2, nbytes), (2**32 + 2**16, 2**32, 2**32 + 2**18, 1))
    rows = results.partial.shape[3]
    results.partial = virtual(torch.float32, (*shape[:2], 1, rows, 64), (2**31 + 8, 2**31 + 8, 8, 64, 1))
    lengths = torch.tensor([65, 3][: shape[0]], dtype=torch.int32) if varlen else None
    check(k, v, form, lengths, results)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert used < 2**20  # KiB


# ---- E4M3


@pytest.mark.parametrize("form", ["fp8 warp", "int8_fp8", "int8_fp8 2.25", "fp8 token of 128"])
def test_the_largest_becomes_the_largest_number(normal, form):
    """448 or 2.25 in every group and channel, whatever amax/scale is rounded to; finite values give no NaN."""
    form = FORMATS[form]
    k, v = (normal(2, 2, 180, 64, dtype=torch.bfloat16, seed=s) for s in range(2))
    sizes = torch.rand(2, 2, 180, 64, generator=torch.Generator().manual_seed(2)).to(k.device)
    result = check((k * (1 + sizes)).to(k.dtype), (v * (1 + sizes)).to(v.dtype), form)
    keys, _, values = (x.float() for x in unpacked(result.image, form, 64, 180))
    assert (values.abs().amax(2) == form.recipe.largest_value).all()
    if form.keys == "e4m3":
        layout = key_groups(form.k_scale, form.tokens)
        for begin in range(0, 180 - form.tokens, form.tokens):
            members, groups = layout.extents()
            tokens = torch.tensor([[begin + layout(m, g) for m in range(members)] for g in range(groups)])
            assert (keys[:, :, tokens].abs().amax((-1, -2)) == 448).all()


@pytest.mark.parametrize("size", [3e38, 1e-30, 2.0**-110, 1e-36])
def test_values_of_any_size_in_e4m3(device, size):
    """Rounded to four significant bits, or to a step of 2^-9 scales; scales below 2^-126 count as zero."""
    form = FORMATS["fp8 warp"]
    k = torch.zeros(1, 1, 70, 64, dtype=torch.bfloat16)
    v = torch.rand(1, 1, 70, 64, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).double() * size
    v = v.to(torch.bfloat16)
    result = check(*(x.to(device) for x in (k, v)), form)
    restored = unpacked(result.image, form, 64, 70)[2].double() * result.v_scale[:, :, None].double()
    steps = torch.maximum(v.double().abs() * 2.0**-4, result.v_scale[:, :, None].double() * 2.0**-10)
    lost = 448 * 2.0**-126 if size < 1e-35 else 0.0
    assert ((restored - v.double()).abs() <= steps * (1 + 2.0**-20) + lost).all()


# ---- what is compiled


_COMPILED = [
    (128, "int8"),
    (128, "int8_fp16 smooth"),
    (72, "int8_fp16"),
    (136, "int4_fp16"),
    (256, "int4_int8 smooth"),
    (128, "fp8 smooth"),
    (64, "int8_fp16 of 128"),
    (128, "int8_fp8 of 128"),
    (256, "fp8 of 128"),
]
_MORE = [(d, form) for d in range(16, 257, 8) for form in FORMATS if (d, form) not in _COMPILED]


@pytest.mark.parametrize(
    ("head_dim", "form"), [*_COMPILED, *(pytest.param(*case, marks=pytest.mark.slow) for case in _MORE)]
)
def test_nothing_spills(head_dim, form):
    """102 registers let five CTAs of 128 threads reside on a multiprocessor, or two of 256."""
    for kernel, config in FORMATS[form].kernels(head_dim, "bfloat16", varlen=True).items():
        for resources in kernel_resources(jit.build(kernel, config, FORMATS[form].arch).cubin).values():
            assert resources.stack_bytes == 0
            assert resources.registers <= 102


def test_refusals():
    rows = QuantizerConfig(64, "float16")
    assert "k_scale tensor is not one of token, thread, warp, block" in KeyValueTiles.can_implement(
        TilesConfig(rows, k_scale="tensor")
    )
    assert "keys int2" in KeyValueTiles.can_implement(TilesConfig(rows, keys="int2"))
    assert "tokens 96 is not one of 64, 128" in KeyValueTiles.can_implement(TilesConfig(rows, tokens=96))
    assert "sum_rows 1 is not one of 0, 8" in KeyValueTiles.can_implement(TilesConfig(rows, sum_rows=1))
    for head_dim in (8, 84, 264):
        for kernel, config in Format().kernels(head_dim, "float16").items():
            assert f"head dim {head_dim} is not a multiple of 8" in kernel.can_implement(config)
