"""Clusters, launches, and the emulator's own limits."""

import cutlass.cute as cute
import torch
from cutlass import Constexpr, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from cute_attn.emulator.errors import ExitedCta, InvalidLaunch, UnknownInstruction

from .example import example


@example(ExitedCta, torch.ones(128), torch.zeros(128), grid=2, cluster=(2, 1, 1))
@cute.kernel
def neighbour_has_left(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """The other CTA of the cluster has exited

    The first CTA of a cluster waits for a copy and then tells the second one that it is done. The second one has
    nothing more to do, and is gone.

    Shared memory of a CTA that has exited may belong to the next one. Consumers of a multicast that release a stage at
    the end of their loop make the same mistake. The finding depends on who is faster: where nobody has to wait, the
    emulator's fixed order lets all CTAs reach their end together, and some seeds do not.

    Fix: a barrier of the cluster before the end of the kernel.
    """
    thread, _, _ = cute.arch.thread_idx()
    memory = SmemAllocator()
    tile = memory.allocate_tensor(Float32, cute.make_layout(128), byte_alignment=128)
    full, done = memory.allocate_array(Int64, 1), memory.allocate_array(Int64, 1)
    if thread == 0:
        cute.arch.mbarrier_init(full, 1)
        cute.arch.mbarrier_init(done, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()
    if cute.arch.block_idx_in_cluster() == 0:
        if thread == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(full, 512)
            load = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32)
            cute.copy(load, x, tile, mbar_ptr=full)
        cute.arch.mbarrier_wait(full, 0)
        out[thread] = tile[thread]
        if thread == 0:
            cute.arch.mbarrier_arrive(done, peer_cta_rank_in_cluster=1)
    if const_expr(fixed):
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()


@example(InvalidLaunch, torch.ones(128), torch.zeros(128))
@cute.kernel
def too_many_stages(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """More shared memory than there is

    Eight stages of 32 KiB are 256 KiB; an H100 has 227 for one CTA.

    The limits are those of the architecture that the emulator pretends to be: `--arch`, or `arch=` of our own calls.
    Grids, blocks and clusters that do not fit the kernel or the hardware are of this class as well.

    Fix: fewer stages, counted from what the device has.
    """
    thread, _, _ = cute.arch.thread_idx()
    count = 7 if const_expr(fixed) else 8
    stages = SmemAllocator().allocate_tensor(Float32, cute.make_layout((8192, count)), byte_alignment=128)
    stages[thread, count - 1] = x[thread]
    out[thread] = stages[thread, count - 1]


@example(UnknownInstruction, torch.ones(32), torch.zeros(32), block=32)
@cute.kernel
def rare_instruction(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """An instruction that the emulator does not have

    Inline PTX uses an instruction that compilers never emit.

    This says something about the emulator and nothing about the kernel. It is raised when the instruction is reached,
    not when the program is loaded. An instruction that is known with other modifiers is unknown with these: none is
    ignored.

    Fix: a family in `cute_attn/emulator/isa/` that implements it; see "How it is built" in
    [emulator.md](emulator.md). Or other instructions.
    """
    thread, _, _ = cute.arch.thread_idx()
    if const_expr(fixed):
        distance = max(thread, 16) - min(thread, 16)
    else:
        ptx = "vabsdiff.s32.s32.s32 {$w0}, {$r0}, {$r1};"
        distance = cute.arch.inline_ptx(ptx, write_only_types=[Int32], read_only_args=[thread, Int32(16)])
    out[thread] = x[thread] * distance
