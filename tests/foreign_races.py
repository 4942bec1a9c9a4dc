"""Takes synchronising instructions out of flash-attn-4's Hopper forward, one at a time, and runs what is left.

Then runs it as it is where it copies Q by cp.async, because 5 query heads per KV head do not divide its tile of rows.

A program of its own, because the emulator has to be installed before cutlass is imported. Prints one JSON object: the
class of the finding, or null, by instruction, and by PACKED for the kernel that nothing is taken out of.
"""

from __future__ import annotations

import json

from cute_attn.emulator import foreign, settings
from cute_attn.emulator.errors import EmulatorError

foreign.install("sm_90a")

import torch  # noqa: E402
from flash_attn.cute.interface import flash_attn_func  # noqa: E402
from mutants import findings  # noqa: E402

PACKED = "5 query heads per KV head"

q, k, v = (torch.randn(1, 384, 1, 128).bfloat16() for _ in range(3))
with settings(uninitialized_shared="poison", seed=None):
    found = findings(
        "FlashAttentionForwardSm90",
        r"bar\.sync|fence\.|wgmma\.wait_group|mbarrier\.try_wait",
        lambda: flash_attn_func(q, k, v, causal=True),
    )
    found[PACKED] = None
    try:
        flash_attn_func(torch.randn(1, 100, 5, 64).bfloat16(), *(torch.randn(1, 130, 1, 64).bfloat16() for _ in "kv"))
    except EmulatorError as error:
        found[PACKED] = error
print(json.dumps({what: None if error is None else type(error).__name__ for what, error in found.items()}))
