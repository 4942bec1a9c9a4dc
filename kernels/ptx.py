"""The only inline PTX of the attention kernels: what the DSL lacks or compiles into more than the hardware needs.

Every function is pure unless it says otherwise: the compiler may move, merge or drop it like an addition.
"""

from __future__ import annotations

from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

__all__ = [
    "any_greater",
    "ceil_to_int",
    "cp_async_zfill",
    "exp2_on_fma",
    "log_linear_e4m3",
    "log_linear_e4m3_of_integers",
    "mma_int4",
    "multiply_f16x2",
    "opaque",
    "pack_bf16x2",
    "pack_bytes_e4m3",
    "pack_bytes_f16",
    "pack_f16x2",
    "shift_right",
    "take_ticket",
    "unpack_bf16x2",
    "unpack_f16x2",
]


@dsl_user_op  # gives ``loc``, the source line, which line information and the emulator's findings then name
def _asm(
    result: Any, text: str, operands: list[Any], constraints: str, *, side_effects: bool = False, loc: Any = None,
    ip: Any = None,
) -> Any:  # fmt: skip
    values = [operand.ir_value(loc=loc, ip=ip) for operand in operands]
    return llvm.inline_asm(
        result, values, text, constraints, has_side_effects=side_effects, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip


def cp_async_zfill(destination: cute.Pointer, source: cute.Pointer, valid_bytes: Int32) -> None:
    """Copy 16 bytes to shared memory asynchronously, of which only the first ``valid_bytes`` are read; the rest is 0.

    The DSL's cp.async atom cannot be given a source size: rows beyond the end would need a second, ordinary store.
    """
    _asm(
        None,
        "cp.async.cg.shared.global [$0], [$1], 16, $2;",
        [destination.toint(), source.toint(), valid_bytes],
        "r,l,r,~{memory}",
        side_effects=True,
    )


def exp2_on_fma(y: Float32, factor: Float32, bias: Float32) -> Float32:
    """2^(256·(y·factor + bias) - 120), its power being from -120 to 136, without the MUFU: within 0.18 %.

    The saturating FFMA is scale, offset and the clamp of small powers at once. One that rounds down splits off the
    whole part n: 2^23 + 392 + 120 + n, whose low bits become the exponent. 2^f of the fraction f is a polynomial of
    degree 2, minimax for the relative error. 7 instructions for 2; NaN becomes 2^-120.
    """
    text = (
        "{.reg .f32 u, n, r, f, p; .reg .b32 i, j; "
        "fma.rn.sat.ftz.f32 u, $1, $2, $3; "
        "fma.rm.ftz.f32 n, u, 0f43800000, 0f4B000188; "
        "sub.rn.ftz.f32 r, 0f4B000188, n; "
        "fma.rn.ftz.f32 f, u, 0f43800000, r; "
        "fma.rn.ftz.f32 p, f, 0f3EACA41A, 0f3F285ADB; "
        "fma.rn.ftz.f32 p, p, f, 0f3F803884; "
        "mov.b32 i, n; shl.b32 i, i, 23; mov.b32 j, p; add.s32 j, j, i; mov.b32 $0, j;}"
    )
    return Float32(_asm(T.f32(), text, [y, factor, bias], "=f,f,f,f"))


def mma_int4(accumulator: list[Int32], a: list[Int32], b: list[Int32]) -> list[Int32]:
    """mma.sync.m16n8k64 of signed 4-bit integers: ``accumulator`` (four registers) + a·b, one IMMA.16864.

    The DSL's compiler refuses the atom. Fragments are byte for byte those of `atoms.MmaInt8Op`, two elements a byte,
    the lower one first. The sum is tied to the accumulator's registers, as the atom does: ptxas keeps it in place.
    """
    text = (
        "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$0, $1, $2, $3};"
    )
    four = llvm.StructType.get_literal([T.i32()] * 4)
    result = _asm(four, text, [*a, *b, *accumulator], "=r,=r,=r,=r,r,r,r,r,r,r,0,1,2,3")
    return [Int32(llvm.extractvalue(T.i32(), result, [i])) for i in range(4)]


def any_greater(values: list[Float32], limits: list[Float32]) -> Int32:
    """1 if in any lane of the warp some values[i] > limits[i], else 0. Has side effects: a warp-wide vote.

    One FSETP per pair, each or-ing into one predicate: the DSL's `or` of Booleans goes through PLOP3 or registers.
    """
    n = len(values)
    compare = f"setp.gt.f32 p, $1, ${1 + n}; "
    compare += "".join(f"setp.gt.or.f32 p, ${1 + i}, ${1 + n + i}, p; " for i in range(1, n))
    text = "{.reg .pred p; " + compare + "vote.sync.any.pred p, p, -1; selp.b32 $0, 1, 0, p;}"
    constraints = ",".join(["=r", *["f"] * (2 * n), "~{memory}"])
    return Int32(_asm(T.i32(), text, [*values, *limits], constraints, side_effects=True))


def pack_bytes_f16(p: list[Float32]) -> Int32:
    """Four float32 in 0…255 rounded to integers, as the bytes of one register, p[0] lowest.

    f16(p) + 1024 has the integer in its low byte, because f16 counts in ones between 1024 and 2047: two F2FP, two
    HADD2, one PRMT for four values, where F2I costs a quarter-rate XU slot each. Written as PTX so that the register
    holding 1024 twice stays one immediate operand and PRMT takes both halves at once.
    """
    text = (
        "{.reg .b32 a, b; "
        "cvt.rn.f16x2.f32 a, $2, $1; add.rn.f16x2 a, a, $5; "
        "cvt.rn.f16x2.f32 b, $4, $3; add.rn.f16x2 b, b, $5; "
        "prmt.b32 $0, a, b, 0x6420;}"
    )
    return Int32(_asm(T.i32(), text, [*p, Int32(0x64006400)], "=r,f,f,f,f,r"))


def pack_bytes_e4m3(p: list[Float32]) -> Int32:
    """Four float32 rounded to E4M3, at most 448, as the bytes of one register, p[0] lowest: two F2FP."""
    text = (
        "{.reg .b16 a, b; "
        "cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; "
        "mov.b32 $0, {a, b};}"
    )
    return Int32(_asm(T.i32(), text, p, "=r,f,f,f,f"))


def log_linear_e4m3(y: list[Float32], factor: Float32, offset: Float32) -> Int32:
    """Four bytes round(128·(y·factor + offset)), y[0]'s lowest; y·factor + offset, below 255/256, is clamped at 0.

    The saturating FFMA clamps (NaN, too, becomes 0), the next rounds: in the last place of 2^23 … 2^24 float32 counts
    in ones. Three PRMT gather the low bytes.
    """
    text = "{.reg .f32 x; .reg .b32 i, j, k, l; "
    for place, name in enumerate("ijkl"):
        text += f"fma.rn.sat.ftz.f32 x, ${1 + place}, $5, $6; "
        text += f"fma.rn.ftz.f32 x, x, 0f43000000, 0f4B000000; mov.b32 {name}, x; "
    text += "prmt.b32 i, i, j, 0x40; prmt.b32 k, k, l, 0x40; prmt.b32 $0, i, k, 0x5410;}"
    return Int32(_asm(T.i32(), text, [*y, factor, offset], "=r,f,f,f,f,f,f"))


def log_linear_e4m3_of_integers(y: list[Int32], factor: Int32, offset: Int32, limit: Int32) -> Int32:
    """Four bytes, the highest ones of min(max(y + offset, 0), limit)·factor, y[0]'s lowest.

    VIADDMNMX adds and clamps on both sides, IMAD, three PRMT: no conversion.
    """
    text = "{.reg .b32 i, j, k, l; "
    for place, name in enumerate("ijkl"):
        text += f"add.s32 {name}, ${1 + place}, $6; min.relu.s32 {name}, {name}, $7; mul.lo.s32 {name}, {name}, $5; "
    text += "prmt.b32 i, i, j, 0x73; prmt.b32 k, k, l, 0x73; prmt.b32 $0, i, k, 0x5410;}"
    return Int32(_asm(T.i32(), text, [*y, factor, offset, limit], "=r,r,r,r,r,r,r,r"))


def ceil_to_int(x: Float32) -> Int32:
    """The next larger integer, saturating; of NaN 0. The DSL converts by truncation only."""
    return Int32(_asm(T.i32(), "cvt.rpi.ftz.s32.f32 $0, $1;", [x], "=r,f"))


def pack_f16x2(low: Float32, high: Float32) -> Int32:
    """Two float32 rounded to float16 in one register, one F2FP. The DSL converts one by one and then joins them."""
    return Int32(_asm(T.i32(), "cvt.rn.f16x2.f32 $0, $2, $1;", [low, high], "=r,f,f"))


def pack_bf16x2(low: Float32, high: Float32) -> Int32:
    """The same in bfloat16."""
    return Int32(_asm(T.i32(), "cvt.rn.bf16x2.f32 $0, $2, $1;", [low, high], "=r,f,f"))


def unpack_f16x2(packed: Int32) -> list[Float32]:
    """The two float16 of one register as float32, lower one first: two HADD2.F32."""
    text = "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}"
    two = _asm(llvm.StructType.get_literal([T.f32()] * 2), text, [packed], "=f,=f,r")
    return [Float32(llvm.extractvalue(T.f32(), two, [i])) for i in range(2)]


def unpack_bf16x2(packed: Int32) -> list[Float32]:
    """The same of bfloat16: a shift and a mask."""
    return [(packed << 16).bitcast(Float32), (packed & Int32(-65536)).bitcast(Float32)]


def multiply_f16x2(a: Int32, b: Int32) -> Int32:
    """Two float16 products, one HMUL2, of float16 accumulators as the registers that the MMA leaves them in."""
    return Int32(_asm(T.i32(), "mul.rn.f16x2 $0, $1, $2;", [a, b], "=r,r,r"))


def opaque(value: Int32) -> Int32:
    """The same value, as one that LLVM has not seen: what follows from it is computed again, and not kept. Free."""
    return Int32(_asm(T.i32(), "mov.b32 $0, $1;", [value], "=r,r", side_effects=True))


def shift_right(value: Int32, count: Int32) -> Int32:
    """Arithmetic shift: SHF with PTX's clamping of the count, where the DSL's >> adds instructions for it."""
    return Int32(_asm(T.i32(), "shr.s32 $0, $1, $2;", [value, count], "=r,r,r"))


def take_ticket(counter: cute.Pointer, count: Int32) -> Int32:
    """A number that no other thread of the launch gets (in global memory): 0, 1 …; after the ``count``-th 0 again.

    An atom.inc, which the DSL lacks: it wraps, so that the counter is ready for the next launch. Not pure.
    """
    operands = [counter.toint(), count - 1]
    return Int32(_asm(T.i32(), "atom.relaxed.gpu.global.inc.u32 $0, [$1], $2;", operands, "=r,l,r", side_effects=True))
