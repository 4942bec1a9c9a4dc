"""f16 and bf16 arithmetic against torch and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .harness import evaluate, interesting_floats


def to_bits(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16).copy()


def to_float(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(bits.view(np.int16).copy()).view(dtype).float().numpy()


KINDS = {"f16": torch.float16, "bf16": torch.bfloat16}


def operands(kind: str, count: int = 3) -> list[torch.Tensor]:
    values = [interesting_floats(np.float32, 200, seed) for seed in range(count)]
    n = min(map(len, values)) // 2 * 2
    return [torch.from_numpy(v[:n] if s == 0 else v[:n][::-1].copy()).to(KINDS[kind]) for s, v in enumerate(values)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_arithmetic(kind, packed):
    dtype = KINDS[kind]
    a, b, c = operands(kind)
    carrier = np.uint32 if packed else np.uint16
    inputs = [to_bits(x).view(carrier) for x in (a, b, c)]
    suffix = kind + ("x2" if packed else "")
    exact = {
        f"add.rn.{suffix} %d, %a, %b;": a + b,
        f"sub.rn.{suffix} %d, %a, %b;": a - b,
        f"mul.rn.{suffix} %d, %a, %b;": a * b,
        f"max.{suffix} %d, %a, %b;": torch.fmax(a.float(), b.float()).to(dtype),
        f"min.NaN.{suffix} %d, %a, %b;": torch.minimum(a, b),
        f"neg.{suffix} %d, %a;": -a,
        f"abs.{suffix} %d, %a;": a.abs(),
        f"fma.rn.{suffix} %d, %a, %b, %c;": (a.double() * b.double() + c.double()).to(dtype),
        f"fma.rn.relu.{suffix} %d, %a, %b, %c;": torch.relu((a.double() * b.double() + c.double()).to(dtype)),
    }
    for code, expected in exact.items():
        got = evaluate(code, inputs, carrier).view(np.uint16)
        # The sign of a zero is left open by min, max and relu.
        assert np.array_equal(to_float(got, dtype), expected.float().numpy(), equal_nan=True), code


def test_ex2_and_tanh():
    x = torch.linspace(-10, 8, 128).to(torch.float16)
    inputs = [to_bits(x).view(np.uint32)]
    got = to_float(evaluate("ex2.approx.f16x2 %d, %a;", inputs, np.uint32).view(np.uint16), torch.float16)
    assert np.allclose(got, np.exp2(x.double().numpy()), rtol=2e-3)
    got = to_float(evaluate("tanh.approx.f16x2 %d, %a;", inputs, np.uint32).view(np.uint16), torch.float16)
    assert np.allclose(got, np.tanh(x.double().numpy()), rtol=2e-3)
    got = to_float(
        evaluate("ex2.approx.ftz.bf16x2 %d, %a;", [to_bits(x.bfloat16()).view(np.uint32)], np.uint32).view(np.uint16),
        torch.bfloat16,
    )
    assert np.allclose(got, np.exp2(x.bfloat16().double().numpy()), rtol=1e-2)
