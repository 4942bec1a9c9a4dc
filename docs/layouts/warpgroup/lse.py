"""What a row sum of the rounded P does to the LSE: E4M3 keeps four significant bits, and the errors mostly cancel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch

from cute_attn.kernels.softmax_warpgroup import FORMATS

from ..tables import table

__all__ = ["Bias", "bias_of_lse", "lse_table"]

_KEYS, _ROWS = 2048, 64


@dataclass(frozen=True)
class Bias:
    """LSE from the rounded P less that of the scores, over rows: mean, and largest magnitude."""

    mean: float
    largest: float


@cache
def bias_of_lse(spread: float) -> Bias:
    """Of rows whose scores are normal, ``spread`` their standard deviation in nats. Rows differ by where their maximum
    lies between two powers of two, which decides how P falls between two E4M3."""
    fmt = FORMATS["e4m3"]
    normal = NormalDist()
    x = torch.tensor([normal.inv_cdf((i + 0.5) / _KEYS) for i in range(_KEYS)], dtype=torch.float64)
    x = x * (spread / math.log(2)) + torch.arange(_ROWS, dtype=torch.float64)[:, None] / _ROWS
    p = torch.exp2(x + fmt.top - torch.ceil(x.amax(1, keepdim=True) + fmt.headroom))
    error = (p.float().to(torch.float8_e4m3fn).double().sum(1) / p.sum(1)).log()
    return Bias(float(error.mean()), float(error.abs().max()))


def lse_table() -> str:
    found = {spread: bias_of_lse(spread) for spread in (0.0, 0.25, 1.0, 2.0, 4.0)}
    rows = [(spread, f"{bias.mean:+.4f}", f"{bias.largest:.4f}") for spread, bias in found.items()]
    return table(("standard deviation of the scores (nats)", "mean error of the LSE", "largest"), rows)
