"""Random quantised operands for the attention kernel by itself, the comparison with its simulator, shared checks.

Random bytes and scales reach states that quantised activations rarely do: full-range products, scores of any size,
every mixture of row scales in one warp. The simulator decides as the kernel does, so results agree to the last bits
of the approximate 2^x: in recipe int8 nearly every case is equal bit for bit, and one flipped rounding of P moves a row
by at most 1/255 of one key's share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from cute_attn import emulator, jit, simulator
from cute_attn.arguments import resolve_arch
from cute_attn.kernels.attention_sm80 import AttentionConfig, AttentionSm80
from cute_attn.kernels.tile_image import TILE_TOKENS
from cute_attn.recipe import Recipe, recipes
from cute_attn.tile_images import FORMAT_DTYPES, pack_rows, pack_tile_images

from .conftest import assert_lse_close, assert_out_close


@dataclass
class Operands:
    """Random arguments of the kernel, on the CPU: full-range elements, positive scales, keys already in tile images.

    delta, NaN beyond the keys, and v_mean are random too, where the recipe smooths Q or V.
    tile_tokens, sum_rows: `TileImage`'s ``tokens`` and ``sum_rows``
    share_k_scale: the tokens {16i + 4t … + 3} of a tile of K have one scale, for each t: those of one thread of the MMA
    """

    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    seq_q: int = 128
    seq_k: int = 128
    head_dim: int = 64
    seed: int = 0
    k_scale: float = 1e-3
    recipe: Recipe = recipes()["int8"]
    key_lengths: list[int] | None = None
    tile_tokens: int = TILE_TOKENS
    sum_rows: int = 0
    share_k_scale: bool = False
    q: torch.Tensor = field(init=False)
    q_scale: torch.Tensor = field(init=False)
    q_bias: torch.Tensor = field(init=False)
    image: torch.Tensor = field(init=False)
    v_scale: torch.Tensor = field(init=False)
    delta: torch.Tensor | None = field(init=False, default=None)
    v_mean: torch.Tensor | None = field(init=False, default=None)
    softmax_scale: float = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def integers(*shape: int, levels: int = 127) -> torch.Tensor:
            return torch.randint(-levels, levels + 1, shape, generator=generator, dtype=torch.int8)

        def e4m3(*shape: int, largest: float = 448.0) -> torch.Tensor:  # every exponent as often as every other
            exponent = torch.randint(-16, 1, shape, generator=generator)
            return (torch.rand(shape, generator=generator) * 2 - 1).mul(largest).ldexp(exponent).to(torch.float8_e4m3fn)

        def positive(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=generator) * 0.02 + 0.005

        queries, keys = (self.batch, self.heads, self.seq_q), (self.batch, self.kv_heads, self.seq_k)
        levels = {"int8": 127, "int4": 7, "e4m3": 127}[self.recipe.qk_format]  # the root mean squares are as these
        integer_qk = self.recipe.qk_format != "e4m3"

        def elements(*shape: int) -> torch.Tensor:
            return integers(*shape, levels=levels) if integer_qk else e4m3(*shape)

        self.q, self.q_scale = elements(*queries, self.head_dim), positive(*queries) * (127 / levels)
        self.q_bias = torch.randn(queries, generator=generator)
        scale = ((positive(*keys) * self.k_scale * 50 * (127 / levels)).view(torch.int32) + 3 & ~3).view(torch.float32)
        if self.share_k_scale:
            token = torch.arange(self.seq_k)
            scale = scale[..., token // self.tile_tokens * self.tile_tokens + token % 16 // 4 * 4]
        k, v = elements(*keys, self.head_dim), integers(*keys, self.head_dim)
        if self.recipe.pv_format == "float16":  # |v| < 2
            v = (v.float() / 64).half()
        if self.recipe.pv_format == "e4m3":
            v = e4m3(*v.shape, largest=self.recipe.largest_value)
        self.image = pack_tile_images(k, scale, v, self.recipe.qk_format, self.tile_tokens, self.sum_rows)
        self.v_scale = positive(self.batch, self.kv_heads, self.head_dim)
        self.softmax_scale = self.head_dim**-0.5
        if self.recipe.smooth_q:
            rows = (self.batch, self.heads, -(-self.seq_q // 128), self.tile_tokens * self.image.shape[2])
            self.delta = torch.randn(rows, generator=generator) * (self.k_scale * 8000)
            self.delta[..., self.seq_k :] = math.nan
        if self.recipe.smooth_v:
            self.v_mean = torch.randn(self.v_scale.shape, generator=generator)

    def data(self) -> torch.Tensor:
        """q as the kernel reads it: int8 [B, Hq, Sq, bytes], two of INT4 in one, zeros past the head dim."""
        return pack_rows(self.q, self.recipe.qk_format).view(torch.int8)


def case(
    recipe: str,
    accumulate: str | None = None,
    smooth: str = "",
    tile: dict[str, Any] | None = None,
    causal: bool = False,
    **shape,
) -> tuple[Operands, AttentionConfig]:
    """Operands and warp-MMA config of a preset, in which ``smooth``, any of the letters q and v, is smoothed.

    accumulate: None is the preset's own; tile: other fields of the config; shape: fields of the operands
    """
    fields = {"smooth_q": "q" in smooth, "smooth_v": "v" in smooth}
    fields["accumulate"] = accumulate or recipes()[recipe].accumulate
    operands = Operands(recipe=recipes()[recipe].replace(**fields), **shape)
    varlen_k = operands.key_lengths is not None
    config = AttentionConfig(
        operands.head_dim, has_lse=True, causal=causal, varlen_k=varlen_k, recipe=recipe, **fields, **(tile or {})
    )
    return operands, config


def two_scores(
    recipe: str, accumulate: str | None, first: int, second: int, value: float = 1.0
) -> tuple[Operands, AttentionConfig]:
    """One query; 64 keys of score ``second`` in base 2 and V = -value, visited before 64 of ``first`` and V = value.

    The score of a key is its first dim.
    """
    o, config = case(recipe, accumulate, seq_q=1, seq_k=128, head_dim=32)
    keys = torch.zeros(1, 1, 128, 32)
    keys[:, :, :64, 0], keys[:, :, 64:, 0] = first, second
    values = torch.full_like(keys, value)
    values[:, :, 64:] *= -1
    o.q = torch.zeros(1, 1, 1, 32).to(o.q.dtype)
    o.q[..., 0], o.q_scale, o.q_bias = 1, torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    o.image = pack_tile_images(
        keys.to(o.q.dtype), torch.ones(1, 1, 128), values.to(FORMAT_DTYPES[o.recipe.pv_format]), o.recipe.qk_format
    )
    o.v_scale, o.softmax_scale = torch.ones(1, 1, 32), math.log(2)
    return o, config


def target(recipe: Recipe, tensor: torch.Tensor) -> str:
    """What to compile for: the tensor's GPU, or on the emulator its usual one, or the first with E4M3 in its MMAs."""
    return resolve_arch(None if tensor.is_cuda or recipe.pv_format != "e4m3" else "sm_89", tensor).name


def run(
    operands: Operands,
    config: Any,
    device: torch.device,
    out: torch.Tensor | None = None,
    kernel_class: type = AttentionSm80,
    arch: str | None = None,
    others: tuple = (),
):
    """out and lse of the kernel, on the CPU; both start as 7, so that what is not written shows.

    others: arguments that the kernel class takes besides those of AttentionSm80
    """
    o = operands
    shape = (o.batch, o.heads, o.seq_q, o.head_dim)
    if out is None:
        out = torch.full(shape, 7.0, dtype=getattr(torch, config.out_dtype), device=device)
    key_lengths = None if o.key_lengths is None else torch.tensor(o.key_lengths, dtype=torch.int32, device=device)
    lse = torch.full(shape[:3], 7.0, device=device) if config.has_lse else None
    arguments = (o.data(), o.q_scale, o.q_bias, o.image, o.v_scale, o.delta, o.v_mean)
    inputs = [x if x is None else x.to(device) for x in arguments]
    kernel = jit.load(kernel_class, config, arch or target(o.recipe, inputs[0]), jit.backend())
    kernel(*inputs, key_lengths, out, lse, o.seq_k, o.softmax_scale * math.log2(math.e), *others)
    return out.cpu(), None if lse is None else lse.cpu()


def simulate(operands: Operands, config: AttentionConfig):
    """out and lse of the simulator, for a kernel of the warp-MMA family."""
    rows = {"warp_rows": 16 * config.m_tiles, "cta_rows": 16 * config.m_tiles * config.warps}
    return simulate_rows(operands, config.causal, getattr(torch, config.out_dtype), **rows)


def simulate_rows(operands: Operands, causal: bool, out_dtype: torch.dtype, warp_rows: int, cta_rows: int):
    """out and lse of the simulator; ``warp_rows``, ``cta_rows``: query rows of a warp and of a CTA."""
    o = operands
    return simulator.attention_on_image(
        (o.q, o.q_scale, o.q_bias),
        o.image,
        o.v_scale,
        o.seq_k,
        delta=o.delta,
        v_mean=o.v_mean,
        key_lengths=o.key_lengths,
        recipe=o.recipe,
        tile_tokens=o.tile_tokens,
        sum_rows=o.sum_rows,
        causal=causal,
        softmax_scale=o.softmax_scale,
        out_dtype=out_dtype,
        warp_rows=warp_rows,
        cta_rows=cta_rows,
    )


def check(
    operands: Operands, config: AttentionConfig, device: torch.device, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel, into ``out`` if given, holds it to the simulator, returns what it gave."""
    out, lse = run(operands, config, device, out)
    expected, expected_lse = simulate(operands, config)
    assert_out_close(out, expected, operands.recipe)
    assert_lse_close(lse.to(device), expected_lse, operands.recipe)
    return out, lse


def assert_rows_without_keys(out: torch.Tensor, lse: torch.Tensor, rows: int) -> None:
    """That the first ``rows`` see no key, and all others do."""
    assert (out[:, :, :rows] == 0).all()
    assert (lse[:, :, :rows] == -math.inf).all()
    assert lse[:, :, rows:].isfinite().all()


def assert_only_nan_row(out: torch.Tensor, lse: torch.Tensor, row: int) -> None:
    """That ``row`` of one head is NaN from end to end, and nothing else is."""
    bad = torch.arange(out.shape[2]) == row
    for nan in (out.isnan().any(-1), out.isnan().all(-1), lse.isnan()):
        assert torch.equal(nan[0, 0], bad)


def assert_same_in_any_order(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[torch.device], Any], seeds: Iterable[int]
) -> None:
    """That out and lse are the same bits when the emulator runs warps in orders drawn from ``seeds``."""
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")
    plain = call(torch.device("cpu"))
    for seed in seeds:
        with emulator.settings(seed=seed):
            shuffled = call(torch.device("cpu"))
        assert torch.equal(plain[0], shuffled[0])
        assert torch.equal(plain[1], shuffled[1])
