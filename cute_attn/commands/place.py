"""Where a command's tensors live."""

from __future__ import annotations

import torch

from cute_attn import jit

__all__ = ["backend_device"]


def backend_device() -> torch.device:
    """The CUDA device, or the CPU for the emulator. Raises ValueError where CUDA is asked for and there is none."""
    if jit.backend() != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("CUTE_ATTN_BACKEND=cuda, but PyTorch sees no CUDA device; use CUTE_ATTN_BACKEND=emulator")
    return torch.device("cuda")
