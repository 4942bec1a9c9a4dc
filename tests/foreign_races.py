"""Takes synchronising instructions out of flash-attn-4's Hopper forward, one at a time, and runs what is left.

A program of its own, because the emulator has to be installed before cutlass is imported. Prints one JSON object: the
class of the finding, or null, by instruction.
"""

from __future__ import annotations

import json

from cute_attn.emulator import foreign, settings

foreign.install("sm_90a")

import torch  # noqa: E402
from flash_attn.cute.interface import flash_attn_func  # noqa: E402
from mutants import findings  # noqa: E402

q, k, v = (torch.randn(1, 384, 1, 128).bfloat16() for _ in range(3))
with settings(uninitialized_shared="poison", seed=None):
    found = findings(
        "FlashAttentionForwardSm90",
        r"bar\.sync|fence\.|wgmma\.wait_group|mbarrier\.try_wait",
        lambda: flash_attn_func(q, k, v, causal=True),
    )
print(json.dumps({what: None if error is None else type(error).__name__ for what, error in found.items()}))
