"""Kernels of one warpgroup around wgmma: operands in the canonical layouts of CuTe and the fragments of the PTX ISA.

All elements are small integers, so that every sum is exact and results can be compared for equality.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .harness import run

RNG = np.random.default_rng(3)
THREADS = 128

# ---- elements and layouts


def encode(values: np.ndarray, element: str) -> np.ndarray:
    """Integers of magnitude <= 4 -> their codes."""
    if element == "f16":
        return values.astype(np.float16).view(np.uint16)
    if element in ("bf16", "tf32"):
        words = values.astype(np.float32).view(np.uint32)
        return (words >> 16).astype(np.uint16) if element == "bf16" else words
    if element in ("s8", "u8"):
        return values.astype(np.int8).view(np.uint8)
    mantissa, bias = {"e4m3": (3, 7), "e5m2": (2, 15)}[element]
    magnitude = np.abs(values)
    exponent = np.where(magnitude == 0, 0, np.floor(np.log2(np.maximum(magnitude, 1)))).astype(int)
    fraction = (magnitude / 2.0**exponent - 1) * 2**mantissa
    code = np.where(magnitude == 0, 0, ((exponent + bias) << mantissa) + fraction.astype(int))
    return (code | np.where(values < 0, 128, 0)).astype(np.uint8)


def integers(element: str, *shape: int) -> np.ndarray:
    return RNG.integers(0 if element == "u8" else -4, 5, shape)


@dataclass
class Operand:
    """A matrix [rows, k] in shared memory: its image and the descriptor of every instruction along k."""

    image: np.ndarray
    descriptors: list[int]


def operand(values: np.ndarray, element: str, swizzle: int = 128, mn_major: bool = False, start: int = 0) -> Operand:
    """CuTe: `Swizzle<b, 4, 3>` of `tile_to_shape(GMMA::Layout_{K,MN}_{INTER,SW32,SW64,SW128}_Atom, (rows, k))`.

    An atom is eight lines of 16, 32, 64 or 128 bytes; atoms follow each other along the rows first.
    """
    rows, k = values.shape
    codes = encode(values, element)
    size = codes.itemsize
    line = max(swizzle, 16)  # bytes of one line of an atom, of which it has eight
    r, c = np.meshgrid(np.arange(rows), np.arange(k), indexing="ij")
    if mn_major:
        contiguous, other = r, c
    else:
        contiguous, other = c, r
    along = line // size
    inside = contiguous % along * size + other % 8 * line
    if mn_major:
        major_stride, minor_stride = 8 * line, 8 * line * -(-rows // along)
    else:
        major_stride, minor_stride = 8 * line * (rows // 8), 8 * line
    address = start + inside + contiguous // along * major_stride + other // 8 * minor_stride
    bits = {0: 0, 32: 1, 64: 2, 128: 3}[swizzle]
    address ^= (address >> 3) & (((1 << bits) - 1) << 4)
    image = np.zeros(-(-(int(address.max()) + size) // 2048) * 2048, np.uint8)
    flat = address.reshape(-1)
    for byte in range(size):
        image[flat + byte] = codes.reshape(-1).view(np.uint8)[byte::size]
    step = 32 // size
    descriptors = []
    for first in range(0, k, step):
        if mn_major:
            offset = first // 8 * minor_stride
            leading, stride = (major_stride, minor_stride) if swizzle else (minor_stride, major_stride)
        else:
            offset = first // along * major_stride + first % along * size
            leading, stride = (major_stride if swizzle == 0 else 16), minor_stride
        mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
        descriptors.append((start + offset) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62)
    return Operand(image, descriptors)


def accumulator_place(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of accumulator element i of thread t, [n / 2, 128] each: the PTX ISA's formulas."""
    i, thread = np.meshgrid(np.arange(n // 2), np.arange(THREADS), indexing="ij")
    row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
    return row, i // 4 * 8 + thread % 4 * 2 + i % 2


def fragment(values: np.ndarray, element: str) -> np.ndarray:
    """A [64, k of one instruction] in registers, uint32 [4, 128]."""
    codes = encode(values, element)
    per_register = 4 // codes.itemsize
    result = np.zeros((4, THREADS), np.uint32)
    for thread in range(THREADS):
        for register in range(4):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (register & 1)
            first = thread % 4 * per_register + (register >> 1) * 4 * per_register
            result[register, thread] = codes[row, first : first + per_register].view(np.uint32)[0]
    return result


# ---- programs

K = {"f16": 16, "bf16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32, "s8": 32, "u8": 32}


def vector(prefix: str, count: int) -> str:
    return "{" + ", ".join(f"%{prefix}{i}" for i in range(count)) + "}"


@dataclass
class Program:
    """A kernel of one warpgroup on images in shared memory. `%a<4s..>`: A of step s; `%d`: the accumulator.

    %desc_a<s> and %desc_b<s> are the descriptors. `{wgmma s}` in the body stands for instruction s.
    """

    body: str
    a: str
    b: str
    accumulator: str
    n: int
    left: Operand | list[np.ndarray]
    right: Operand
    options: str
    start: np.ndarray | None = None
    opcode: str = ""
    threads: int = THREADS
    scale: str = "1"
    declarations: str = ""
    extra_shared: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def registers(self) -> int:
        return self.n // 4 if self.accumulator == "f16" else self.n // 2

    @property
    def steps(self) -> int:
        return len(self.right.descriptors)

    def run(self, grid: int = 1) -> np.ndarray:
        """D, [64, n]; with several CTAs [grid, 64, n]."""
        registers = self.registers
        in_registers = isinstance(self.left, list)
        left_image = np.zeros(0, np.uint8) if in_registers else self.left.image
        image = np.concatenate([left_image, self.right.image])
        shift = left_image.size >> 4
        descriptors = [0] * self.steps if in_registers else list(self.left.descriptors)
        descriptors += [bits + shift for bits in self.right.descriptors]
        fragments = np.concatenate(self.left) if in_registers else np.zeros((4, THREADS), np.uint32)
        start = np.zeros((registers, THREADS), np.uint32) if self.start is None else self.start
        out = np.full((grid, registers, THREADS), 0xDEADBEEF, np.uint32)
        opcode = self.opcode or f"m64n{self.n}k{K[self.a]}.{self.accumulator}.{self.a}.{self.b}"

        def instruction(match: re.Match[str]) -> str:
            s = int(match[1])
            left = "{" + ", ".join(f"%a{4 * s + r}" for r in range(4)) + "}" if in_registers else f"%desc_a{s}"
            d = vector("d", registers)
            tail = f"{match[2] or self.scale}{self.options}"
            return f"wgmma.mma_async.sync.aligned.{opcode} {d}, {left}, %desc_b{s}, {tail};"

        lines = [
            f"mad.wide.u32 %rd20, %r50, 16, %rd0; ld.global.v4.b32 {{%r30, %r31, %r32, %r33}}, [%rd20+{chunk}];"
            f"mad.lo.u32 %r34, %r50, 16, %shared; st.shared.v4.b32 [%r34+{chunk}], {{%r30, %r31, %r32, %r33}};"
            for chunk in range(0, image.size, 16 * THREADS)
        ]
        lines += [f"ld.global.b64 %desc_a{s}, [%rd1+{8 * s}];" for s in range(self.steps)]
        lines += [f"ld.global.b64 %desc_b{s}, [%rd1+{8 * (self.steps + s)}];" for s in range(self.steps)]
        lines.append("mad.wide.u32 %rd21, %r50, 4, %rd2; mad.wide.u32 %rd22, %r50, 4, %rd3;")
        lines += [f"ld.global.b32 %a{r}, [%rd21+{512 * r}];" for r in range(len(fragments))]
        lines += [f"ld.global.b32 %d{r}, [%rd22+{512 * r}];" for r in range(registers)]
        copy = "mov.u32 %shared, dynamic; setp.ge.u32 %p19, %r50, 128; @%p19 bra LOADED;\n" + "\n".join(lines)
        store = (
            "@%p19 bra END; mov.u32 %r35, %ctaid.x; mad.wide.u32 %rd23, %r50, 4, %rd4;"
            f"mad.wide.u32 %rd23, %r35, {512 * registers}, %rd23;"
        )
        store += "\n".join(f"st.global.b32 [%rd23+{512 * r}], %d{r};" for r in range(registers))
        body = re.sub(r"\{wgmma (\d+)(?: ([!%\w]+))?\}", instruction, self.body)
        run(
            f"{copy}\nLOADED: bar.sync 0; fence.proxy.async.shared::cta;\n{body}\n{store}\nEND:",
            {
                "image": image,
                "descriptors": np.array(descriptors, np.uint64),
                "fragments": fragments,
                "start": start,
                "out": out,
            },
            grid=(grid, 1, 1),
            block=(self.threads, 1, 1),
            shared=image.size + self.extra_shared,
            target="sm_90a",
            declarations=f".reg .b32 %a<{len(fragments)}>; .reg .b32 %d<{registers}>; .reg .b32 %shared;"
            f".reg .b64 %desc_a<{self.steps}>; .reg .b64 %desc_b<{self.steps}>; {self.declarations}",
            **self.settings,
        )
        results = np.stack([self._matrix(part) for part in out])
        return results[0] if grid == 1 else results

    def _matrix(self, registers: np.ndarray) -> np.ndarray:
        row, column = accumulator_place(self.n)
        result = np.zeros((64, self.n))
        if self.accumulator == "f16":
            halves = np.ascontiguousarray(registers).view(np.float16).reshape(self.n // 4, THREADS, 2)
            values = halves.transpose(0, 2, 1).reshape(self.n // 2, THREADS)
        else:
            values = registers.view(np.float32 if self.accumulator == "f32" else np.int32)
        result[row, column] = values
        return result


def start_registers(matrix: np.ndarray, accumulator: str) -> np.ndarray:
    """C as accumulator registers."""
    row, column = accumulator_place(matrix.shape[1])
    values = matrix[row, column]
    if accumulator == "f16":
        halves = values.astype(np.float16).reshape(-1, 2, THREADS).transpose(0, 2, 1)
        return np.ascontiguousarray(halves).view(np.uint32).reshape(-1, THREADS)
    return values.astype(np.float32 if accumulator == "f32" else np.int32).view(np.uint32)


ALL_STEPS = "wgmma.fence.sync.aligned;\n{steps}\nwgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
SIGNS, MAJORS = ", 1, 1", ", 0, 0"


def program(
    a: np.ndarray,
    b: np.ndarray,
    types: tuple[str, str, str] = ("bf16", "bf16", "f32"),
    *,
    swizzle: tuple[int, int] = (128, 128),
    mn_major: tuple[bool, bool] = (False, False),
    registers: bool = False,
    body: str = ALL_STEPS,
    signs: str = SIGNS,
    **rest: Any,
) -> Program:
    """The sum of a [64, k] and b [n, k] over all instructions along k."""
    left: Operand | list[np.ndarray]
    step = K[types[0]]
    if registers:
        left = [fragment(a[:, k : k + step], types[0]) for k in range(0, a.shape[1], step)]
    else:
        left = operand(a, types[0], swizzle[0], mn_major[0])
    right = operand(b, types[1], swizzle[1], mn_major[1])
    majors = f", {int(mn_major[0])}" * (not registers) + f", {int(mn_major[1])}" if step == 16 else ""
    steps = "\n".join(f"{{wgmma {s}}}" for s in range(len(right.descriptors)))
    options = ("" if types[2] == "s32" else signs) + majors
    return Program(body.replace("{steps}", steps), *types, b.shape[0], left, right, options, **rest)
