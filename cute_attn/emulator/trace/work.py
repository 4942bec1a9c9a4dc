"""What instructions do, in a word or two: the kinds of work that a trace shows."""

from __future__ import annotations

import re
from functools import lru_cache

SHAPE = re.compile(r"\.m(\d+)n(\d+)k(\d+)\.")
_WORK = {
    "wgmma.mma_async": "wgmma",
    "mma": "mma.sync",
    "ex2": "exp2",
    "cp.async.bulk.prefetch": "prefetch",
    "cp.async.bulk.commit_group": "",
    "cp.async.bulk.wait_group": "",
    "cp.async.commit_group": "",
    "cp.async.wait_group": "",
    "cp.async.wait_all": "",
    "cp.async.mbarrier": "mbarrier",
    "cp.async.ca": "cp.async",
    "cp.async.cg": "cp.async",
    "cp.reduce.async.bulk": "TMA reduce",
    "ldmatrix": "ldmatrix",
    "stmatrix": "stmatrix",
    "atom": "atomics",
    "red": "atomics",
    "mbarrier": "mbarrier",
    "shfl": "shuffle",
    **dict.fromkeys(["bra", "bar", "barrier", "fence", "wgmma", "setmaxnreg", "ret", "exit"], ""),
    **dict.fromkeys(["lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div"], "special functions"),
}
"""Work by dotted prefix of the opcode, the longest first; "" is no work of its own."""
SPECIAL_FUNCTIONS = frozenset(name for name, kind in _WORK.items() if kind in ("exp2", "special functions"))


@lru_cache(maxsize=4096)
def work(opcode: str) -> str:
    """The work that an instruction belongs to: "wgmma m64n128k16", "exp2", "TMA load"; "" if to no work of its own."""
    parts = opcode.split(".")
    spaces = [part.split("::")[0] for part in parts if part.startswith(("shared", "global"))]
    for length in range(len(parts), 0, -1):
        if (name := _WORK.get(".".join(parts[:length]))) is not None:
            shape = SHAPE.search(opcode)
            return f"{name} {shape[0].strip('.')}" if shape and name == "wgmma" else name
    if opcode.startswith("cp.async.bulk"):  # the destination's state space comes first
        return "TMA store" if spaces[:1] == ["global"] else "TMA load" if "global" in spaces else "TMA send"
    if parts[0] in ("ld", "st"):
        return f"{spaces[0]} {'load' if parts[0] == 'ld' else 'store'}" if spaces else ""
    return "arithmetic"
