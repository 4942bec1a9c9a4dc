"""What one warp holds in registers, seen while its main loop is traced: no shape is written down twice."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8

from cute_attn.kernels.attention_sm80 import AttentionConfig, AttentionSm80

from .tracing import while_tracing

__all__ = ["RegisterTensor", "described", "register_tensors"]


@dataclass(frozen=True)
class RegisterTensor:
    """A tensor in a lane's registers.

    element: "int32", "float32", …
    layout:  shape:stride
    """

    name: str
    element: str
    layout: str
    registers: int


def described(name: str, tensor: cute.Tensor) -> RegisterTensor:
    element = tensor.element_type
    layout = str(tensor.layout)
    registers = -(-cute.size(tensor) * element.width // 32)
    return RegisterTensor(name, element.__name__.lower(), layout, registers)


@cache
def register_tensors(config: AttentionConfig) -> dict[str, RegisterTensor]:
    """S, P, O, sums and the state of the softmax, by name, for one KV tile of a kernel's main loop."""
    kernel = AttentionSm80(config)
    recipe = kernel.recipe

    def one_tile() -> list[RegisterTensor]:
        shared = cute.arch.get_dyn_smem(Uint8, alignment=1024)
        row_scale = cute.make_rmem_tensor((2 * config.m_tiles,), Float32)
        row_scale.fill(1.0)
        scores = recipe.scores(shared, kernel.q_planes, Int32(0), Int32(0), kernel.image, config.m_tiles)
        if config.smooth_q:
            scales = cute.make_rmem_tensor((2 * config.m_tiles,), Float32)
            scales.fill(1.0)
            scores = scores.with_delta(scales, 0)
        softmax = recipe.softmax(row_scale, kernel.image, config.m_tiles)
        accumulators = scores.multiply(shared)
        y, _ = scores.dequantise(accumulators, shared, None)
        state = {"O": softmax.output, "sums": softmax.sums, "S": accumulators, "P": softmax.probabilities(y)}
        for part, owner in ((softmax, ""), (scores, "scores.")):
            for field in dataclasses.fields(part):
                value = getattr(part, field.name)
                if isinstance(value, cute.Tensor) and not any(value is tensor for tensor in state.values()):
                    state[owner + field.name if field.name in state else field.name] = value
        return [described(name, tensor) for name, tensor in state.items()]

    return {tensor.name: tensor for tensor in while_tracing(one_tile)}
