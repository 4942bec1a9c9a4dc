"""``cute-attn info``: devices, architectures, recipes and versions."""

from __future__ import annotations

import argparse
import platform
from dataclasses import replace
from importlib import metadata

import torch

from cute_attn import Problem, jit, recipes, supports
from cute_attn.arch import ARCHS, arch_for_capability

PACKAGES = ("cute-attn", "nvidia-cutlass-dsl", "apache-tvm-ffi", "torch", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``info`` takes no arguments."""


def device_lines() -> list[str]:
    """One line per CUDA device, or one that says there is none."""
    if not torch.cuda.is_available():
        return ["no CUDA device: kernels run on the emulator"]
    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        try:
            arch = arch_for_capability(capability).name
        except ValueError as error:
            arch = str(error)
        lines.append(f"cuda:{index}  {properties.name}, {properties.total_memory >> 30} GiB, {arch}")
    return lines


def run(arguments: argparse.Namespace) -> int:
    print("versions")
    print(f"  python {platform.python_version()}")
    for package in PACKAGES:
        print(f"  {package} {metadata.version(package)}")
    print("devices")
    for line in device_lines():
        print(f"  {line}")
    print(f"  backend in use: {jit.backend()}")
    print("architectures and recipes")
    problem = Problem(batch=1, heads=1, kv_heads=1, seq_q=1, seq_k=1, head_dim=64, dtype="float16")
    for arch in ARCHS.values():
        works = [
            name
            for name, recipe in recipes().items()
            if supports(recipe, arch.name, replace(problem, dtype=recipe.dtypes[0]))
        ]
        print(f"  {arch.name:8s} {', '.join(works) or 'none yet':66s} {arch.gpus}")
    return 0
