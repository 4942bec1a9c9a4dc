"""Peers that are not there: modules with their names and signatures, which compute attention in float64.

Signatures, orders of arguments, and the shapes that are checked, are those of SageAttention 2.2's core.py and
attn_cuda_sm90.h, of SpargeAttn's core.py, and of the Python bindings of cuDNN's front end (pygraph.sdpa_fp8). What they
cannot show is that the kernels compute what they say: that takes a GPU.
"""

from __future__ import annotations

import types
from typing import Any

import torch

from cute_attn import reference


def dequantised(x: torch.Tensor, scale: torch.Tensor, rows: int) -> torch.Tensor:
    """[B, H, S, D] integers times scales [B, H, groups], each of ``rows`` tokens."""
    return x.double() * scale.double().repeat_interleave(rows, 2)[:, :, : x.shape[2], None]


def quantised(x: torch.Tensor, rows: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 and scales [B, H, ceil(S/rows)·parts], one per rows/parts neighbouring tokens, unlike the real ones."""
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, -x.shape[2] % rows))
    groups = padded.unflatten(2, (-1, rows // parts))
    scale = groups.abs().amax((-1, -2)).clamp(min=1e-9) / 127
    elements = (groups / scale[..., None, None]).round().flatten(2, 3)[:, :, : x.shape[2]]
    return elements.to(torch.int8), scale


def sageattention() -> dict[str, types.ModuleType]:
    """``sageattention`` and ``sageattention.core``, built for compute capability 9.0."""
    core = types.ModuleType("sageattention.core")

    def per_thread_int8_triton(
        q, k, km=None, BLKQ=128, WARPQ=32, BLKK=64, WARPK=64, sm_scale=None, tensor_layout="HND"
    ):
        assert tensor_layout == "HND" and (BLKQ, WARPQ, BLKK, WARPK) == (64, 16, 128, 128)
        q8, q_scale = quantised(q, BLKQ, BLKQ // WARPQ * 8)
        k8, k_scale = quantised(k - km, BLKK, 4)
        return q8, q_scale, k8, k_scale

    def per_channel_fp8(v, tensor_layout="HND", scale_max=448.0, smooth_v=True):
        assert tensor_layout == "HND" and scale_max == 448.0 and not smooth_v and v.shape[2] % 128 == 0
        scale = v.float().abs().amax(2) / scale_max
        return (v.float() / scale[:, :, None]).to(torch.float8_e4m3fn).transpose(2, 3).contiguous(), scale, None

    def operator(
        query,
        key,
        value,
        output,
        query_scale,
        key_scale,
        value_scale,
        tensor_layout,
        is_causal,
        qk_quant_gran,
        sm_scale,
        return_lse,
    ):
        assert (tensor_layout, qk_quant_gran, return_lse) == (1, 3, 0)
        assert query.dtype == key.dtype == torch.int8 and value.dtype == torch.float8_e4m3fn
        batch, heads, seq_q, head_dim = query.shape
        kv_heads, seq_k = key.shape[1:3]
        assert query_scale.shape == (batch, heads, -(-seq_q // 64) * 4 * 8)
        assert key_scale.shape == (batch, kv_heads, -(-seq_k // 128) * 4)
        assert value.shape == (batch, kv_heads, head_dim, -(-seq_k // 128) * 128)
        v = (value.double() * value_scale[..., None]).transpose(2, 3)[:, :, :seq_k]
        q, k = dequantised(query, query_scale, 2), dequantised(key, key_scale, 32)
        output.copy_(reference.attention(q, k, v, causal=bool(is_causal), softmax_scale=sm_scale)[0])
        return torch.empty(0)

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False):
        assert tensor_layout == "HND"
        return reference.attention(q, k, v, causal=is_causal)[0].to(q.dtype)

    core.SM90_ENABLED = True
    core.sm90_compile = types.SimpleNamespace(qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf=operator)
    core.per_thread_int8_triton, core.per_channel_fp8, core.sageattn = per_thread_int8_triton, per_channel_fp8, sageattn
    package = types.ModuleType("sageattention")
    package.core = core
    return {"sageattention": package, "sageattention.core": core}


def spas_sage_attn() -> dict[str, types.ModuleType]:
    package = types.ModuleType("spas_sage_attn")

    def spas_sage2_attn_meansim_topk_cuda(
        q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, topk=0.5, tensor_layout="HND"
    ):
        assert q.shape[-2] >= 128 and tensor_layout == "HND" and topk == 1.0
        return reference.attention(q, k, v, causal=is_causal)[0].to(q.dtype)

    package.spas_sage2_attn_meansim_topk_cuda = spas_sage2_attn_meansim_topk_cuda
    return {"spas_sage_attn": package}


class _Node:
    """A tensor of cuDNN's graph."""

    def __init__(self, **facts: Any) -> None:
        self.facts = facts

    def __getattr__(self, name: str) -> Any:
        assert name in ("set_output", "set_dim", "set_stride", "set_data_type"), name

        def setter(value: Any) -> _Node:
            self.facts[name.removeprefix("set_")] = value
            return self

        return setter


class _Graph:
    """``cudnn.pygraph``: one sdpa_fp8, with an FP8 output as Hopper has it."""

    def __init__(self, io_data_type, intermediate_data_type, compute_data_type, handle) -> None:
        self.steps: list[str] = []

    def tensor(self, dim, stride, data_type) -> _Node:
        return _Node(dim=dim, stride=stride, data_type=data_type)

    def sdpa_fp8(
        self,
        q,
        k,
        v,
        descale_q,
        descale_k,
        descale_v,
        descale_s,
        scale_s,
        scale_o,
        attn_scale,
        generate_stats,
        name,
        diagonal_alignment="TOP_LEFT",
        right_bound=None,
    ):
        assert not generate_stats and diagonal_alignment == "TOP_LEFT" and right_bound in (None, 0)
        self.inputs = (q, k, v, descale_q, descale_k, descale_v, descale_s, scale_s, scale_o)
        self.scale, self.causal = attn_scale, right_bound == 0
        self.outputs = (_Node(), _Node(), _Node())
        return self.outputs[0], None, self.outputs[1], self.outputs[2]

    def __getattr__(self, name: str) -> Any:
        steps = ("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans")
        assert name == steps[len(self.steps)], name
        return lambda *_: self.steps.append(name)

    def get_workspace_size(self) -> int:
        return 16

    def execute(self, tensors, workspace, handle) -> None:
        assert len(self.steps) == 5 and set(tensors) == {*self.inputs, *self.outputs}
        assert all(node.facts["output"] for node in self.outputs)
        q, k, v, *scales = (tensors[node].double() for node in self.inputs)
        q_scale, k_scale, v_scale, descale_s, scale_s, scale_o = scales
        out = reference.attention(q * q_scale, k * k_scale, v * v_scale, causal=self.causal, softmax_scale=self.scale)
        exact = out[0] * descale_s * scale_s * scale_o
        assert exact.abs().max() <= 448
        tensors[self.outputs[0]].copy_(exact.to(torch.float8_e4m3fn))


def cudnn() -> dict[str, types.ModuleType]:
    package = types.ModuleType("cudnn")
    package.data_type = types.SimpleNamespace(FP8_E4M3="e4m3", FLOAT="float")
    package.diagonal_alignment = types.SimpleNamespace(TOP_LEFT="TOP_LEFT")
    package.heur_mode = types.SimpleNamespace(A="A", FALLBACK="FALLBACK")
    package.create_handle = lambda: 7
    package.set_stream = lambda handle, stream: None
    package.pygraph = _Graph
    return {"cudnn": package}
