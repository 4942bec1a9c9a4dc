"""Seconds and peak memory of flash-attn-4's forward on the emulator, compile time left out.

python perf/emulator_flash_attention.py [--arch sm_90a] [--seq 1024 4096] [--causal] [--races] [--profile]

The package (pip install 'cute-attn[test]') brings kernels for several architectures; sm_90a is a warp-specialised one
with TMA, mbarriers and wgmma. --profile adds seconds per instruction family, of a slower second run.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90a", choices=("sm_80", "sm_90a", "sm_120a"))
    parser.add_argument("--seq", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--races", action="store_true", help="with the race detector")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    number = re.sub(r"\D", "", arguments.arch)
    os.environ.update(FLASH_ATTENTION_ARCH=f"sm_{number}", FLASH_ATTENTION_NUM_SMS="4", QUACK_ARCH=number)

    from cute_attn.emulator import foreign, launches, settings

    foreign.install(arguments.arch)
    import torch
    from flash_attn.cute.interface import flash_attn_func

    print(
        f"{'tokens':>6s} {'forward':>9s} {'peak memory':>13s} {'error':>9s}   ({arguments.arch}, B1 H{arguments.heads})"
    )
    for seq in arguments.seq:
        q, k, v = (torch.randn(1, seq, arguments.heads, arguments.head_dim).bfloat16() for _ in range(3))
        # A Q tile's rows beyond the sequence are loaded by nobody and stored by nobody.
        with settings(uninitialized_shared="poison", races=arguments.races):
            flash_attn_func(q[:, :1], k[:, :1], v[:, :1], causal=arguments.causal)  # compiles
            started = time.perf_counter()
            out = flash_attn_func(q, k, v, causal=arguments.causal)[0]
            seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        queries, keys, values = (x.float().transpose(1, 2) for x in (q, k, v))
        exact = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=arguments.causal)
        error = (out.float() - exact.transpose(1, 2)).abs().max().item()
        print(f"{seq:6d} {seconds:7.2f} s {peak:9.2f} GiB {error:10.1e}", flush=True)
        if arguments.profile:
            with settings(uninitialized_shared="poison", races=arguments.races, profile=True):
                flash_attn_func(q, k, v, causal=arguments.causal)
            print("  " + ", ".join(f"{family} {spent:.2f} s" for family, spent in launches()[-1].profile.items()))


if __name__ == "__main__":
    main()
