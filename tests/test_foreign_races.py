"""The race detector against a warp-specialised Hopper kernel that nobody here wrote, with one instruction less."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_flash_attention_without_one_fence_wait_or_barrier() -> None:
    """Not every one can matter: some loops do not run, first waits for an empty stage are over before they begin,
    a second wait follows a test of the same phase, and barriers that only take turns protect no memory.

    The kernel that copies Q by cp.async has no fence to take out: the PTX ISA wants one before a wgmma reads shared
    memory that another proxy has written.
    """
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn-4 is not installed; `pip install cute-attn[test]` brings it")
    script = Path(__file__).with_name("foreign_races.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])

    def of(opcode: str) -> list[str | None]:
        return [name for what, name in found.items() if opcode in what]

    assert of("fence.mbarrier_init") == ["MissingProxyFence"]
    assert of("fence.proxy.async") == ["MissingProxyFence"]
    assert found["5 query heads per KV head"] == "MissingProxyFence"
    assert of("bar.sync 0;") == ["DataRace"]  # after the mbarriers' initialisation
    assert of("bar.sync 1, 288;") == ["DataRace"]  # the output, before the warp that stores it
    assert of("try_wait").count("DataRace") >= 8
    waits = of("wgmma.wait_group")
    assert waits.count("DataRace") >= 2 and len(waits) - waits.count(None) >= 6
