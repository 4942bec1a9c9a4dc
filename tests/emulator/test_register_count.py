"""setmaxnreg: counts, waits for registers, and whole warpgroups."""

from __future__ import annotations

import numpy as np
import pytest

from cute_attn.emulator.errors import Deadlock, DivergentWarp, InvalidOperand
from cute_attn.emulator.launch import launch
from cute_attn.emulator.launch_size import LaunchSize
from cute_attn.emulator.memory import GlobalMemory
from cute_attn.emulator.parser import parse

from .harness import run

# The warpgroup that loads (threads 0 to 127) gives registers to the two that compute, which say so in `out`.
ROLES = """
    setp.ge.u32 %p1, %r50, 128; @%p1 bra COMPUTE;
    {release} bra END;
COMPUTE:
    setmaxnreg.inc.sync.aligned.u32 {more}; mov.u32 %r1, 1; mad.wide.u32 %rd5, %r51, 4, %rd0;
    st.global.u32 [%rd5], %r1;
END:
"""


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_registers_go_from_one_warpgroup_to_others(seed):
    """384 threads have 168 registers each; 24 and twice 240 are as many."""
    out = np.zeros(2 * 384, np.uint32)
    body = ROLES.format(release="setmaxnreg.dec.sync.aligned.u32 24;", more=240)
    run(body, {"out": out}, grid=(2, 1, 1), block=(384, 1, 1), seed=seed)
    assert out.reshape(2, 3, 128).any(2).tolist() == [[False, True, True]] * 2


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("release,more", [("setmaxnreg.dec.sync.aligned.u32 32;", 240), ("", 176)])
def test_more_registers_than_there_are(release, more, seed):
    with pytest.raises(Deadlock, match=f"wait for registers at `setmaxnreg.inc.sync.aligned.u32 {more}`") as caught:
        run(ROLES.format(release=release, more=more), {"out": np.zeros(384, np.uint32)}, block=(384, 1, 1), seed=seed)
    assert "168" in str(caught.value) or "32" in str(caught.value)


def test_counts_that_are_not_allowed():
    for count in (16, 264, 100):
        with pytest.raises(InvalidOperand, match=f"setmaxnreg to {count} registers: 24 to 256 in steps of 8"):
            run(f"setmaxnreg.dec.sync.aligned.u32 {count};", block=(128, 1, 1))
    run("setmaxnreg.inc.sync.aligned.u32 256; setmaxnreg.dec.sync.aligned.u32 24;", block=(128, 1, 1))
    with pytest.raises(InvalidOperand, match="setmaxnreg.inc to 40: there are 64"):
        run("setmaxnreg.dec.sync.aligned.u32 64; setmaxnreg.inc.sync.aligned.u32 40;", block=(128, 1, 1))
    with pytest.raises(InvalidOperand, match="setmaxnreg.dec to 72: there are 64"):
        run("setmaxnreg.dec.sync.aligned.u32 64; setmaxnreg.dec.sync.aligned.u32 72;", block=(128, 1, 1))


@pytest.mark.parametrize("head,least", [(".maxnreg 80", 88), (".minnctapersm 4", 136), ("", 264)])
def test_what_a_warp_starts_with(head, least):
    """128 threads: 80 as the kernel says, or a quarter of the register file's 512, or the most a thread can have."""
    body = f"""
    .version 8.8
    .target sm_90a
    .visible .entry kernel() {head} {{ setmaxnreg.inc.sync.aligned.u32 COUNT; ret; }}
    """

    def attempt(count: int) -> None:
        kernel = parse(body.replace("COUNT", str(count)))["kernel"]
        memory = GlobalMemory([])
        launch(kernel, LaunchSize((1, 1, 1), (128, 1, 1)), b"", memory)

    attempt(least - 8)
    with pytest.raises((Deadlock, InvalidOperand)):
        attempt(least)


@pytest.mark.parametrize("seed", [None, 3])
def test_a_warpgroup_that_does_not_agree(seed):
    apart = """
        setp.lt.u32 %p1, %r50, 64; @%p1 bra FIRST; setmaxnreg.dec.sync.aligned.u32 64; bra END;
    FIRST: {}
    END: mov.u32 %r1, 1;
    """
    with pytest.raises(DivergentWarp, match="setmaxnreg executed by warp 2 and not"):
        run(apart.format("mov.u32 %r2, 3;"), block=(128, 1, 1), seed=seed)
    with pytest.raises(DivergentWarp, match="of its warpgroup"):
        run(apart.format("setmaxnreg.dec.sync.aligned.u32 64;"), block=(128, 1, 1), seed=seed)
    run(apart.replace("64; @", "128; @").format("mov.u32 %r2, 3;"), block=(256, 1, 1), seed=seed)


def test_a_part_of_a_warp_and_of_a_warpgroup():
    with pytest.raises(DivergentWarp, match="8 of the 32 lanes"):
        run("setp.lt.u32 %p1, %r50, 8; @%p1 setmaxnreg.dec.sync.aligned.u32 64;", block=(128, 1, 1))
    run("setp.lt.u32 %p1, %r50, 128; @%p1 setmaxnreg.dec.sync.aligned.u32 64;", block=(160, 1, 1))
