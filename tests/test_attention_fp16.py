"""What float16 sums of int8_fp16's P·V must not do; the rest of the warp-MMA kernel is in test_attention_float_sums."""

from __future__ import annotations

import math

import torch

from cute_attn.tile_images import pack_tile_images

from .attention_operands import case, check


def test_float16_does_not_overflow(device):
    """Keys of the largest score that rows still cover, and V at its largest: the output stops growing at 4096."""
    operands, config = case("int8_fp16", "float16", tile={"warps": 1, "m_tiles": 1}, seq_q=1, seq_k=64, head_dim=32)
    tiles = 600
    operands.q.zero_()
    operands.q[..., 0] = 1
    operands.q_scale, operands.softmax_scale = torch.ones(1, 1, 1), math.log(2)
    keys, values = torch.zeros(1, 1, 64 * tiles, 32, dtype=torch.int8), torch.full((1, 1, 64 * tiles, 32), 1.99).half()
    keys[..., 0] = 4
    keys[:, :, -64:, 0] = 0  # visited first: the other tiles are 4 higher, just what the headroom covers
    operands.image = pack_tile_images(keys, torch.ones(1, 1, 64 * tiles), values)
    operands.seq_k, operands.v_scale = 64 * tiles, torch.ones(1, 1, 32)
    out, _ = check(operands, config, device)
    assert (out.float() < 4200 / (64 * tiles * 2**-4)).all()
    assert (out > 1.5).all()
