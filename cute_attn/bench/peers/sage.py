"""SageAttention 2 and 2++, where it is installed from source: the function that its own ``sageattn`` picks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cute_attn.bench.contender import Formats, Prepared, installed, top_left_refusal
from cute_attn.bench.peers.peer import Peer
from cute_attn.dispatch import Support
from cute_attn.problem import Problem

__all__ = ["Sage"]

_HND = 1  # its number for [B, H, S, D]
_GRANULARITIES = {"per_warp": ("per_warp_int8_cuda", 2), "per_thread": ("per_thread_int8_triton", 3)}
"""Its quantiser of Q and K in ``sageattention.core``, and its number for the operators."""


@dataclass(frozen=True)
class _Kernel:
    """How ``sageattn`` of SageAttention 2.2 serves one compute capability, read from its core.py.

    module, operator: compiled module inside ``sageattention.core`` and its attention operator
    enabled:          flag in ``sageattention.core`` that says whether that module was built
    blocks:           tiles of its quantisers, as they take them
    value_range:      largest magnitude of V in E4M3; None: V in float16
    value_multiple:   V is padded with zeros to a multiple of so many tokens
    """

    module: str
    operator: str
    enabled: str
    granularity: str
    blocks: dict[str, int]
    accumulate: str
    value_range: float | None = None
    value_multiple: int = 1


_WIDE = {"BLKQ": 128, "WARPQ": 32, "BLKK": 64}
_PLUS_PLUS = "qk_int8_sv_f8_accum_f16_fuse_v_scale_attn_inst_buf"
_KERNELS = {
    (8, 0): _Kernel(
        "sm80_compile", "qk_int8_sv_f16_accum_f32_attn", "SM80_ENABLED", "per_thread", {**_WIDE, "WARPK": 64}, "float32"
    ),
    (8, 9): _Kernel(
        "sm89_compile", _PLUS_PLUS, "SM89_ENABLED", "per_thread", {**_WIDE, "WARPK": 64}, "float16+float32", 2.25
    ),
    (9, 0): _Kernel(
        "sm90_compile",
        "qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf",
        "SM90_ENABLED",
        "per_thread",
        {"BLKQ": 64, "WARPQ": 16, "BLKK": 128, "WARPK": 128},
        "float32+float32",
        448.0,
        128,
    ),
    (12, 0): _Kernel("sm89_compile", _PLUS_PLUS, "SM89_ENABLED", "per_warp", _WIDE, "float16+float32", 2.25),
}
"""By compute capability. On 8.6 ``sageattn`` picks a Triton kernel, which has no operator of its own to time."""


class Sage(Peer):
    """K smoothed, INT8 Q·Kᵀ, P·V in E4M3 (float16 on Ampere).

    Its kernels are launched on CUDA's legacy default stream, whatever PyTorch's current one is: a CUDA graph cannot
    capture them, and they are timed as they are called.
    """

    name = "sage"
    capturable = False
    quantises = True

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__(capability)
        self._kernel = _KERNELS.get(capability)

    def formats(self, problem: Problem) -> Formats:
        kernel = self._kernel
        if kernel is None:
            return Formats("int8", "e4m3")
        return Formats("int8", "float16" if kernel.value_range is None else "e4m3", kernel.accumulate)

    def available(self) -> Support:
        if self._kernel is None:
            major, minor = self._capability
            return Support(f"sageattn picks no CUDA kernel for compute capability {major}.{minor}")
        how = "no wheels of 2.x on PyPI; build github.com/thu-ml/SageAttention"
        if not (found := installed("sageattention", "SageAttention", how)):
            return found
        from sageattention import core

        if not getattr(core, self._kernel.enabled, False):
            return Support("SageAttention is installed, but was built without the kernels of this GPU, or is 1.x")
        return Support()

    def supports(self, problem: Problem) -> Support:
        if problem.head_dim > 128:
            return Support("head dims up to 128")
        if problem.head_dim not in (64, 128):
            return Support("pads other head dims than 64 and 128 to those; measured are the two")
        return top_left_refusal(problem)

    def prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Prepared:
        from sageattention import core

        kernel = self._kernel
        assert kernel is not None
        q8, q_scale, k8, k_scale = self._quantised_qk(core, q, k)
        out = torch.empty_like(q)
        operator: Callable[..., Any] = getattr(getattr(core, kernel.module), kernel.operator)
        values = (v.half(),)
        scales: tuple[torch.Tensor, ...] = ()
        if kernel.value_range is not None:
            v8, v_scale, _ = core.per_channel_fp8(
                torch.nn.functional.pad(v, (0, 0, 0, -problem.seq_k % kernel.value_multiple)),
                tensor_layout="HND",
                scale_max=kernel.value_range,
                smooth_v=False,
            )
            values, scales = (v8,), (v_scale,)
        _, granularity = _GRANULARITIES[kernel.granularity]
        options = (_HND, int(problem.causal), granularity, problem.head_dim**-0.5, 0)

        def attention() -> torch.Tensor:
            operator(q8, k8, *values, out, q_scale, k_scale, *scales, *options)
            return out

        return Prepared(attention, lambda: core.sageattn(q, k, v, tensor_layout="HND", is_causal=problem.causal))

    def _quantised_qk(self, core: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, its scales, k, its scales."""
        kernel = self._kernel
        assert kernel is not None
        quantiser, _ = _GRANULARITIES[kernel.granularity]
        return getattr(core, quantiser)(q, k, k.mean(dim=2, keepdim=True), tensor_layout="HND", **kernel.blocks)
