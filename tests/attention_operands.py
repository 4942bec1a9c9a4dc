"""Random quantised operands for the attention kernel by itself, and the comparison with its simulator.

Random bytes and scales reach states that quantised activations rarely do: full-range products, scores of any size,
every mixture of row scales in one warp. The simulator decides as the kernel does, so results agree to the last bits
of the approximate 2^x: in recipe int8 nearly every case is equal bit for bit, and one flipped rounding of P moves a row
by at most 1/255 of one key's share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from cute_attn import jit, reference, simulator
from cute_attn.arguments import resolve_arch
from cute_attn.kernels.attention_sm80 import AttentionConfig, AttentionSm80
from cute_attn.recipe import Recipe, recipes
from cute_attn.tile_images import pack_tile_images

from .conftest import REL_L2, assert_lse_close


@dataclass
class Operands:
    """Random arguments of the kernel, on the CPU: full-range INT8, positive scales, keys already in tile images."""

    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    seq_q: int = 128
    seq_k: int = 128
    head_dim: int = 64
    seed: int = 0
    k_scale: float = 1e-3
    recipe: Recipe = recipes()["int8"]
    q: torch.Tensor = field(init=False)
    q_scale: torch.Tensor = field(init=False)
    q_bias: torch.Tensor = field(init=False)
    image: torch.Tensor = field(init=False)
    v_scale: torch.Tensor = field(init=False)
    softmax_scale: float = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def integers(*shape: int) -> torch.Tensor:
            return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)

        def positive(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=generator) * 0.02 + 0.005

        queries, keys = (self.batch, self.heads, self.seq_q), (self.batch, self.kv_heads, self.seq_k)
        self.q, self.q_scale = integers(*queries, self.head_dim), positive(*queries)
        self.q_bias = torch.randn(queries, generator=generator)
        scale = ((positive(*keys) * self.k_scale * 50).view(torch.int32) + 3 & ~3).view(torch.float32)
        k, v = integers(*keys, self.head_dim), integers(*keys, self.head_dim)
        if self.recipe.pv_format == "float16":  # |v| < 2
            v = (v.float() / 64).half()
        self.image = pack_tile_images(k, scale, v)
        self.v_scale = positive(self.batch, self.kv_heads, self.head_dim)
        self.softmax_scale = self.head_dim**-0.5


def run(operands: Operands, config: AttentionConfig, device: torch.device, out: torch.Tensor | None = None):
    """out and lse of the kernel, on the CPU; both start as 7, so that what is not written shows."""
    o = operands
    shape = (o.batch, o.heads, o.seq_q, o.head_dim)
    if out is None:
        out = torch.full(shape, 7.0, dtype=getattr(torch, config.out_dtype), device=device)
    lse = torch.full(shape[:3], 7.0, device=device) if config.has_lse else None
    q = torch.nn.functional.pad(o.q, (0, AttentionSm80(config).image.key_bytes - o.head_dim))
    inputs = [x.to(device) for x in (q, o.q_scale, o.q_bias, o.image, o.v_scale)]
    kernel = jit.load(AttentionSm80, config, resolve_arch(None, inputs[0]).name, jit.backend())
    kernel(*inputs, out, lse, o.seq_k, o.softmax_scale * math.log2(math.e))
    return out.cpu(), None if lse is None else lse.cpu()


def simulate(operands: Operands, config: AttentionConfig):
    o = operands
    return simulator.attention_on_image(
        (o.q, o.q_scale, o.q_bias),
        o.image,
        o.v_scale,
        o.seq_k,
        recipe=o.recipe,
        causal=config.causal,
        softmax_scale=o.softmax_scale,
        out_dtype=getattr(torch, config.out_dtype),
        warp_rows=16 * config.m_tiles,
        cta_rows=16 * config.m_tiles * config.warps,
    )


def check(
    operands: Operands, config: AttentionConfig, device: torch.device, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel, into ``out`` if given, holds it to the simulator, returns what it gave."""
    out, lse = run(operands, config, device, out)
    expected, expected_lse = simulate(operands, config)
    assert torch.equal(out.isnan(), expected.isnan())
    tolerance = REL_L2[operands.recipe.pv_format][config.out_dtype]
    assert reference.errors(out.nan_to_num(), expected.nan_to_num()).rel_l2 <= tolerance
    assert_lse_close(lse.to(device), expected_lse)
    return out, lse
