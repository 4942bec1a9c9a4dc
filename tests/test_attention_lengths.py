"""Keys whose number differs from one batch element to the next, and tensors beyond 2^31 and 2^32 bytes."""

from __future__ import annotations

import math

import pytest
import torch

from cute_attn import jit, reference
from cute_attn.arguments import resolve_arch
from cute_attn.kernels.attention_sm80 import AttentionConfig, AttentionSm80

from .attention_operands import Operands, case, check, run
from .conftest import REL_L2

LENGTHS = [200, 0, 1, 64, 65, 130]
RECIPES = [("int8", "int32"), ("int8_fp16", "float32"), ("int8_fp16", "float16+float32")]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("recipe", "accumulate"), RECIPES)
def test_ragged_keys(device, recipe, accumulate, causal):
    shape = {"batch": len(LENGTHS), "heads": 3, "kv_heads": 1, "seq_q": 70, "seq_k": 200, "key_lengths": LENGTHS}
    out, lse = check(*case(recipe, accumulate, causal=causal, **shape), device)
    assert (out[1] == 0).all()
    assert (lse[1] == -math.inf).all()
    if causal:  # the last query sees the last key of its own sequence
        assert (lse[2, :, :69] == -math.inf).all()
        assert lse[2, :, 69].isfinite().all()
    else:
        assert lse[2].isfinite().all()


def test_lengths_are_clamped(device):
    """Beyond the tensor, and below zero: as the tensor's own length, and none."""
    operands = Operands(batch=3, heads=2, kv_heads=2, seq_q=40, seq_k=100, key_lengths=[101, -1, 2**31 - 1])
    config = AttentionConfig(64, has_lse=True, varlen_k=True)
    ragged = run(operands, config, device)
    operands.key_lengths = [100, 0, 100]
    clamped = run(operands, config, device)
    assert all(torch.equal(a, b) for a, b in zip(ragged, clamped, strict=True))


def test_full_lengths_change_nothing(device):
    operands = Operands(batch=2, heads=2, kv_heads=2, seq_q=130, seq_k=150)
    plain = run(operands, AttentionConfig(64, has_lse=True, causal=True), device)
    operands.key_lengths = [150, 150]
    ragged = run(operands, AttentionConfig(64, has_lse=True, causal=True, varlen_k=True), device)
    assert all(torch.equal(a, b) for a, b in zip(plain, ragged, strict=True))


@pytest.mark.parametrize("recipe", ["int8", "int8_fp16"])
def test_tile_images_of_five_gigabytes(device, recipe):
    """Heads 2 and 3 start beyond 2^31 and 2^32 bytes of an image of which only two tiles a head are ever touched."""
    small, config = case(recipe, heads=4, kv_heads=4, seq_q=20, seq_k=100, key_lengths=[100])
    tiles = 2**31 // (small.image.shape[-1] * 5 // 4)
    expected = check(small, config, device)
    big = torch.empty(1, 4, tiles, small.image.shape[-1], dtype=torch.uint8, device=device)
    assert 3 * big.stride(1) > 2**32
    big[:, :, :2] = small.image.to(device)
    small.image, small.seq_k = big, 64 * tiles
    out = run(small, config, device)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


STRIDES = {
    "heads": lambda far: (64 * 100, far, 64, 1),
    "batch": lambda far: (far, 64 * 100, 64, 1),
    "tokens": lambda far: (64, 64 * 2, far // 64, 1),
}
"""Of [2, 2, 100, 64], or [1, 1, 100, 64] whose 65th token is the one that is ``far`` from the first, in elements."""


@pytest.mark.parametrize("axis", STRIDES)
@pytest.mark.parametrize("which", ["q", "k", "v", "out"])
def test_strides_beyond_32_bits(device, axis, which):
    """Beyond 2^31 elements, which are 2^32 bytes, in memory that is for the most part never touched."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, 100, 64) if axis == "tokens" else (2, 2, 100, 64)
    tensors = {name: torch.randn(shape, generator=generator).half().to(device) for name in "qkv"}
    tensors["out"] = torch.full(shape, 7.0, dtype=torch.float16, device=device)
    kernel = jit.load(
        AttentionSm80,
        AttentionConfig(64, recipe="fp16", accumulate="float32", varlen_k=True, warps=2, m_tiles=1),
        resolve_arch(None, tensors["q"]).name,
        jit.backend(),
    )
    lengths = torch.tensor([100, 70][: shape[0]], dtype=torch.int32, device=device)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        kernel(q, None, None, k, v, None, None, lengths, out, None, 100, 0.125 * math.log2(math.e))
        return out.clone()

    expected = call(**tensors)
    far = torch.empty_strided(shape, STRIDES[axis](2**31 + 512), dtype=torch.float16, device=device)
    tensors[which] = far.copy_(tensors[which])
    out = call(**tensors)
    assert torch.equal(out, expected)
    exact = reference.attention(*(tensors[name].cpu()[:1] for name in "qkv"), causal=False)[0]
    assert reference.errors(out.cpu()[:1], exact).rel_l2 <= 2 * REL_L2["float16"]["float16"]
