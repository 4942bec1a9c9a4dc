"""Instructions of a whole warp, and operands."""

import cutlass.cute as cute
import torch
from cutlass import Constexpr, Float32, const_expr
from cutlass.memory import SmemAllocator

from cute_attn.emulator.errors import DivergentWarp, InvalidOperand

from .example import example


@example(DivergentWarp, torch.ones(20), torch.zeros(1), block=32)
@cute.kernel
def shuffle_in_a_branch(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """A shuffle inside a branch

    A warp adds up 20 elements, and only the lanes that have one take part in the reduction.

    The DSL's shuffles name all 32 lanes in their mask, so all have to execute them. On a GPU the other lanes' values
    are undefined, or the warp hangs.

    Fix: give the other lanes the neutral element, and let everybody shuffle.
    """
    thread, _, _ = cute.arch.thread_idx()
    total = Float32(0)
    if thread < x.shape[0]:
        total = x[thread]
        if const_expr(not fixed):
            total = cute.arch.warp_reduction_sum(total)
    if const_expr(fixed):
        total = cute.arch.warp_reduction_sum(total)
    if thread == 0:
        out[0] = total


@example(DivergentWarp, torch.ones(100), torch.zeros(128))
@cute.kernel
def barrier_in_a_branch(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """A barrier inside a branch

    The barrier is reached by the 100 threads that have an element.

    `bar.sync` counts whole warps, and what it does with a part of one is undefined. Of the last warp 4 lanes come. Had
    none of them come, `sync_threads` would wait for a warp that never does, and the finding would be a `Deadlock`.

    Fix: the barrier stands outside of the branch.
    """
    thread, _, _ = cute.arch.thread_idx()
    tile = SmemAllocator().allocate_tensor(Float32, cute.make_layout(128))
    tile[thread] = Float32(0)
    if thread < x.shape[0]:
        tile[thread] = x[thread]
        if const_expr(not fixed):
            cute.arch.sync_threads()
    if const_expr(fixed):
        cute.arch.sync_threads()
    out[thread] = tile[127 - thread]


@example(InvalidOperand, torch.ones(512), torch.zeros(512), block=512)
@cute.kernel
def one_barrier_too_many(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """More named barriers than there are

    Each of 16 warps has a named barrier of its own, after number 0, which belongs to `sync_threads`.

    `InvalidOperand` stands for all operands whose value an instruction does not allow. A constant would have been
    refused by the assembler; this one is known at run time only. A `trap` that is reached, and an assertion that
    fails, are of this class too.

    Fix: 16 barriers are all there are, 0 included.
    """
    thread, _, _ = cute.arch.thread_idx()
    number = cute.arch.warp_idx() if const_expr(fixed) else 1 + cute.arch.warp_idx()
    tile = SmemAllocator().allocate_tensor(Float32, cute.make_layout(512))
    tile[thread] = x[thread]
    cute.arch.barrier(barrier_id=number, number_of_threads=32)
    out[thread] = tile[thread ^ 31]
