"""Registers of wgmma."""

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Constexpr, Float16, Float32, const_expr
from cutlass.cute.nvgpu import warpgroup
from cutlass.memory import SmemAllocator

from cute_attn.emulator.errors import AccumulatorInFlight, MissingFence, RegisterInFlight

from .example import example

_A, _B, _OUT = (torch.ones(64, 64).half(), torch.ones(8, 64).half(), torch.zeros(64, 8))


@cute.jit
def launch_with_mma(kernel: Constexpr, tensors: tuple, fixed: Constexpr, sizes: Constexpr):
    """Passes a TiledMma of 64 x 8 x 16, A from registers or from shared memory."""
    source = warpgroup.OperandSource.RMEM if const_expr(sizes["a_in_registers"]) else warpgroup.OperandSource.SMEM
    k = warpgroup.OperandMajorMode.K
    mma = cute.make_tiled_mma(warpgroup.MmaF16BF16Op(Float16, Float32, (64, 8, 16), source, k, k))
    kernel(mma, *tensors, fixed).launch(grid=sizes["grid"], block=sizes["block"])


@cute.jit
def to_shared(x: cute.Tensor):
    """A copy of x in shared memory, in the layout that wgmma reads, and fenced."""
    thread, _, _ = cute.arch.thread_idx()
    atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, Float16)
    layout = cute.tile_to_shape(atom, x.shape, order=(0, 1))
    tile = SmemAllocator().allocate_tensor(Float16, layout.outer, byte_alignment=1024, swizzle=layout.inner)
    for n in cutlass.range(thread, cute.size(x), 128):
        at = (n // x.shape[1], n % x.shape[1])
        tile[at] = x[at]
    cute.arch.fence_proxy("async.shared", space="cta")
    cute.arch.sync_threads()
    return tile


@example(AccumulatorInFlight, _A, _B, _OUT, host=launch_with_mma, a_in_registers=False)
@cute.kernel
def read_before_the_wait(mma: cute.TiledMma, a: cute.Tensor, b: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """An accumulator read before the wait

    A product is issued and committed, and stored while one group may still be in flight: this one. (`to_shared` copies
    a tensor to shared memory, with a fence and a barrier.)

    In a pipelined loop `wait_group(1)` is right, for the group before the newest. The accumulators of the newest are
    complete after `wait_group(0)` only.

    Fix: wait for the group that writes the accumulator.
    """
    thread, _, _ = cute.arch.thread_idx()
    part = mma.get_slice(thread)
    a_tile = mma.make_fragment_A(part.partition_A(to_shared(a)))
    b_tile = mma.make_fragment_B(part.partition_B(to_shared(b)))
    accumulator = mma.make_fragment_C(part.partition_shape_C((64, 8)))
    mma.set(warpgroup.Field.ACCUMULATE, False)
    warpgroup.fence()
    for k in cutlass.range_constexpr(4):
        cute.gemm(mma, accumulator, a_tile[None, None, k], b_tile[None, None, k], accumulator)
        mma.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()
    warpgroup.wait_group(0 if fixed else 1)
    part.partition_C(out).store(accumulator.load())


@example(RegisterInFlight, _A, _B, _OUT, host=launch_with_mma, a_in_registers=True)
@cute.kernel
def operand_overwritten(mma: cute.TiledMma, a: cute.Tensor, b: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """The next operand, loaded into registers in use

    A is multiplied from registers, and the loop loads its next part into them while the `wgmma` before may be reading
    the last one.

    The instruction named is the one that writes; the `wgmma` is quoted. What the product is then is undefined, unless
    the assembler notices and serialises the `wgmma`s, which costs what they were to gain.

    Fix: wait before the load, or alternate between two fragments and leave one group in flight.
    """
    thread, _, _ = cute.arch.thread_idx()
    part = mma.get_slice(thread)
    a_parts = part.partition_A(a)
    a_fragment = mma.make_fragment_A(part.partition_shape_A((64, 16)))[None, None, 0]
    b_tile = mma.make_fragment_B(part.partition_B(to_shared(b)))
    accumulator = mma.make_fragment_C(part.partition_shape_C((64, 8)))
    accumulator.fill(0)
    mma.set(warpgroup.Field.ACCUMULATE, True)
    for k in cutlass.range(4, unroll=1):
        a_fragment.store(a_parts[None, None, k].load())
        warpgroup.fence()
        cute.gemm(mma, accumulator, a_fragment, b_tile[None, None, k], accumulator)
        warpgroup.commit_group()
        if const_expr(fixed):
            warpgroup.wait_group(0)
    warpgroup.wait_group(0)
    part.partition_C(out).store(accumulator.load())


@example(MissingFence, _A, _B, _OUT, host=launch_with_mma, a_in_registers=False)
@cute.kernel
def no_fence_after_the_load(mma: cute.TiledMma, a: cute.Tensor, b: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """A `wgmma` without a fence

    The accumulator is loaded from memory, and a `wgmma` adds to it.

    `wgmma` belongs to another proxy for registers as well: what was written to them by other instructions is seen
    after `wgmma.fence`. The first `wgmma` of a kernel needs one in any case.

    Fix: `warpgroup.fence()` between the last write of a register and the first `wgmma` that uses it.
    """
    thread, _, _ = cute.arch.thread_idx()
    part = mma.get_slice(thread)
    a_tile = mma.make_fragment_A(part.partition_A(to_shared(a)))
    b_tile = mma.make_fragment_B(part.partition_B(to_shared(b)))
    accumulator = mma.make_fragment_C(part.partition_shape_C((64, 8)))
    accumulator.store(part.partition_C(out).load())
    mma.set(warpgroup.Field.ACCUMULATE, True)
    if const_expr(fixed):
        warpgroup.fence()
    cute.gemm(mma, accumulator, a_tile, b_tile, accumulator)
    warpgroup.commit_group()
    warpgroup.wait_group(0)
    part.partition_C(out).store(accumulator.load())
