"""Arrays of any framework in, the same kind out; and what a kernel must know of a tensor's memory."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["alignment", "as_torch", "dtype_name", "like", "overlaps_itself", "to_bhsd"]

_DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def as_torch(array: Any, name: str) -> torch.Tensor:
    """A torch tensor as it is; any other array through ``__dlpack__``, without a copy.

    Raises TypeError when ``array`` (the argument called ``name``) is neither.
    """
    if isinstance(array, torch.Tensor):
        return array
    if hasattr(array, "__dlpack__"):
        return torch.from_dlpack(array)
    raise TypeError(
        f"{name} must be a torch tensor or an array with __dlpack__ (NumPy, CuPy, JAX), got {type(array).__name__}"
    )


def like(original: Any, result: torch.Tensor) -> Any:
    """``result`` as an array of the framework that ``original`` came from, without a copy."""
    if isinstance(original, torch.Tensor) or not hasattr(original, "__array_namespace__"):
        return result
    return original.__array_namespace__().from_dlpack(result)


def dtype_name(tensor: torch.Tensor, name: str) -> str:
    """ "float16" or "bfloat16". Raises TypeError, naming the argument, for any other element type."""
    if tensor.dtype not in _DTYPE_NAMES:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; use torch.float16 or torch.bfloat16 (for example {name}.half())"
        )
    return _DTYPE_NAMES[tensor.dtype]


def to_bhsd(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """A view with axes [B, H, S, D] of a tensor in ``layout``: "bhsd" or "bshd"."""
    return tensor if layout == "bhsd" else tensor.transpose(1, 2)


def alignment(tensor: torch.Tensor) -> int:
    """Bytes by which every row of ``tensor`` is aligned: 16, 8, 4 or 2.

    A kernel moves that many bytes at once; strides of axes of length 1 do not count.
    """
    units = tensor.data_ptr()
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size > 1:
            units |= stride * tensor.element_size()
    return min(16, units & -units) if units else 16


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two index tuples of ``tensor`` certainly share memory (an expanded axis)."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
