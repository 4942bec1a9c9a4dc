"""Where a result comes from: GPU, driver, versions, commit."""

from __future__ import annotations

import concurrent.futures
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["Clocks", "Provenance", "clocks", "commit", "provenance", "versions"]

_PACKAGES = (
    "cute-attn",
    "nvidia-cutlass-dsl",
    "apache-tvm-ffi",
    "torch",
    "triton",
    "flash-attn-4",
    "quack-kernels",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-frontend",
    "sageattention",
    "spas-sage-attn",
)


@dataclass(frozen=True)
class Provenance:
    """gpu, capability, multiprocessors, memory_bytes, l2_bytes: as PyTorch reports the device; driver, cuda, cudnn:
    versions, None if not known; commit: of the checkout that this package is imported from, with "+changes" if files
    differ from it; outside of one $CUTE_ATTN_COMMIT, or None."""

    gpu: str
    capability: str
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    driver: str | None
    cuda: str | None
    cudnn: int | None
    python: str
    system: str
    packages: dict[str, str]
    commit: str | None


@dataclass(frozen=True)
class Clocks:
    """What nvidia-smi said while one of a problem's calls ran: MHz, watts, degrees Celsius."""

    sm_mhz: float
    memory_mhz: float
    watts: float
    celsius: float


def _output(command: list[str], directory: Path | None = None) -> str | None:
    """What a command prints; None if there is no such command, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=directory, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _asked(device: torch.device, fields: str) -> list[str]:
    """nvidia-smi's answers about a device, which it is told by its UUID: CUDA_VISIBLE_DEVICES renumbers devices."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    return [field.strip() for field in (_output(query) or "").split(",")]


def clocks(device: torch.device, work: Callable[[], Any]) -> Clocks | None:
    """The device's clocks while it does ``work``, again and again; None where nvidia-smi cannot say."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(_asked, device, "clocks.sm,clocks.mem,power.draw,temperature.gpu")
        while not asked.done():
            work()
            torch.cuda.synchronize(device)
    try:
        return Clocks(*(float(field) for field in asked.result()))
    except (TypeError, ValueError):
        return None


def commit() -> str | None:
    """See `Provenance`."""
    directory = Path(__file__).resolve().parent
    head = _output(["git", "rev-parse", "HEAD"], directory)
    if not head:
        return os.environ.get("CUTE_ATTN_COMMIT")
    return head + ("+changes" if _output(["git", "status", "--porcelain", "--untracked-files=no"], directory) else "")


def versions() -> dict[str, str]:
    """Of the packages that matter here, those that are installed."""
    there = {(d.metadata["Name"] or "").lower().replace("_", "-"): d.version for d in metadata.distributions()}
    return {name: there[name] for name in _PACKAGES if name in there}


def provenance(device: torch.device) -> Provenance:
    """Of a CUDA device and this process."""
    properties = torch.cuda.get_device_properties(device)
    return Provenance(
        gpu=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        l2_bytes=properties.L2_cache_size,
        driver=_asked(device, "driver_version")[0] or None,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        python=platform.python_version(),
        system=platform.platform(),
        packages=versions(),
        commit=commit(),
    )
