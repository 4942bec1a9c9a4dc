"""What a consumer thread holds in registers, seen while one tile of the main loop is traced."""

from __future__ import annotations

from functools import cache

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8

from cute_attn.kernels.softmax_warpgroup import value_parts

from ..operands import RegisterTensor, described
from ..tracing import while_tracing
from .kernels import ARCH, HEAD_DIM, kernel_of
from .machine import roles

__all__ = ["parts_of_v", "register_tensors"]


def parts_of_v(name: str, head_dim: int = HEAD_DIM) -> tuple[int, ...]:
    """Rows of V, and of ones, that are multiplied at a time."""
    kernel = kernel_of(name, head_dim)
    if not kernel.recipe.quantised:
        return (kernel.image.value_rows,)
    return value_parts(kernel.image, roles(name, head_dim).consumer) or ()


@cache
def register_tensors(name: str, head_dim: int = HEAD_DIM) -> dict[str, RegisterTensor]:
    """S, P, O and the state of the softmax by name; PV, the sums of one tile, where tiles are added up apart."""
    kernel = kernel_of(name, head_dim)
    config, recipe, image = kernel.config, kernel.recipe, kernel.image
    registers = roles(name, head_dim).consumer

    def one_tile() -> list[RegisterTensor]:
        shared = cute.arch.get_dyn_smem(Uint8, alignment=1024)
        row_scale = cute.make_rmem_tensor((2,), Float32)
        row_scale.fill(1.0)
        stages = (config.stages, kernel.stage_bytes)
        scores = recipe.scores(shared, shared, *stages, row_scale, image, not config.k_scale_per_token)
        softmax = recipe.softmax(shared, *stages, image, registers, config.fma_eighths)
        sums = scores.multiply(Int32(0))
        y, _, factors = scores.dequantise(sums, Int32(0), None)
        found = {"O": softmax.output, "S": sums, "P": softmax.probabilities(y, factors)}
        if config.accumulate == "float32+float32":
            rows = max(parts_of_v(name, head_dim))
            found["PV"] = cute.make_rmem_tensor(((2, 2, rows // 8), 1, 1), Float32)
        found |= {"bias": softmax.bias, "row_scale": row_scale}
        if not recipe.quantised:
            found["sums"] = softmax.sums
        return [described(each, tensor) for each, tensor in found.items()]

    return {tensor.name: tensor for tensor in while_tracing(one_tile, ARCH)}
