"""A kernel that moves tiles of a matrix by TMA, for tests of the emulator with the CuTe DSL's own tensor maps."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor


@dataclass(frozen=True)
class TmaCopyConfig:
    """dtype: of cutlass. rows, columns: of a tile. swizzle: of shared memory, in bytes (0: none).

    multicast: each tile goes to the two CTAs of a cluster. adds: `out` is increased by the tiles, not overwritten.
    waits: the load is waited for, as it must be.
    """

    dtype: str = "Float16"
    rows: int = 64
    columns: int = 64
    swizzle: int = 128
    multicast: bool = False
    adds: bool = False
    waits: bool = True


class TmaCopy:
    """x, read, out: [rows, columns], contiguous rows. CTA (i, j) copies tile (i, j) of x to `out` and to `read`.

    To `out` it goes back by TMA, to `read` by the threads, through the layout that the kernel says shared memory has.
    With `multicast`, CTA (i, 2 j) brings the tile of both.
    """

    threads = 128

    def __init__(self, config: TmaCopyConfig) -> None:
        self.config = config
        self.dtype = getattr(cutlass, config.dtype)
        self.tile = (config.rows, config.columns)
        self.tile_bytes = config.rows * config.columns * self.dtype.width // 8

    @staticmethod
    def can_implement(config: TmaCopyConfig) -> str | None:
        return None

    def fake_arguments(self) -> tuple:
        whole = 128 // self.dtype.width
        shape = (cute.sym_int(), cute.sym_int(divisibility=whole))
        x, read, out = (
            make_fake_tensor(self.dtype, shape, stride=(cute.sym_int64(divisibility=whole), 1), assumed_align=16)
            for _ in range(3)
        )
        return x, read, out, make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, x, read, out, stream):
        layout = cute.make_ordered_layout(self.tile, order=(1, 0))
        if cutlass.const_expr(self.config.swizzle):
            bits = self.config.swizzle.bit_length() - 5
            layout = cute.make_composed_layout(cute.make_swizzle(bits, 4, 3), 0, layout)
        multicast = self.config.multicast
        load = cpasync.CopyBulkTensorTileG2SMulticastOp() if multicast else cpasync.CopyBulkTensorTileG2SOp()
        if cutlass.const_expr(self.config.adds):
            store = cpasync.CopyReduceBulkTensorTileS2GOp()
        else:
            store = cpasync.CopyBulkTensorTileS2GOp()
        load_atom, x_coordinates = cpasync.make_tiled_tma_atom(load, x, layout, self.tile)
        store_atom, out_coordinates = cpasync.make_tiled_tma_atom(store, out, layout, self.tile)
        tiles = cute.ceil_div(x.shape, self.tile)
        self.kernel(load_atom, x_coordinates, store_atom, out_coordinates, read, layout).launch(
            grid=[tiles[0], tiles[1], 1],
            block=[self.threads, 1, 1],
            cluster=[1, 2 if multicast else 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        load_atom: cute.CopyAtom,
        x: cute.Tensor,
        store_atom: cute.CopyAtom,
        out: cute.Tensor,
        read: cute.Tensor,
        layout: cute.Layout | cute.ComposedLayout,
    ):
        thread, _, _ = cute.arch.thread_idx()
        row, column, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        source = column
        if cutlass.const_expr(self.config.multicast):
            source = column // 2 * 2
        memory = cutlass.memory.SmemAllocator()
        start = memory.allocate_array(self.dtype, self.config.rows * self.config.columns, byte_alignment=1024)
        barrier = memory.allocate_array(cutlass.Int64, 1)
        if cutlass.const_expr(self.config.swizzle):
            tile = cute.make_tensor(cute.recast_ptr(start, layout.inner), layout.outer)
        else:
            tile = cute.make_tensor(start, layout)

        if warp == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_init(barrier, 1)
        cute.arch.mbarrier_init_fence()
        self.sync_ctas()
        if warp == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(barrier, self.tile_bytes)
        self.sync_ctas()
        if warp == 0:
            self.load(load_atom, x, tile, barrier, row, source, column)
        if cutlass.const_expr(self.config.waits):
            cute.arch.mbarrier_wait(barrier, 0)

        mine = cute.local_tile(read, self.tile, (row, column))
        for i in cutlass.range(thread, self.config.rows * self.config.columns, self.threads):
            at = (i // self.config.columns, i % self.config.columns)
            place = (row * self.config.rows + at[0], column * self.config.columns + at[1])
            if place[0] < read.shape[0] and place[1] < read.shape[1]:
                mine[at] = tile[at]
        if warp == 0:
            shared, tiles = self.partition(store_atom, out, tile)
            cute.copy(store_atom, shared, tiles[None, row, column])
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)
        self.sync_ctas()

    @cute.jit
    def load(self, atom, x, tile, barrier, row, source, column):
        shared, tiles = self.partition(atom, x, tile)
        if cutlass.const_expr(self.config.multicast):
            if column % 2 == 0:
                both = cutlass.Int16(3)
                cute.copy(atom, tiles[None, row, source], shared, tma_bar_ptr=barrier, mcast_mask=both)
        else:
            cute.copy(atom, tiles[None, row, source], shared, tma_bar_ptr=barrier)

    def partition(self, atom, tensor, tile):
        """(the tile in shared memory, the tiles of the tensor) as the atom wants them."""
        tiles = cute.group_modes(cute.local_tile(tensor, self.tile, (None, None)), 0, 2)
        return cpasync.tma_partition(atom, 0, cute.make_layout(1), cute.group_modes(tile, 0, 2), tiles)

    def sync_ctas(self):
        if self.config.multicast:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.barrier()
