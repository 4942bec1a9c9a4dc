"""Runs the benchmark's flash-attn-4 peer on the emulator: ``foreign_bench_peer.py ARCH``. Prints its errors as JSON.

A program of its own, because the emulator has to be installed before cutlass is imported.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from cute_attn.emulator import foreign, settings

foreign.install(sys.argv[1])


from cute_attn.bench.accuracy import Sample  # noqa: E402
from cute_attn.bench.peers.flash_attn_4 import FlashAttn4  # noqa: E402
from cute_attn.commands.check import random_inputs  # noqa: E402
from cute_attn.problem import Problem  # noqa: E402

problem = Problem(1, 4, 2, 150, 150, 64, "bfloat16", True)
q, k, v = random_inputs(problem, "normal", 0)
peer = FlashAttn4((9, 0))
assert peer.available() and peer.supports(problem)
with settings(uninitialized_shared="poison"):
    prepared = peer.prepare(*(x.to("cuda") for x in (q, k, v)), problem)
    assert prepared.whole is None and prepared.attention is not None
    out = prepared.output(prepared.attention()).cpu()
print(json.dumps(asdict(Sample(q, k, v, problem).errors(out)) | {"shape": list(out.shape)}))
