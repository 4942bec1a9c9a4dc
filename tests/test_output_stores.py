"""How outputs get to memory: eight neighbouring channels a lane, in every recipe and at every alignment."""

from __future__ import annotations

import re

import pytest
import torch

import cute_attn
from cute_attn import jit, recipes
from cute_attn.kernels.attention_sm80 import AttentionConfig, AttentionSm80
from cute_attn.kernels.attention_sm90 import AttentionSm90, AttentionSm90Config

KERNELS = {"sm_80": (AttentionSm80, AttentionConfig), "sm_90a": (AttentionSm90, AttentionSm90Config)}


@pytest.mark.parametrize(
    ("arch", "name"),
    [("sm_80", "int8"), ("sm_80", "bf16"), ("sm_90a", "int8_fp8"), ("sm_90a", "bf16"), ("sm_90a", "fp16")],
)
@pytest.mark.parametrize(("align", "instruction"), [(16, "st.global.v4.b32"), (8, "st.global.v2.b32")])
def test_stores_are_as_wide_as_the_alignment(arch, name, align, instruction):
    kernel, config = KERNELS[arch]
    chosen = config(64, recipe=name, accumulate=recipes()[name].accumulate, out_align=align)
    program = jit.build(kernel, chosen, arch)
    assert set(re.findall(r"st\.global\S*", program.ptx)) == {instruction}


@pytest.mark.parametrize("arch", KERNELS)
@pytest.mark.parametrize(("recipe", "dtype", "limit"), [("fp16", torch.float16, 1e-3), ("bf16", torch.bfloat16, 6e-3)])
@pytest.mark.parametrize(("head_dim", "gap"), [(24, 1), (40, 8), (72, 4), (128, 2)])
def test_lanes_exchange_channels_of_their_own_rows_alone(device, arch, recipe, dtype, limit, head_dim, gap):
    """As the same problem with a compact output; the elements between the rows, and what follows, are left alone."""
    g = torch.Generator().manual_seed(head_dim)
    q, k, v = (torch.randn(1, 2, s, head_dim, generator=g).to(device, dtype) for s in (77, 150, 150))
    expected = cute_attn.attention(q, k, v, recipe=recipe, arch=arch)
    frame = torch.full((1, 80, 2, head_dim + gap), 7.0, dtype=dtype, device=device)
    out = frame[:, :77, :, :head_dim].transpose(1, 2)
    cute_attn.attention(q, k, v, recipe=recipe, arch=arch, out=out)
    assert torch.equal(out, expected)
    assert frame[..., head_dim:].eq(7).all() and frame[:, 77:].eq(7).all()
    exact, _ = cute_attn.reference.attention(q.cpu(), k.cpu(), v.cpu())
    assert cute_attn.reference.errors(out.cpu(), exact).rel_l2 < limit
