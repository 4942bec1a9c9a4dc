"""The table of GPUs reproduces the peaks that NVIDIA prints."""

from __future__ import annotations

import pytest

from cute_attn.gpus import GPUS, gpu_named, peak_tops


@pytest.mark.parametrize(
    ("name", "formats", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", ("bfloat16", "bfloat16", "float32"), 312),
        ("NVIDIA A100-SXM4-40GB", ("int8", "int8", "int32"), 624),
        ("NVIDIA A100-SXM4-40GB", ("int4", "int4", "int32"), 1248),
        ("NVIDIA GeForce RTX 3090", ("float16", "float16", "float32"), 71),
        ("NVIDIA A10", ("float16", "float16", "float32"), 125),
        ("NVIDIA GeForce RTX 4090", ("float16", "float16", "float32"), 165.2),
        ("NVIDIA GeForce RTX 4090", ("int8", "int8", "int32"), 660.6),
        ("NVIDIA GeForce RTX 4090", ("e4m3", "e4m3", "float32"), 330.3),
        ("NVIDIA L40S", ("float16", "float16", "float32"), 362.05),
        ("NVIDIA L40S", ("e4m3", "e4m3", "float32"), 724.1),
        ("NVIDIA H100 80GB HBM3", ("bfloat16", "bfloat16", "float32"), 989.4),
        ("NVIDIA H100 PCIe", ("bfloat16", "bfloat16", "float32"), 756),
        ("NVIDIA H200", ("int8", "e4m3", "float32+float32"), 1979),
        ("NVIDIA GeForce RTX 5090", ("float16", "float16", "float32"), 209.5),
        ("NVIDIA GeForce RTX 5090", ("e4m3", "e4m3", "float32"), 419),
    ],
)
def test_peaks(name, formats, peak):
    assert peak_tops(gpu_named(name), *formats) == pytest.approx(peak, rel=6e-3)


def test_mixed_formats_take_each_their_own_time():
    h200, rtx_4090 = gpu_named("NVIDIA H200"), gpu_named("NVIDIA GeForce RTX 4090")
    assert peak_tops(h200, "int8", "float16", "float32") == pytest.approx(2 / (1 / 1979 + 1 / 989.4), rel=1e-3)
    assert peak_tops(rtx_4090, "int8", "float16", "float16+float32") == pytest.approx(
        2 / (1 / 660.6 + 1 / 330.3), rel=1e-3
    )
    assert peak_tops(h200, "int4", "int8", "int32") is None  # no such instruction


def test_names_of_other_products_are_not_taken_for_these():
    assert gpu_named("NVIDIA GeForce RTX 4090").arch == "sm_89"
    for name in ("NVIDIA H200 NVL", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D", "NVIDIA T4", ""):
        assert gpu_named(name) is None, name
    assert all(gpu_named(gpu.name) is gpu for gpu in GPUS)
