"""Barriers that wait for too much, or count too little."""

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Constexpr, Float16, Float32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from cute_attn.emulator.errors import BarrierMismatch, Deadlock

from .example import example


@example(Deadlock, torch.ones(96), torch.zeros(96))
@cute.kernel
def a_warp_that_never_comes(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """A named barrier that counts a warp too many

    Three of four warps exchange data through a barrier that waits for 128 threads.

    Each line of the report is a barrier at which somebody waits: how many have come, who, and at which instruction,
    and who has not. Warp 3 has exited here.

    Fix: `number_of_threads` is the number of those who come.
    """
    thread, _, _ = cute.arch.thread_idx()
    tile = SmemAllocator().allocate_tensor(Float32, cute.make_layout(96))
    if thread < 96:
        tile[thread] = x[thread]
        cute.arch.barrier(barrier_id=1, number_of_threads=96 if fixed else 128)
        out[thread] = tile[95 - thread]


@example(Deadlock, torch.ones(128), torch.zeros(128), block=256)
@cute.kernel
def an_arrival_per_warp(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """An mbarrier that expects more arrivals than come

    Four warps fill a tile for four others. One elected lane of each arrives, and the barrier was initialised for an
    arrival of every thread.

    124 of 128 have not come, so 4 have: one for each warp.

    Fix: initialise with the number of arrivals, which is the number of lanes that execute `mbarrier_arrive`.
    """
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    memory = SmemAllocator()
    tile = memory.allocate_tensor(Float32, cute.make_layout(128))
    full = memory.allocate_array(Int64, 1)
    if thread == 0:
        cute.arch.mbarrier_init(full, 4 if fixed else 128)
    cute.arch.sync_threads()
    if warp < 4:
        tile[thread] = x[thread]
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(full)
    else:
        cute.arch.mbarrier_wait(full, 0)
        out[thread - 128] = tile[255 - thread]


@example(Deadlock, torch.ones(128), torch.zeros(128))
@cute.kernel
def bytes_that_nobody_copies(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """More bytes announced than copied

    A copy of 128 floats is announced with 1024 bytes, as if they were doubles.

    The copy has been performed: 512 of the bytes were reported, and the others belong to no copy that was issued. A
    copy that was not issued at all, because the branch around it was not taken, looks the same.

    Fix: announce what all copies that report to this phase write, whether inside the tensor or filled with zeros.
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
        cute.arch.mbarrier_arrive_and_expect_tx(full, 512 if fixed else 1024)
        load = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32)
        cute.copy(load, x, tile, mbar_ptr=full)
    cute.arch.mbarrier_wait(full, 0)
    out[thread] = tile[thread]


@cute.jit
def launch_with_tma(kernel: Constexpr, tensors: tuple, fixed: Constexpr, sizes: Constexpr):
    """Passes x as a TMA atom, of tiles of 64 x 64, and its coordinates."""
    x, out = tensors
    layout = cute.make_layout((64, 64), stride=(64, 1))
    atom, coordinates = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), x, layout, (64, 64))
    kernel(atom, coordinates, out, fixed).launch(**sizes)


_HALVES = torch.zeros(64, 64, dtype=torch.float16)


@example(BarrierMismatch, _HALVES, _HALVES, host=launch_with_tma, block=64)
@cute.kernel
def elements_for_bytes(load: cute.CopyAtom, x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """Elements announced for bytes

    A TMA load of a tile of 64 × 64 halves is announced by the number of its elements.

    On a GPU the phase completes when 4096 bytes have arrived, and half of the tile may be missing where it is read. The
    other 4096 bytes are what the message counts as too many.

    Fix: bytes, as `cute.size_in_bytes` gives them.
    """
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    memory = SmemAllocator()
    tile = memory.allocate_tensor(Float16, cute.make_layout((64, 64), stride=(64, 1)), byte_alignment=128)
    full = memory.allocate_array(Int64, 1)
    if thread == 0:
        cute.arch.mbarrier_init(full, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    if warp == 0:
        flat = cute.group_modes(tile, 0, 2), cute.group_modes(x, 0, 2)
        target, source = cpasync.tma_partition(load, 0, cute.make_layout(1), *flat)
        with cute.arch.elect_one():
            size = cute.size_in_bytes(Float16, tile.layout) if const_expr(fixed) else cute.size(tile)
            cute.arch.mbarrier_arrive_and_expect_tx(full, size)
        cute.copy(load, source, target, tma_bar_ptr=full)
    cute.arch.mbarrier_wait(full, 0)
    for row in cutlass.range(64):
        out[row, thread] = tile[row, thread]


@example(BarrierMismatch, torch.ones(128), torch.zeros(128))
@cute.kernel
def one_stage_forgotten(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """An mbarrier without its init

    Two stages have a barrier each, and one of them is initialised.

    On a GPU the bits that happen to lie there are taken for a barrier. The offset tells which one it is: `full` begins
    at 0x400, behind the two stages, and a barrier has 8 bytes.

    Fix: initialise every stage.
    """
    thread, _, _ = cute.arch.thread_idx()
    memory = SmemAllocator()
    stages = memory.allocate_tensor(Float32, cute.make_layout((128, 2)), byte_alignment=128)
    full = memory.allocate_array(Int64, 2)
    if thread < (2 if fixed else 1):
        cute.arch.mbarrier_init(full + thread, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    load = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32)
    for n in cutlass.range_constexpr(2):
        if thread == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(full + n, 512)
            cute.copy(load, x, stages[None, n], mbar_ptr=full + n)
    for n in cutlass.range_constexpr(2):
        cute.arch.mbarrier_wait(full + n, 0)
    out[thread] = stages[thread, 0] + stages[thread, 1]


@example(BarrierMismatch, torch.ones(64), torch.zeros(64))
@cute.kernel
def two_counts(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """A named barrier used with two counts

    Two warps fill a tile and arrive; the two that read it count only themselves.

    With 64 threads the barrier is complete as soon as the readers are there, with 128 when the writers are, too. What
    a GPU does when both come is undefined. The message quotes who was there before, and where.

    Fix: everybody names the same number, that of all who arrive or wait.
    """
    thread, _, _ = cute.arch.thread_idx()
    tile = SmemAllocator().allocate_tensor(Float32, cute.make_layout(64))
    if thread < 64:
        tile[thread] = x[thread]
        cute.arch.barrier_arrive(barrier_id=1, number_of_threads=128)
    else:
        count = 128 if const_expr(fixed) else 64
        cute.arch.barrier(barrier_id=1, number_of_threads=count)
        out[thread - 64] = tile[127 - thread]
