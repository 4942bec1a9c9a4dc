"""Accesses to shared memory that nothing orders."""

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Constexpr, Float32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from cute_attn.emulator.errors import DataRace, MissingProxyFence

from .example import example


@example(DataRace, torch.ones(128), torch.zeros(128))
@cute.kernel
def no_barrier(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """A missing `bar.sync`

    Every thread reads what another one has stored, without a barrier between them.

    The message names the later access under `instruction` and the earlier one in its first line, each with its warp.
    The finding does not depend on which of them the emulator happens to do first: with `races=False` this kernel gives
    the right result in the fixed order.

    Fix: a barrier between the write and the read; `sync_warp` is enough where both are in one warp.
    """
    thread, _, _ = cute.arch.thread_idx()
    tile = SmemAllocator().allocate_tensor(Float32, cute.make_layout(128))
    tile[thread] = x[thread]
    if const_expr(fixed):
        cute.arch.sync_threads()
    out[thread] = tile[127 - thread]


@example(DataRace, torch.ones(128), torch.zeros(128))
@cute.kernel
def no_wait_for_cp_async(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """A missing wait for `cp.async`

    Every thread copies an element to shared memory. There is a barrier before the tile is read, and no wait before the
    barrier.

    A barrier says that the copies have been issued, not that they have arrived. The order is: wait for one's own
    copies, then meet the others.

    Fix: `cp_async_wait_group` before the barrier. With several groups in flight its argument is how many of the newest
    ones may stay there; one too many gives this finding as well.
    """
    thread, _, _ = cute.arch.thread_idx()
    tile = SmemAllocator().allocate_tensor(Float32, cute.make_layout(128), byte_alignment=16)
    load = cute.make_copy_atom(cpasync.CopyG2SOp(), Float32, num_bits_per_copy=32)
    cute.copy(load, cute.local_tile(x, (1,), (thread,)), cute.local_tile(tile, (1,), (thread,)))
    cute.arch.cp_async_commit_group()
    if const_expr(fixed):
        cute.arch.cp_async_wait_group(0)
    cute.arch.sync_threads()
    out[thread] = tile[127 - thread]


@example(DataRace, torch.ones(128), torch.zeros(128))
@cute.kernel
def no_barrier_after_the_wait(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """A wait for `cp.async` without a barrier

    The same with the wait, and without the barrier.

    A thread's wait is for its own copies. That warp 3 has waited is known to warp 3 alone.

    Fix: a barrier after the wait.
    """
    thread, _, _ = cute.arch.thread_idx()
    tile = SmemAllocator().allocate_tensor(Float32, cute.make_layout(128), byte_alignment=16)
    load = cute.make_copy_atom(cpasync.CopyG2SOp(), Float32, num_bits_per_copy=32)
    cute.copy(load, cute.local_tile(x, (1,), (thread,)), cute.local_tile(tile, (1,), (thread,)))
    cute.arch.cp_async_commit_group()
    cute.arch.cp_async_wait_group(0)
    if const_expr(fixed):
        cute.arch.sync_threads()
    out[thread] = tile[127 - thread]


@example(DataRace, torch.ones(128), torch.zeros(128))
@cute.kernel
def no_wait_for_the_mbarrier(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """A missing wait for a bulk copy

    One thread has 512 bytes copied, and everybody reads them after a barrier of the CTA.

    Copies by TMA and bulk copies say that they are complete to an mbarrier, and to nothing else. The message gives its
    offset in shared memory.

    Fix: every warp that reads waits for the phase.
    """
    thread, _, _ = cute.arch.thread_idx()
    memory = SmemAllocator()
    tile = memory.allocate_tensor(Float32, cute.make_layout(128), byte_alignment=128)
    full = memory.allocate_array(Int64, 1)
    if thread == 0:
        cute.arch.mbarrier_init(full, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    if thread == 0:
        cute.arch.mbarrier_arrive_and_expect_tx(full, 512)
        load = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32)
        cute.copy(load, x, tile, mbar_ptr=full)
    cute.arch.sync_threads()
    if const_expr(fixed):
        cute.arch.mbarrier_wait(full, 0)
    out[thread] = tile[thread]


@example(DataRace, torch.ones(512), torch.zeros(128), block=160)
@cute.kernel
def released_too_early(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """A stage that is refilled too early

    A producer warp brings four tiles through two stages to four consumer warps, which release a stage before they have
    read it.

    The write is the producer's next copy to the stage, and the read is the consumers': all of the reads lie after the
    arrival that gave the stage away. "No barrier orders them" means barriers of every kind.

    Fix: arrive at `empty` after the last read. A `wgmma` reads until `wgmma.wait_group`, so the arrival belongs behind
    that.
    """
    thread, _, _ = cute.arch.thread_idx()
    memory = SmemAllocator()
    stages = memory.allocate_tensor(Float32, cute.make_layout((128, 2)), byte_alignment=128)
    full, empty = memory.allocate_array(Int64, 2), memory.allocate_array(Int64, 2)
    if thread < 2:
        cute.arch.mbarrier_init(full + thread, 1)
        cute.arch.mbarrier_init(empty + thread, 128)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    if thread == 128:
        load = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32)
        for n in cutlass.range(4):
            stage, phase = n % 2, n // 2
            cute.arch.mbarrier_wait(empty + stage, phase ^ 1)
            cute.arch.mbarrier_arrive_and_expect_tx(full + stage, 512)
            cute.copy(load, cute.local_tile(x, (128,), (n,)), stages[None, stage], mbar_ptr=full + stage)
    elif thread < 128:
        total = Float32(0)
        for n in cutlass.range(4):
            stage, phase = n % 2, n // 2
            cute.arch.mbarrier_wait(full + stage, phase)
            if const_expr(not fixed):
                cute.arch.mbarrier_arrive(empty + stage)
            total += stages[thread, stage]
            if const_expr(fixed):
                cute.arch.mbarrier_arrive(empty + stage)
        out[thread] = total


@example(DataRace, torch.ones(256), torch.zeros(256))
@cute.kernel
def source_overwritten(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """The source of a bulk store, overwritten

    Two tiles go through one buffer to global memory, and nobody waits until the first has been read.

    The thread that issued a bulk store, or a store by TMA, is the one that can wait for it. What waits for a copy from
    global memory is an mbarrier; a copy to global memory has groups like those of `cp.async`.

    Fix: `cp_async_bulk_wait_group` by that thread, and then a barrier. `read=True` waits until the source may be
    overwritten, which is sooner than until the tile is in global memory.
    """
    thread, _, _ = cute.arch.thread_idx()
    tile = SmemAllocator().allocate_tensor(Float32, cute.make_layout(128), byte_alignment=128)
    store = cute.make_copy_atom(cpasync.CopyBulkS2GOp(), Float32)
    for n in cutlass.range(2):
        tile[thread] = 2 * x[128 * n + thread]
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_threads()
        if thread == 0:
            cute.copy(store, tile, cute.local_tile(out, (128,), (n,)))
            cute.arch.cp_async_bulk_commit_group()
            if const_expr(fixed):
                cute.arch.cp_async_bulk_wait_group(0, read=True)
        cute.arch.sync_threads()


@example(MissingProxyFence, torch.ones(128), torch.zeros(128))
@cute.kernel
def no_proxy_fence(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """A bulk store of what threads have just written

    Threads write a tile, meet, and one of them has it copied to global memory.

    Ordinary stores and the copy engines reach shared memory on two ways, called proxies. A barrier orders the threads
    and says nothing to the other proxy. `wgmma` reads its operands through it, too.

    Fix: `fence.proxy.async` by the threads that wrote, before the barrier.
    """
    thread, _, _ = cute.arch.thread_idx()
    tile = SmemAllocator().allocate_tensor(Float32, cute.make_layout(128), byte_alignment=128)
    tile[thread] = 2 * x[thread]
    if const_expr(fixed):
        cute.arch.fence_proxy("async.shared", space="cta")
    cute.arch.sync_threads()
    if thread == 0:
        store = cute.make_copy_atom(cpasync.CopyBulkS2GOp(), Float32)
        cute.copy(store, tile, out)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)


@example(MissingProxyFence, torch.ones(128), torch.zeros(128))
@cute.kernel
def no_fence_after_the_init(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """An mbarrier that the copy may not know yet

    An mbarrier is initialised and used by a bulk copy, with a barrier of the CTA between them.

    The init is an ordinary write, and the copy reports to the mbarrier through the async proxy.

    Fix: `mbarrier_init_fence` by the thread that initialises. In a cluster it also makes the init visible to the other
    CTAs, with a barrier of the cluster after it.
    """
    thread, _, _ = cute.arch.thread_idx()
    memory = SmemAllocator()
    tile = memory.allocate_tensor(Float32, cute.make_layout(128), byte_alignment=128)
    full = memory.allocate_array(Int64, 1)
    if thread == 0:
        cute.arch.mbarrier_init(full, 1)
        if const_expr(fixed):
            cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    if thread == 0:
        cute.arch.mbarrier_arrive_and_expect_tx(full, 512)
        load = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32)
        cute.copy(load, x, tile, mbar_ptr=full)
    cute.arch.mbarrier_wait(full, 0)
    out[thread] = tile[thread]
