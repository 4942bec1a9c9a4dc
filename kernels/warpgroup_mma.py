"""Warpgroup MMAs of sm_90a on operand planes: how a product is described, issued and waited for."""

from __future__ import annotations

from typing import Any

import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float32, Int8, Int32, Uint8
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from .operand_planes import PLANE_BYTES_PER_ROW
from .tile_image import StaticLayout

__all__ = ["ROWS", "block_operand", "issue_scores", "multiply", "plane_operand", "warpgroup_mma"]

ROWS = 64
"""Rows of A, and of the accumulator, of a warpgroup's MMA."""

_K = OperandMajorMode.K


def warpgroup_mma(
    a: Any, b: Any, columns: int, *, a_in_registers: bool = False, b_major: OperandMajorMode = _K
) -> cute.TiledMma:
    """wgmma.m64n``columns`` of A [64, k] in type ``a`` and B [columns, k] in type ``b``, K-major but for ``b_major``.

    Sums of integers are int32, of floats float32. columns: 8 to 256 in steps of 8; of integers, above 32, of 16. A
    lane's accumulators, ((2, 2, columns/8), 1, 1), and the registers of A are, in each of the four warps, those of
    m16n8 MMAs: see `atoms.MmaInt8Op`.
    """
    source = warpgroup.OperandSource.RMEM if a_in_registers else warpgroup.OperandSource.SMEM
    shape = (ROWS, columns, 256 // a.width)
    if a in (Int8, Uint8):
        op: Any = warpgroup.MmaI8Op(a, b, Int32, shape, source, _K, _K)
    elif a is Float8E4M3FN:
        op = warpgroup.MmaF8Op(a, b, Float32, shape, source, _K, _K)
    else:
        op = warpgroup.MmaF16BF16Op(a, Float32, shape, source, _K, b_major)
    return cute.make_tiled_mma(op)


def plane_operand(
    planes: cute.Pointer, element: Any, rows: int, plane_rows: int, count: int, stages: int = 1, stage_bytes: int = 0
) -> cute.Tensor:
    """[rows, k, stage] of ``element``s in shared memory: ``count`` planes of ``plane_rows`` rows, of which the first
    ``rows`` after ``planes`` (256-byte aligned), ``stage_bytes`` from one stage to the next.

    Eight rows of a plane are a core of the 32-byte swizzle, a plane is the k of one instruction.
    """
    size = element.width // 8
    row = PLANE_BYTES_PER_ROW // size
    layout = cute.make_layout(
        ((8, rows // 8), (row, count), stages),
        stride=((row, 8 * row), (1, plane_rows * row), stage_bytes // size),
    )
    return cute.make_tensor(cute.recast_ptr(planes, cute.make_swizzle(1, 4, 3), dtype=element), layout)


def block_operand(
    blocks: cute.Pointer, element: Any, layout: StaticLayout, stages: int, stage_bytes: int
) -> cute.Tensor:
    """``layout`` and a last mode of stages, of ``element``s in shared memory with the 128-byte swizzle.

    blocks: 1024-byte aligned; stage_bytes: from one stage to the next
    """
    strides = (*layout.stride, stage_bytes * 8 // element.width)
    staged = cute.make_layout((*layout.shape, stages), stride=strides)
    return cute.make_tensor(cute.recast_ptr(blocks, cute.make_swizzle(3, 4, 3), dtype=element), staged)


def multiply(mma: cute.TiledMma, sums: cute.Tensor, a: cute.Tensor, b: cute.Tensor, *, add: bool) -> None:
    """Issue sums = A·B, or if ``add`` sums += A·B: one instruction a step of k, of which ``a`` has as many as count.
    `warpgroup.fence` comes before, the commit and the wait after.

    a, b: fragments of the MMA, (…, …, step)
    """
    atom = cute.make_mma_atom(mma.op)
    atom.set(warpgroup.Field.ACCUMULATE, add)
    for k in range(cute.size(a.shape[2])):
        cute.mma_atom_call(atom, sums[None, 0, 0], a[None, 0, k], b[None, 0, k], sums[None, 0, 0])
        atom.set(warpgroup.Field.ACCUMULATE, True)


def issue_scores(
    mma: cute.TiledMma,
    queries: cute.Tensor,
    keys: cute.Tensor,
    stage: Int32,
    tokens: int,
    registers: cute.Tensor | None = None,
) -> cute.Tensor:
    """Issue and commit S = Q·Kᵀ; the sums, int32 or float32 ((2,2), n8 tile), are there after `warpgroup.wait_group`.

    queries, keys: fragments of the MMA with the stage last, Q's one and K's ``stage``; tokens: rows of K
    registers: whose place the sums take, float32, as many; nobody needs them any more
    """
    element, layout = mma.op.acc_dtype, cute.make_layout(((2, 2, tokens // 8), 1, 1))
    if registers is None:
        sums = cute.make_rmem_tensor(layout, element)
    else:
        sums = cute.make_tensor(cute.recast_ptr(registers.iterator, dtype=element), layout)
    warpgroup.fence()
    multiply(mma, sums, queries[None, None, None, 0], keys[None, None, None, stage], add=False)
    warpgroup.commit_group()
    return cute.make_tensor(sums.iterator, cute.make_layout(((2, 2), tokens // 8)))
