"""Hand-written PTX kernels on numpy arrays: the ground on which the emulator's own tests stand."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from cute_attn.emulator.launch import LaunchRecord, launch
from cute_attn.emulator.launch_size import LaunchSize
from cute_attn.emulator.memory import GlobalMemory, Span
from cute_attn.emulator.parser import parse
from cute_attn.emulator.settings import Settings

REGISTERS = """
    .reg .pred %p<20>;
    .reg .b16 %h<40>;
    .reg .b32 %r<60>;
    .reg .b64 %rd<40>;
"""


def run(
    body: str,
    arrays: dict[str, np.ndarray] | None = None,
    *,
    scalars: tuple[int, ...] = (),
    grid: tuple[int, int, int] = (1, 1, 1),
    block: tuple[int, int, int] = (32, 1, 1),
    shared: int = 0,
    cluster: tuple[int, int, int] = (1, 1, 1),
    cooperative: bool = False,
    declarations: str = "",
    module: str = "",
    target: str = "sm_89",
    **options: Any,
) -> LaunchRecord:
    """Runs a kernel whose parameters are the arrays' addresses, %rd0, %rd1, ..., and then u32 scalars, %r0, %r1, ....

    options: the launch's `Settings`.

    %r50 holds the thread's number in its block and %r51 its number in the grid (x only).
    """
    arrays = arrays or {}
    params = [f".param .u64 a{n}" for n in range(len(arrays))] + [f".param .u32 s{n}" for n in range(len(scalars))]
    loads = [f"ld.param.u64 %rd{n}, [a{n}];" for n in range(len(arrays))]
    loads += [f"ld.param.u32 %r{n}, [s{n}];" for n in range(len(scalars))]
    text = f"""
.version 8.8
.target {target}
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
{module}
.visible .entry kernel({", ".join(params)})
{{
{REGISTERS}
{declarations}
    {" ".join(loads)}
    mov.u32 %r50, %tid.x; mov.u32 %r51, %ctaid.x; mov.u32 %r52, %ntid.x;
    mad.lo.s32 %r51, %r51, %r52, %r50;
{body}
    ret;
}}
"""
    parameters = b"".join(struct.pack("<Q", a.ctypes.data) for a in arrays.values())
    parameters += b"".join(struct.pack("<I", s & 0xFFFFFFFF) for s in scalars)
    memory = GlobalMemory([Span(a.ctypes.data, a.nbytes, name) for name, a in arrays.items()])
    kernel = parse(text)["kernel"]
    size = LaunchSize(grid, block, shared, cluster, cooperative)
    return launch(kernel, size, parameters, memory, Settings(**options))


def evaluate(code: str, inputs: list[np.ndarray], output: Any) -> np.ndarray:
    """Applies `code` to each element: inputs are in %a, %b, %c, the result is taken from %d.

    Registers are untyped and as wide as the elements (16 bits for 8-bit elements). Returns an array of dtype `output`.
    """
    count = len(inputs[0])
    padded = -(-count // 32) * 32
    sources = [np.concatenate([a, np.repeat(a[-1:], padded - count)]) for a in inputs]
    result = np.zeros(padded, output)
    lines, declarations = [], []
    for n, (name, array) in enumerate(zip("abc", sources, strict=False)):
        size = array.itemsize
        declarations.append(f".reg .b{max(16, 8 * size)} %{name};")
        lines.append(f"mad.wide.u32 %rd20, %r51, {size}, %rd{n}; ld.global.u{8 * size} %{name}, [%rd20];")
    size = result.itemsize
    declarations.append(f".reg .b{max(16, 8 * size)} %d;")
    last = f"mad.wide.u32 %rd20, %r51, {size}, %rd{len(sources)}; st.global.b{8 * size} [%rd20], %d;"
    arrays = {f"in{n}": a for n, a in enumerate(sources)} | {"out": result}
    run(
        "\n".join([*lines, code, last]),
        arrays,
        grid=(padded // 32, 1, 1),
        declarations=" ".join(declarations),
    )
    return result[:count]


def interesting(dtype: Any, count: int = 200, seed: int = 0) -> np.ndarray:
    """Integers of `dtype`: the corners of its range and random bits."""
    info = np.iinfo(dtype)
    corners = [0, 1, 2, 3, 7, 8, 31, 32, 33, info.max, info.max - 1, info.min, info.min + 1, info.max // 2]
    if info.min < 0:
        corners += [-1, -2, -7, -32]
    random = np.random.default_rng(seed).integers(info.min, info.max, count - len(corners), dtype, endpoint=True)
    return np.concatenate([np.array(corners, dtype), random])


def interesting_floats(dtype: Any, count: int = 400, seed: int = 0) -> np.ndarray:
    """Floats of all magnitudes, halves, integers, subnormals, infinities and NaN."""
    rng = np.random.default_rng(seed)
    info = np.finfo(dtype)
    special = [0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 1.0, -1.0, np.inf, -np.inf, np.nan]
    special += [info.tiny, info.tiny / 4, -info.tiny / 2, info.max, -info.max, 255.5, 127.5, -128.5, 65504.0, 448.0]
    random = rng.standard_normal(count) * 2.0 ** rng.integers(-20, 20, count)
    with np.errstate(over="ignore"):
        return np.concatenate([np.array(special), random, np.rint(random)]).astype(dtype)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal values, signs of zero included, any NaN equal to any NaN."""
    both_nan = np.isnan(a) & np.isnan(b)
    return bool((both_nan | ((a == b) & (np.signbit(a) == np.signbit(b)))).all())
