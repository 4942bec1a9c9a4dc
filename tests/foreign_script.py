"""A CuTe DSL program as people write them for a GPU they own; `test_foreign_command` runs it without one.

Imports nothing of cute_attn. Prints PASS, and takes the faults it is to have as arguments.
"""

from __future__ import annotations

import argparse

import cutlass
import cutlass.cute as cute
import cutlass.torch as cutlass_torch
import torch
from cuda.bindings import driver
from cutlass import Float32
from cutlass.cute.runtime import from_dlpack, make_ptr
from cutlass.utils import HardwareInfo

THREADS = 64


@cute.kernel
def add_kernel(x: cute.Tensor, y: cute.Tensor, out: cute.Tensor, overrun: cutlass.Constexpr):
    """out = x + y + 1000 · the CTA's rank in its cluster; [rows, columns], a row per CTA."""
    thread, _, _ = cute.arch.thread_idx()
    row, _, _ = cute.arch.block_idx()
    rank = cute.arch.block_idx_in_cluster()
    for column in cutlass.range(thread, x.shape[1] + overrun, THREADS):
        out[row, column] = x[row, column] + y[row, column] + Float32(1000 * rank)


@cute.jit
def add(x: cute.Tensor, y: cute.Tensor, out: cute.Tensor, overrun: cutlass.Constexpr, stream: driver.CUstream):
    add_kernel(x, y, out, overrun).launch(
        grid=[x.shape[0], 1, 1], block=[THREADS, 1, 1], cluster=[2, 1, 1], stream=stream
    )


@cute.kernel
def persistent_kernel(x: cute.Pointer, count: cutlass.Int32):
    """Adds 1 to `count` numbers behind a pointer, CTA i to every (grid size)-th from the i-th on."""
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    numbers = cute.make_tensor(x, cute.make_layout(count))
    for i in cutlass.range(cta, count, ctas):
        if thread == 0:
            numbers[i] = numbers[i] + Float32(1)


@cute.jit
def persistent(x: cute.Pointer, count: cutlass.Int32, clusters: cutlass.Constexpr, stream: driver.CUstream):
    persistent_kernel(x, count).launch(grid=[clusters, 1, 1], block=[32, 1, 1], stream=stream)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--overrun", type=int, default=0)
    parser.add_argument("--swallow", action="store_true", help="go on after an exception")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise RuntimeError("this program needs a GPU")
    cutlass.cuda.initialize_cuda_context()
    print("device", torch.cuda.get_device_capability(), torch.cuda.get_device_properties("cuda").multi_processor_count)
    stream = cutlass_torch.current_stream()

    generator = torch.Generator(device="cuda").manual_seed(0)
    x, y = (torch.randn(4, 100, device="cuda", generator=generator) for _ in range(2))
    assert x.is_cuda and x.device == torch.device("cuda:0")
    before = x.cpu()
    product = torch.mm(x.bfloat16(), y.bfloat16().T, out_dtype=torch.float32)
    torch.testing.assert_close(product, x.bfloat16().float() @ y.bfloat16().float().T)
    out = torch.full_like(x, torch.nan)
    host = out.to("cpu")
    arguments = [from_dlpack(t).mark_layout_dynamic() for t in (x, y, out)]
    compiled = cute.compile(add, *arguments, options.overrun, stream)
    try:
        compiled(*arguments, stream)
    except Exception as error:
        if not options.swallow:
            raise
        print("went on after", type(error).__name__)
        return
    torch.cuda.synchronize()
    assert host.isnan().all(), "a host copy that was made before the launch has changed"
    rank = torch.arange(4, device="cuda")[:, None] % 2
    torch.testing.assert_close(out, x + y + 1000 * rank)

    # Nothing but an address is passed: the tensor it belongs to is found by it.
    clusters = HardwareInfo().get_max_active_clusters(1)
    pointer = make_ptr(Float32, x.data_ptr(), cute.AddressSpace.gmem, assumed_align=16)
    persistent(pointer, x.numel(), clusters, stream)
    torch.testing.assert_close(x.cpu(), before + 1)
    print("PASS")


if __name__ == "__main__":
    main()
