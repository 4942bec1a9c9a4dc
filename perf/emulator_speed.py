"""Seconds and peak memory of one INT8 attention forward on the emulator, compile time left out.

python perf/emulator_speed.py [--seq 1024 4096] [--heads 8] [--head-dim 128] [--arch sm_80]
"""

from __future__ import annotations

import argparse
import os
import resource
import time

import torch

os.environ["CUTE_ATTN_BACKEND"] = "emulator"

import cute_attn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--arch", default="sm_80")
    arguments = parser.parse_args()
    print(
        f"{'tokens':>6s} {'attention':>10s} {'quantisers':>11s} {'peak memory':>13s}"
        f"   (B1 H{arguments.heads} D{arguments.head_dim})"
    )
    for seq in arguments.seq:
        q, k, v = (torch.randn(1, arguments.heads, seq, arguments.head_dim).half() for _ in range(3))
        warm = [x[:, :, :1] for x in (q, k, v)]
        # The kernels of a long and a short problem differ (tile config); both are compiled before the clock starts.
        cute_attn.attention(*warm, arch=arguments.arch, config=cute_attn.TileConfig())
        started = time.perf_counter()
        quantised = cute_attn.quantize(q, k, v, arch=arguments.arch)
        between = time.perf_counter()
        cute_attn.attention(*quantised, arch=arguments.arch, config=cute_attn.TileConfig())
        done = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{seq:6d} {done - between:8.2f} s {between - started:9.2f} s {peak:9.2f} GiB")


if __name__ == "__main__":
    main()
