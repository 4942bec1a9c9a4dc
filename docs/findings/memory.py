"""Addresses, and what nobody has written."""

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Constexpr, Float32, const_expr
from cutlass.memory import SmemAllocator

from cute_attn.emulator.errors import Misaligned, OutOfBounds, UninitializedRegister, UninitializedShared

from .example import example


@example(OutOfBounds, torch.ones(200), torch.zeros(200), grid=2)
@cute.kernel
def unguarded_tail(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """A tail without a guard

    200 elements are doubled by two CTAs of 128 threads. The last 56 threads have none, and nothing keeps them from
    reading one.

    On a GPU this passes most of the time: the memory behind a tensor usually belongs to the same allocation. On the
    emulator exactly the tensors that were passed in may be touched. The message says how far the access is from the
    nearest of them, which here is also how many elements too many there are, and gives the first offending thread.

    Fix: a guard, or a predicate on the copy.
    """
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    i = 128 * cta + thread
    if const_expr(fixed):
        if i < x.shape[0]:
            out[i] = 2 * x[i]
    else:
        out[i] = 2 * x[i]


@example(OutOfBounds, torch.ones(130), torch.zeros(128))
@cute.kernel
def no_room_for_the_halo(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """A tile of shared memory that is too small

    128 sums of three neighbours need 130 elements, but shared memory has room for 128.

    Only what lies outside of the CTA's whole shared memory is a finding. Had another tensor been allocated behind
    the tile, its first elements would have been overwritten instead: look for a `DataRace` or for wrong values then.

    Fix: allocate what is stored.
    """
    thread, _, _ = cute.arch.thread_idx()
    tile = SmemAllocator().allocate_tensor(Float32, cute.make_layout(130 if fixed else 128))
    for i in cutlass.range(thread, 130, 128):
        tile[i] = x[i]
    cute.arch.sync_threads()
    out[thread] = tile[thread] + tile[thread + 1] + tile[thread + 2]


@example(Misaligned, torch.ones(516), torch.zeros(512))
@cute.kernel
def broken_promise(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """A promise about alignment that does not hold

    The kernel starts one element into `x` and promises that the address is a multiple of 16 bytes. The compiler
    believes it and loads four elements at once.

    `assumed_align` of `from_dlpack` and `make_ptr`, and `divisibility` of a stride, are such promises; a kernel that
    was compiled with them is wrong for views that start elsewhere.

    Fix: promise what holds for every caller, or check it on the host.
    """
    thread, _, _ = cute.arch.thread_idx()
    shift = 4 if fixed else 1
    start = cute.make_ptr(Float32, (x.iterator + shift).toint(), cute.AddressSpace.gmem, assumed_align=16)
    quads = cute.make_layout((128, 4), stride=(4, 1))
    values = cute.make_tensor(start, quads)[thread, None].load()
    cute.make_tensor(out.iterator, quads)[thread, None].store(values)


@example(UninitializedShared, torch.ones(100), torch.zeros(128))
@cute.kernel
def half_filled(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """A tile that is filled in part

    100 elements are put into a tile of 128, and all 128 are read.

    What stands there on a GPU is what the last kernel left, often zeros, and then the results are right. Shared
    memory on the emulator starts as NaN, and reading it is a finding. A kernel that loads rows which it never uses
    can be run with `uninitialized_shared="poison"`: the reads then give NaN, which shows if they are used after all.

    Fix: write zeros to the rest, as `cp.async` and TMA do beyond the end of a tensor.
    """
    thread, _, _ = cute.arch.thread_idx()
    tile = SmemAllocator().allocate_tensor(Float32, cute.make_layout(128))
    if thread < x.shape[0]:
        tile[thread] = x[thread]
    elif const_expr(fixed):
        tile[thread] = Float32(0)
    cute.arch.sync_threads()
    out[thread] = tile[127 - thread]


@example(UninitializedRegister, torch.ones(100), torch.zeros(128))
@cute.kernel
def undefined_rest(x: cute.Tensor, out: cute.Tensor, fixed: Constexpr):
    """A fragment that some threads never write

    Threads 100 to 127 store a register fragment into which they have loaded nothing.

    Reading such a register is no finding: compilers do it where the value does not matter. What is reported is that
    one decides something, here what is stored. The register is named as in the PTX, where it may have been copied a
    few times since; the source line is that of the use.

    Fix: fill the fragment before the predicated load.
    """
    thread, _, _ = cute.arch.thread_idx()
    value = cute.make_rmem_tensor(1, Float32)
    if const_expr(fixed):
        value.fill(0)
    if thread < x.shape[0]:
        value[0] = x[thread]
    out[thread] = value[0]
