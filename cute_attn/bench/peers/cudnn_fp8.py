"""cuDNN's FP8 attention, through its Python front end: one scale per tensor, an FP8 output on Hopper."""

from __future__ import annotations

from typing import Any

import torch

from cute_attn.bench.contender import Prepared, installed, top_left_refusal
from cute_attn.bench.peers.peer import Fp8Peer, to_e4m3
from cute_attn.dispatch import Support
from cute_attn.problem import Problem

__all__ = ["CudnnFp8"]

_SCALE_P = 256.0  # P ≤ 1, as a power of two below 448


class CudnnFp8(Fp8Peer):
    """``cudnn.pygraph.sdpa_fp8`` of nvidia-cudnn-frontend.

    Hopper's kernel writes E4M3 (the front end refuses 16-bit outputs there, and causal masks bottom-right): its output
    is scaled by V's largest element, which no output exceeds. That rounding is part of its error, as it is for users.
    """

    name = "cudnn_fp8"

    def available(self) -> Support:
        if self._capability[0] not in (9, 10):
            return Support("has FP8 attention for Hopper and data-centre Blackwell only")
        return installed("cudnn", "cuDNN's front end", "pip install nvidia-cudnn-frontend")

    def supports(self, problem: Problem) -> Support:
        most = 256 if self._capability[0] == 9 else 128
        if problem.head_dim % 16 or problem.head_dim > most:
            return Support(f"head dims are multiples of 16 up to {most}")
        return top_left_refusal(problem)

    def prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Prepared:
        def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """E4M3 elements, in memory as [B, S, H, D] like cuDNN's own examples, and what to multiply them with."""
            elements, scale = to_e4m3(x, (0, 1, 2, 3))
            return elements.transpose(1, 2).contiguous().transpose(1, 2), scale

        def numbers(value: float) -> torch.Tensor:
            return torch.full((1, 1, 1, 1), value, device=q.device)

        (q8, q_scale), (k8, k_scale), (v8, v_scale) = (quantised(x) for x in (q, k, v))
        out = torch.empty_like(q8)
        inputs = {
            "q": q8,
            "k": k8,
            "v": v8,
            "descale_q": q_scale,
            "descale_k": k_scale,
            "descale_v": v_scale,
            "descale_s": numbers(1 / _SCALE_P),
            "scale_s": numbers(_SCALE_P),
            "scale_o": 1 / v_scale,
        }
        run = _graph(inputs, out, problem)

        def attention() -> torch.Tensor:
            run()
            return out

        def whole() -> torch.Tensor:
            for name, x in zip("qkv", (q, k, v), strict=True):
                elements, scale = quantised(x)
                inputs[name].copy_(elements)
                inputs[f"descale_{name}"].copy_(scale)
            inputs["scale_o"].copy_(1 / inputs["descale_v"])
            run()
            return (out.to(q.dtype) * inputs["descale_v"]).to(q.dtype)

        def output(result: torch.Tensor) -> torch.Tensor:
            return result if result.dtype == q.dtype else result.float() * inputs["descale_v"]

        return Prepared(attention, whole, output)


def _graph(inputs: dict[str, torch.Tensor], out: torch.Tensor, problem: Problem) -> Any:
    """A function that runs cuDNN's graph on these tensors, on PyTorch's current stream."""
    import cudnn

    handle = cudnn.create_handle()
    graph = cudnn.pygraph(
        io_data_type=cudnn.data_type.FP8_E4M3,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=handle,
    )
    types = {torch.float8_e4m3fn: cudnn.data_type.FP8_E4M3, torch.float32: cudnn.data_type.FLOAT}
    nodes = {
        name: graph.tensor(dim=list(x.shape), stride=list(x.stride()), data_type=types[x.dtype])
        for name, x in inputs.items()
    }
    mask = {"diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT, "right_bound": 0} if problem.causal else {}
    o, _, amax_s, amax_o = graph.sdpa_fp8(
        **nodes, generate_stats=False, attn_scale=problem.head_dim**-0.5, name="sdpa", **mask
    )
    o.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride())).set_data_type(types[out.dtype])
    largest = [torch.empty((1, 1, 1, 1), device=out.device) for _ in range(2)]
    for node in (amax_s, amax_o):
        node.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(cudnn.data_type.FLOAT)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    tensors = {nodes[name]: x for name, x in inputs.items()} | {o: out, amax_s: largest[0], amax_o: largest[1]}
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=out.device)

    def run() -> None:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(out.device).cuda_stream)
        graph.execute(tensors, workspace, handle=handle)

    return run
