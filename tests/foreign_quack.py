"""Runs kernels of quack-kernels, from the pip package, on the emulator: ``foreign_quack.py ARCH NAMES``.

NAMES is a JSON list of keys of `PROGRAMS`. Prints one JSON object each: the largest error against float64 as a fraction
of what is allowed, whether another order of warps and copies gave the same bits, and grids and clusters launched.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from cute_attn.emulator import clear_launches, foreign, launches, settings

foreign.install(sys.argv[1])

import torch  # noqa: E402
from quack.blockscaled.operand import BlockScaledFormat, BlockScaledOperand  # noqa: E402
from quack.blockscaled.utils import blockscaled_quantize  # noqa: E402
from quack.gemm_config import GemmConfig  # noqa: E402
from quack.gemm_interface import gemm, gemm_blockscaled_ref, gemm_tuned  # noqa: E402
from quack.rmsnorm import rmsnorm_fwd  # noqa: E402
from quack.softmax import softmax_fwd  # noqa: E402

Result = tuple[Callable[[], torch.Tensor], torch.Tensor, float, float]
"""(the call, what is exact, allowed error relative to each element, allowed absolute error)."""


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def softmax(rows: int, columns: int) -> Result:
    x = randn(rows, columns)
    return lambda: softmax_fwd(x), x.double().softmax(-1), 1e-5, 0.0


def rmsnorm(rows: int, columns: int) -> Result:
    x, weight = randn(rows, columns), randn(columns)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    return lambda: rmsnorm_fwd(x, weight)[0], exact, 1e-5, 1e-7


def matmul(m: int, n: int, k: int, dtype: torch.dtype, **config) -> Result:
    """bf16 of a sum in float32: half a unit in the last place of 8 bits, and the sum's own error."""
    a, b = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, scale=k**-0.5).mT
    usual = {"is_dynamic_persistent": False, "cluster_m": 1, "device_capacity": torch.cuda.get_device_capability()[0]}

    def run() -> torch.Tensor:
        out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        gemm_tuned.fn(a, b, out, config=GemmConfig(**usual | config))
        return out

    return run, a.double() @ b.double(), 2**-8, 1e-5


def block_scaled(name: str, m: int, n: int, k: int) -> Result:
    """Exact is quack's own sum of the dequantised operands, rounded to bf16 as well: one unit in the last place."""
    scaled = BlockScaledFormat.from_name(name)
    a, b = (
        BlockScaledOperand.from_parts(*blockscaled_quantize(randn(rows, k, dtype=torch.bfloat16), name), scaled)
        for rows in (m, n)
    )
    return lambda: gemm(a, b.mT, tuned=False), gemm_blockscaled_ref(a, b.mT).double(), 2**-7, 1e-5


BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
TILE = {"tile_m": 128, "tile_n": 128}
PROGRAMS: dict[str, Callable[[], Result]] = {
    "softmax": lambda: softmax(3, 65536),
    "rmsnorm": lambda: rmsnorm(3, 65536),
    "gemm": lambda: matmul(300, 256, 192, BF16, **TILE, pingpong=False),
    "gemm pingpong 2x1": lambda: matmul(300, 256, 192, BF16, **TILE, pingpong=True, cluster_m=2),
    "gemm cooperative 2x1": lambda: matmul(512, 256, 192, BF16, tile_m=256, tile_n=128, pingpong=False, cluster_m=2),
    "gemm e4m3 1x2": lambda: matmul(256, 512, 256, E4M3, **TILE, pingpong=False, cluster_n=2),
    "gemm e4m3": lambda: matmul(256, 256, 256, E4M3, **TILE, pingpong=False),
    "gemm pingpong, work taken over": lambda: matmul(
        600, 512, 192, BF16, **TILE, pingpong=True, is_dynamic_persistent=True
    ),
    "mxfp8_e4m3": lambda: block_scaled("mxfp8_e4m3", 256, 256, 256),
    "mxfp4": lambda: block_scaled("mxfp4", 256, 128, 256),
    "nvfp4": lambda: block_scaled("nvfp4", 200, 256, 256),
}

for name in json.loads(sys.argv[2]):
    call, exact, relative, absolute = PROGRAMS[name]()
    clear_launches()
    with settings(races=True):
        out = call()
    record = launches()[-1]
    with settings(seed=7):
        again = call()
    error = ((out.double() - exact).abs() / (relative * exact.abs() + absolute)).max().item()
    found = {
        "error": error,
        "identical": torch.equal(out, again),
        "grid": record.grid,
        "cluster": record.cluster,
        "instructions": list(record.instructions),
    }
    print(json.dumps(found), flush=True)
