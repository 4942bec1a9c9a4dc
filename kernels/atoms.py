"""Warp-level MMA and copy atoms of the sm_80 family that attention kernels are built from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass._mlir.dialects.cute_nvgpu as cute_nvgpu_ir
import cutlass.cute as cute
from cutlass import Float8E4M3FN, Int8, Uint8
from cutlass.cute.atom import Trait, make_atom
from cutlass.cute.core import _pack_shape
from cutlass.cute.nvgpu import LoadCacheMode, cpasync, warp
from cutlass.cute.nvgpu.warp.mma import WarpMmaOp
from cutlass.cutlass_dsl import BaseDSL, T

__all__ = ["MmaInt8Op", "cp_async_atom", "ldmatrix_atom", "mma_float_op", "mma_in_place"]


class MmaInt8Trait(Trait):
    """Trait of `MmaInt8Op`."""


@dataclass(frozen=True)
class MmaInt8Op(WarpMmaOp):
    """mma.sync.m16n8k32 with 8-bit integer operands and an int32 accumulator.

    The DSL has no public operation for it, but its compiler knows the atom; it becomes the same IMMA.16832 as inline
    PTX does. A [16, 32] row-major is s8, or u8 if `a_unsigned`; B [8, 32] is s8, K-major; C and D [16, 8] are s32.

    Fragments (lane = 4·g + t):
        A: byte j of register r is row g + 8·(r&1), column 16·(r>>1) + 4·t + j
        B: byte j of register r is column (n) g, row (k) 16·r + 4·t + j
        C: register r is row g + 8·(r>>1), column 2·t + (r&1)
    """

    a_unsigned: bool = False

    @property
    def a_dtype(self) -> Any:
        return Uint8 if self.a_unsigned else Int8

    def _make_trait(self, *, loc: Any = None, ip: Any = None, **kwargs: Any) -> MmaInt8Trait:
        shape = _pack_shape((16, 8, 32), loc=loc, ip=ip)
        a_type = T.ui8() if self.a_unsigned else T.si8()
        atom_type = cute_nvgpu_ir.MmaAtomSM80Type.get(shape.type.attribute, a_type, T.si8(), T.si32())
        return MmaInt8Trait(make_atom(atom_type, loc=loc, ip=ip))

    def _verify_fragment_A(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def _verify_fragment_B(self, *args: Any, **kwargs: Any) -> bool:
        return True


def mma_float_op(operands: Any, accumulator: Any) -> Any:
    """mma.sync of two float operands: m16n8k16 of 16 bits, or m16n8k32 of E4M3 (sm_89, sm_120).

    Accumulated in float32 or, of float16 and E4M3, in float16. Ada's tensor cores keep 13 bits of fraction in a float32
    accumulator of E4M3 products (SageAttention2, arXiv 2411.10958, section 3.2).

    Fragments (lane = 4·g + t): of E4M3 those of `MmaInt8Op`; of 16 bits the same with two elements a register, A's
    columns and B's rows (k) being 8·(r>>1) + 2·t + j and 8·r + 2·t + j. A float16 accumulator has columns 2·t and
    2·t + 1 in one register.
    """
    if operands is Float8E4M3FN:
        return warp.MmaFP8Op(operands, accumulator, (16, 8, 32))
    return warp.MmaF16BF16Op(operands, accumulator, (16, 8, 16))


def ldmatrix_atom(element: Any = Int8, *, transpose: bool = False) -> cute.CopyAtom:
    """ldmatrix.x4: lane l gives the address of row l%8 (16 bytes) of matrix l//8; matrix i arrives in register i."""
    return cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transpose=transpose, num_matrices=4), element)


def cp_async_atom() -> cute.CopyAtom:
    """cp.async.cg of 16 bytes: through L2 only, because a KV tile is read once by a CTA."""
    return cute.make_copy_atom(cpasync.CopyG2SOp(cache_mode=LoadCacheMode.GLOBAL), Uint8, num_bits_per_copy=128)


def mma_in_place(atom: cute.MmaAtom, accumulator: cute.Tensor, a: cute.Tensor, b: cute.Tensor) -> None:
    """accumulator += a·b of one atom, for accumulators that live across a main loop.

    The atom reads and writes its accumulator as one vector. For sm_100 and later, which have instructions on pairs of
    float32, LLVM then carries the accumulators as 64-bit pairs through the loop, at the price of 128 MOV per KV tile
    and of spills. Copying element by element to a temporary and back costs no instruction and keeps it from that.
    Elsewhere the vectors do no harm, and ptxas finds an allocation without spills for every loop only with them.
    """
    if BaseDSL._get_dsl().get_arch_enum().major < 10:
        cute.mma_atom_call(atom, accumulator, a, b, accumulator)
        return
    fragment = cute.make_rmem_tensor(accumulator.shape, accumulator.element_type)
    for i in range(cute.size(accumulator)):
        fragment[i] = accumulator[i]
    cute.mma_atom_call(atom, fragment, a, b, fragment)
    for i in range(cute.size(accumulator)):
        accumulator[i] = fragment[i]
