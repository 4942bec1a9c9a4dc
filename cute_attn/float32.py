"""Float32 steps as a GPU does them, for the simulators."""

from __future__ import annotations

import torch

__all__ = ["exp2", "fma", "round_down", "round_up"]


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a·b + c of float32 tensors (broadcast), rounded once to float32, as ``fma.rn.f32`` does.

    The product is exact in float64. The sum is rounded to odd there (Boldo and Melquiond, "Emulation of FMA and
    correctly rounded sums", IEEE Trans. Computers 2008): the second rounding, to float32, is then the only one.
    """
    product, addend = torch.broadcast_tensors(a.double() * b.double(), c.double())
    total = product + addend
    of_addend = total - product
    error = (product - (total - of_addend)) + (addend - of_addend)
    bits = total.view(torch.int64)
    away_from_zero = (error > 0) == (total > 0)
    inexact_even = torch.isfinite(total) & (error != 0) & (bits & 1 == 0)
    odd = bits + torch.where(away_from_zero, 1, -1)
    return torch.where(inexact_even, odd, bits).view(torch.float64).float()


def exp2(x: torch.Tensor) -> torch.Tensor:
    """2^x of a float32 tensor, rounded once; ``ex2.approx.f32`` is within 2 ulp of it (PTX ISA, ex2)."""
    return torch.exp2(x.double()).float()


def round_up(x: torch.Tensor) -> torch.Tensor:
    """The smallest float32 that is not less than the float64 ``x``: the ``.rp`` of PTX where float64 is exact."""
    nearest = x.float()
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    return torch.where(nearest.double() < x, above, nearest)


def round_down(x: torch.Tensor) -> torch.Tensor:
    """The largest float32 that is not greater than the float64 ``x``: ``.rm``."""
    return -round_up(-x)
