"""The quantiser of Q against its simulator in plain torch: equal bit for bit."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

import pytest
import torch

from cute_attn import emulator, jit, quantizer_simulator
from cute_attn.arguments import resolve_arch
from cute_attn.cubin import kernel_resources
from cute_attn.emulator.errors import DataRace
from cute_attn.kernels.quantize_query import BLOCK_TOKENS, SCALE_GROUPS, QueryConfig, QueryRows, block_token
from cute_attn.kernels.rows import QuantizerConfig
from cute_attn.kernels.tile_image import KEY_BITS, TileImage
from cute_attn.tensors import DTYPE_NAMES, alignment
from cute_attn.tile_images import pack_rows, unpack_rows

from .mutants import findings

HEAD_DIMS = [16, 40, 64, 72, 96, 128, 160, 256]
ARCHS = {"int8": "sm_80", "int4": "sm_80", "e4m3": "sm_89"}
"""The oldest target of each format."""


@dataclass
class Results:
    """What the kernel writes, on the CPU."""

    data: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor | None

    def restored(self, keys: str, head_dim: int) -> torch.Tensor:
        """Elements times scale, plus the block's mean: what was kept of q."""
        data = self.data.view(torch.float8_e4m3fn) if keys == "e4m3" else self.data
        x = unpack_rows(data, head_dim, keys).float() * self.scale[..., None]
        if self.mean is not None:
            x = x + self.mean.float().repeat_interleave(BLOCK_TOKENS, 2)[:, :, : x.shape[2]]
        return x


def draw(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    """N(0, 1) with outlier channels that have a mean."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[..., 3::16] = 10 * x[..., 3::16] + 5
    return x.to(dtype)


def run(q: torch.Tensor, k_mean: torch.Tensor | None, device: torch.device, **options) -> Results:
    """The kernel's results; all memory starts as something that no result is."""
    config = QueryConfig(
        QuantizerConfig(q.shape[3], DTYPE_NAMES[q.dtype], alignment(q)), smooth_k=k_mean is not None, **options
    )
    bytes_per_row = TileImage(q.shape[3], keys=config.keys).key_bytes
    data = torch.full((*q.shape[:3], bytes_per_row), 99, dtype=torch.int8, device=device)
    scale, bias = torch.full((2, *q.shape[:3]), -7.0, device=device)
    blocks = -(-q.shape[2] // BLOCK_TOKENS)
    mean = None
    if config.smooth_q:
        mean = torch.full((*q.shape[:2], blocks, q.shape[3]), -7.0, dtype=q.dtype, device=device)
    arch = resolve_arch(None if q.is_cuda else ARCHS[config.keys], q)
    kernel = jit.load(QueryRows, config, arch.name, jit.backend())
    kernel(q, None if k_mean is None else k_mean.to(device), data, scale, bias, mean)
    return Results(*(None if x is None else x.cpu() for x in (data, scale, bias, mean)))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, a NaN being equal to a NaN."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def check(q, k_mean, device, *, keys="int8", scale="token", smooth_q=False) -> Results:
    """The kernel's results equal the simulator's; returns them."""
    results = run(q.to(device), k_mean, device, keys=keys, scale=scale, smooth_q=smooth_q)
    q = q.cpu()
    mean = quantizer_simulator.query_mean(q) if smooth_q else None
    data, q_scale, bias = quantizer_simulator.quantize_query(q, k_mean, mean, keys=keys, scale=scale)
    if smooth_q:
        assert same(results.mean, mean)
    assert same(results.scale, q_scale)
    assert same(results.bias, bias)
    assert same(results.data, pack_rows(data, keys).view(torch.int8))
    return results


def mean_of_keys(heads: int, head_dim: int, batch: int = 1) -> torch.Tensor:
    return draw(batch, heads, 20, head_dim, seed=9).float().mean(2)


@pytest.mark.parametrize("scale", SCALE_GROUPS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims_and_scales(device, head_dim, scale):
    """Each format with and without q's mean, in both dtypes, over the sweep."""
    at = HEAD_DIMS.index(head_dim) + SCALE_GROUPS.index(scale)
    keys, smooth_q = (("int8", True), ("int4", False), ("int8", False), ("int4", True))[at % 4]
    q = draw(1, 2, 150, head_dim, dtype=(torch.float16, torch.bfloat16)[at // 2 % 2])
    check(q, mean_of_keys(1, head_dim), device, keys=keys, scale=scale, smooth_q=smooth_q)


@pytest.mark.parametrize(
    ("head_dim", "scale", "smooth_q"),
    [(16, "thread", False), (40, "warp", True), (64, "token", True), (72, "thread", False), (256, "block", False)],
)
def test_e4m3(device, head_dim, scale, smooth_q):
    """The largest of every token's group becomes 448, and finite elements no NaN."""
    q = draw(1, 2, 150, head_dim, dtype=torch.bfloat16)
    results = check(q, mean_of_keys(1, head_dim), device, keys="e4m3", scale=scale, smooth_q=smooth_q)
    data = results.data.view(torch.float8_e4m3fn).float()
    assert data.isfinite().all()
    peaks = data.abs().amax(-1)
    assert (peaks if scale == "token" else peaks.amax(-1)).eq(448).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("scale", "smooth_q"), list(itertools.product(SCALE_GROUPS, [False, True])))
@pytest.mark.parametrize("keys", KEY_BITS)
@pytest.mark.parametrize("head_dim", range(16, 257, 8))
def test_everything(device, head_dim, keys, scale, smooth_q, dtype):
    k_mean = mean_of_keys(1, head_dim, 2)
    check(draw(2, 2, 150, head_dim, dtype=dtype), k_mean, device, keys=keys, scale=scale, smooth_q=smooth_q)


@pytest.mark.parametrize("tokens", [1, 31, 33, 127, 128, 129, 300])
def test_lengths(device, tokens):
    """Rows past the end neither count in a mean or an amax, nor are written."""
    q = draw(1, 2, tokens, 64, seed=tokens)
    for scale in ("thread", "block"):
        check(q, mean_of_keys(2, 64), device, scale=scale, smooth_q=True)
    storage = draw(1, 2, 400, 64)
    storage[:, :, tokens:] = math.nan
    results = check(storage[:, :, :tokens], mean_of_keys(2, 64), device, scale="block", smooth_q=True)
    assert results.scale.isfinite().all()


def test_tokens_of_a_scale(device):
    """Groups as the attention kernel's MMA holds them: rows g + 8r of 32, 32 rows, 128 rows."""
    q = draw(1, 1, 256, 64)
    tokens = torch.arange(256)
    group = {"thread": tokens // 32 * 8 + tokens % 8, "warp": tokens // 32, "block": tokens // 128, "token": tokens}
    for scale in SCALE_GROUPS:
        result = check(q, None, device, scale=scale).scale[0, 0]
        for number in group[scale].unique():
            mine = q[0, 0][group[scale] == number]
            expected = mine.float().abs().max() * torch.tensor(1 / 127)
            assert (result[group[scale] == number] == expected).all()


def test_threads_own_every_token_once():
    owned = {block_token(i, row) for i in range(8) for row in range(16)}
    assert owned == set(range(BLOCK_TOKENS))
    for row, half in itertools.product(range(16), range(2)):
        tokens = [block_token(4 * half + j, row) for j in range(4)]
        assert [t - tokens[0] for t in tokens] == [0, 8, 16, 24]
        assert tokens[0] % 32 < 8


@pytest.mark.parametrize("keys", KEY_BITS)
def test_what_is_kept(device, keys):
    """Within half a step of q (E4M3: up to 32 scales), which the mean that outlier channels have makes smaller."""
    q = draw(1, 2, 256, 64)
    plain, smooth = (check(q, None, device, keys=keys, smooth_q=smooth_q) for smooth_q in (False, True))
    for results in (plain, smooth):
        distance = (results.restored(keys, 64) - q.float()).abs()
        steps = results.scale[..., None] * (32 if keys == "e4m3" else 1)
        assert (distance <= steps * 0.5001).all()
    assert smooth.scale.mean() < plain.scale.mean()


@pytest.mark.parametrize("padding", [0, 8, 4, 2, 1], ids=lambda p: f"row+{p}")
def test_strides(device, padding):
    """[B, S, H, D] storage, every other token, rows apart by D + padding: loads of 16 to 2 bytes give the same bits."""
    storage = draw(2, 2 * 70, 2, 72 + padding).to(device)
    q = storage[:, ::2, :, :72].transpose(1, 2)
    assert alignment(q) == math.gcd(16, 2 * (72 + padding))
    check(q, mean_of_keys(2, 72, 2), device, scale="thread", smooth_q=True)


def test_what_lies_beyond_the_head_dim_is_not_read(device):
    storage = draw(1, 2, 40, 64).to(device)
    storage[..., 40:] = math.nan
    results = check(storage[..., :40], mean_of_keys(2, 40), device, smooth_q=True)
    assert results.scale.isfinite().all()


def test_grouped_query_heads_use_their_own_mean(device):
    k_mean = mean_of_keys(2, 64, 2)
    q = draw(2, 6, 30, 64)
    bias = check(q, k_mean, device, smooth_q=True).bias
    exact = torch.einsum("bhsd,bhd->bhs", q.double(), k_mean.double().repeat_interleave(3, 1))
    assert torch.allclose(bias.double(), exact, rtol=1e-5, atol=1e-4)


def test_without_smoothing_there_is_no_bias(device):
    assert not check(draw(1, 2, 40, 64), None, device).bias.any()


@pytest.mark.parametrize(("keys", "scale"), [*(("int8", s) for s in SCALE_GROUPS), ("e4m3", "thread")])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_non_finite_elements_show_in_the_scale_of_their_token_alone(device, poison, keys, scale):
    q = draw(1, 2, 140, 64)
    clean = check(q, mean_of_keys(2, 64), device, keys=keys, scale=scale, smooth_q=True)
    q[0, 1, 3, 20] = poison
    results = check(q, mean_of_keys(2, 64), device, keys=keys, scale=scale, smooth_q=True)
    assert (~results.scale.isfinite()).nonzero().tolist() == [[0, 1, 3]]
    assert (~results.bias.isfinite()).nonzero().tolist() == [[0, 1, 3]]
    assert results.mean.isfinite().all()
    assert torch.equal(results.scale[0, 0], clean.scale[0, 0])


def test_zero_rows_and_subnormal_scales(device):
    q = draw(1, 1, 40, 64, dtype=torch.bfloat16)
    q[:, :, 7] = 0
    q[:, :, 9] = 1e-37
    results = check(q, None, device)
    for token in (7, 9):
        assert not results.data[0, 0, token].any()
        assert results.scale[0, 0, token] == 0
    constant = torch.full((1, 1, 200, 64), 1.5, dtype=torch.bfloat16)
    assert not check(constant, None, device, smooth_q=True).data.any()


@pytest.mark.parametrize("seed", range(3))
def test_order_of_warps_and_ctas_does_not_matter(device, seed):
    with emulator.settings(seed=seed):
        for scale in ("warp", "block"):
            check(draw(1, 2, 130, 128), mean_of_keys(2, 128), device, keys="int4", scale=scale, smooth_q=True)


@pytest.mark.parametrize(("scale", "smooth_q", "barriers"), [("token", False, 2), ("block", True, 4)])
def test_every_barrier_is_needed(monkeypatch, scale, smooth_q, barriers):
    """With q's mean and a shared amax, the barrier that shows k_mean to all is the only one that others replace."""
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    q, k_mean = draw(1, 1, 128, 64), mean_of_keys(1, 64)
    found = findings(
        "QueryRows", r"bar\.sync", lambda: run(q, k_mean, torch.device("cpu"), scale=scale, smooth_q=smooth_q)
    )
    assert sum(isinstance(error, DataRace) for error in found.values()) == barriers
    assert len(found) == barriers + smooth_q


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (QueryConfig(QuantizerConfig(84, "float16")), "head dim"),
        (QueryConfig(QuantizerConfig(64, "float32")), "dtype"),
        (QueryConfig(QuantizerConfig(64, "float16", 3)), "alignment"),
        (QueryConfig(QuantizerConfig(64, "float16"), keys="int2"), "keys int2"),
        (QueryConfig(QuantizerConfig(64, "float16"), scale="row"), "scale row"),
    ],
)
def test_refused_configurations(config, reason):
    assert reason in QueryRows.can_implement(config)
    with pytest.raises(ValueError, match=reason):
        QueryRows(config)


def program(head_dim: int, dtype: str = "bfloat16", arch: str = "sm_80", **options) -> jit.Program:
    return jit.build(QueryRows, QueryConfig(QuantizerConfig(head_dim, dtype), **options), arch)


def test_compiled_arithmetic_is_the_simulated():
    """Divisions are correctly rounded, and the only fused multiply-adds are the eight of q·k_mean per token."""
    ptx = program(128, scale="thread", smooth_q=True).ptx
    assert not re.findall(r"\b(?:div|rcp)\.(?!rn\.f32|s32|u32)\S+", ptx)
    assert len(re.findall(r"\bfma\.", ptx)) == 8 * 8


@pytest.mark.parametrize(
    ("arch", "keys"),
    [
        ("sm_80", "int8"),
        ("sm_89", "e4m3"),
        pytest.param("sm_90a", "e4m3", marks=pytest.mark.slow),
        pytest.param("sm_120a", "int8", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [128, 256, pytest.param(64, marks=pytest.mark.slow)])
def test_nothing_spills(head_dim, dtype, arch, keys):
    """Up to 80 registers: 24 warps on an SM, 48 KB of Q in flight at head dim 128."""
    for scale, smooth_q in itertools.product(SCALE_GROUPS, [False, True]):
        built = program(head_dim, dtype, arch, keys=keys, scale=scale, smooth_q=smooth_q)
        for resources in kernel_resources(built.cubin).values():
            assert resources.stack_bytes == 0
            assert resources.registers <= 80


@pytest.mark.parametrize("head_dim", [72, 128])
def test_q_is_read_once_sixteen_bytes_at_a_time(head_dim):
    """Eight loads of Q and one of k_mean; with q's mean as without."""
    for smooth_q in (False, True):
        ptx = program(head_dim, scale="block", smooth_q=smooth_q).ptx
        assert re.findall(r"ld\.global\S*", ptx) == 9 * ["ld.global.v4.b32"]
