"""The shapes that are measured, in suites, and their names: ``b4_h32_s8192_d128_causal``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from cute_attn.problem import Problem

__all__ = ["QUICK", "SUITES", "chosen", "label"]

_LABEL = re.compile(r"b(\d+)_h(\d+)(?:_kv(\d+))?_s(\d+)(?:x(\d+))?_d(\d+)(_causal)?")


def label(problem: Problem) -> str:
    """The problem's name. `chosen` reads it back; the element type is not part of it."""
    kv = "" if problem.kv_heads == problem.heads else f"_kv{problem.kv_heads}"
    keys = "" if problem.seq_k == problem.seq_q else f"x{problem.seq_k}"
    causal = "_causal" if problem.causal else ""
    return f"b{problem.batch}_h{problem.heads}{kv}_s{problem.seq_q}{keys}_d{problem.head_dim}{causal}"


def _from_label(name: str) -> Problem | None:
    if not (found := _LABEL.fullmatch(name)):
        return None
    batch, heads, kv_heads, seq_q, seq_k, head_dim = (int(n) if n else 0 for n in found.groups()[:6])
    return Problem(batch, heads, kv_heads or heads, seq_q, seq_k or seq_q, head_dim, "bfloat16", bool(found[7]))


def _grid(
    batch: int, heads: int, kv_heads: int, tokens: Iterable[int], head_dims: Iterable[int], masks: Iterable[bool]
) -> tuple[Problem, ...]:
    return tuple(
        Problem(batch, heads, kv_heads, seq, seq, head_dim, "bfloat16", causal)
        for head_dim in head_dims
        for causal in masks
        for seq in tokens
    )


_BOTH = (False, True)

SUITES: dict[str, tuple[Problem, ...]] = {
    "peers": _grid(4, 32, 32, (1024, 2048, 4096, 8192, 16384, 32768), (64, 128), _BOTH),
    "model": _grid(1, 64, 8, (2048, 8192, 32768), (128,), (True,)),
    "video": _grid(1, 24, 24, (17776, 75600), (128,), (False,)),
    "short": _grid(8, 32, 32, (256, 512, 1024), (128,), _BOTH),
}
"""peers: the shapes of SageAttention's and FlashAttention's own figures. model: prefill of a large language model with
grouped-query attention. video: CogVideoX's 17,776 tokens and Wan 2.1's 75,600 (81 frames in 720p), with the 24 heads
of 128 that HunyuanVideo has. short: where launches and tails count."""

QUICK = tuple(
    p
    for suite in SUITES.values()
    for p in suite
    if label(p)
    in (
        "b4_h32_s8192_d64",
        "b4_h32_s1024_d128",
        "b4_h32_s8192_d128",
        "b4_h32_s8192_d128_causal",
        "b1_h64_kv8_s8192_d128_causal",
        "b1_h24_s17776_d128",
        "b8_h32_s512_d128",
    )
)
"""One shape or two of each suite: what ``--quick`` measures."""


def chosen(names: list[str] | None, *, quick: bool, dtype: str) -> list[Problem]:
    """The problems that ``--shapes`` and ``--quick`` name, each once, in the suites' order.

    names: suites and labels; None: all suites. quick: of those suites only the problems in `QUICK`.

    Raises ValueError for a name that is neither a suite nor a label, and where nothing is left.
    """
    found: dict[Problem, None] = {}
    for name in list(SUITES) if names is None else names:
        if name in SUITES:
            found.update(dict.fromkeys(p for p in SUITES[name] if not quick or p in QUICK))
        elif (problem := _from_label(name)) is not None:
            found[problem] = None
        else:
            raise ValueError(
                f"--shapes {name}: use a suite ({', '.join(SUITES)}) or a shape such as b4_h32_s8192_d128, "
                "b1_h64_kv8_s4096_d128_causal or b1_h8_s512x4096_d64 (queries x keys)"
            )
    if not found:
        raise ValueError(f"--quick leaves nothing of {', '.join(names or [])}; leave one of the two out")
    return [replace(problem, dtype=dtype) for problem in found]
