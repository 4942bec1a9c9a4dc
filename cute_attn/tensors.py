"""Arrays of any framework in, the same kind out; and what a kernel must know of a tensor's memory."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["DTYPE_NAMES", "alignment", "as_torch", "dtype_name", "like", "may_overlap", "overlaps_itself", "to_bhsd"]

DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def as_torch(array: Any, name: str) -> torch.Tensor:
    """A torch tensor as it is; any other array through ``__dlpack__``, without a copy.

    Raises TypeError when ``array`` (the argument called ``name``) is neither, and for torch tensors whose memory does
    not hold their elements one by one (sparse, or lazily negated); ValueError for strides or bytes DLPack cannot say.
    """
    if isinstance(array, torch.Tensor):
        if array.layout is not torch.strided:
            raise TypeError(f"{name} has the layout {array.layout}; use a dense tensor: {name}.to_dense()")
        if array.is_neg():
            raise TypeError(f"{name} is a view that negates lazily; use a tensor of its own: {name}.resolve_neg()")
        return array
    if not hasattr(array, "__dlpack__"):
        raise TypeError(
            f"{name} must be a torch tensor or an array with __dlpack__ (NumPy, CuPy, JAX), got {type(array).__name__}"
        )
    # PyTorch has no negative strides, and ends the process when DLPack brings one.
    if any(stride < 0 for stride in getattr(array, "strides", None) or ()):
        raise ValueError(f"{name} has negative strides {array.strides} (in bytes); pass a contiguous copy")
    try:
        return torch.from_dlpack(array)
    except BufferError as error:
        raise ValueError(f"{name} cannot be taken through __dlpack__ ({error}); pass a contiguous copy") from error


def like(original: Any, result: torch.Tensor) -> Any:
    """``result`` as an array of the framework that ``original`` came from, without a copy."""
    if isinstance(original, torch.Tensor) or not hasattr(original, "__array_namespace__"):
        return result
    return original.__array_namespace__().from_dlpack(result)


def dtype_name(tensor: torch.Tensor, name: str) -> str:
    """ "float16" or "bfloat16". Raises TypeError, naming the argument, for any other element type."""
    if tensor.dtype not in DTYPE_NAMES:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; use torch.float16 or torch.bfloat16 (for example {name}.half())"
        )
    return DTYPE_NAMES[tensor.dtype]


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


def may_overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the spans of memory of two tensors meet: False is certain, True may be said of views that interlock."""
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() or not a.numel() or not b.numel():
        return False

    def span(x: torch.Tensor) -> tuple[int, int]:
        last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
        return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()

    (begin, end), (other_begin, other_end) = span(a), span(b)
    return begin < other_end and other_begin < end


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two index tuples of ``tensor``, whose last axis is contiguous, share memory."""
    width = tensor.shape[-1]
    axes = [(t, n) for t, n in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if n > 1]
    reach = width
    for stride, size in sorted(axes):
        if stride < reach:
            break
        reach += (size - 1) * stride
    else:
        return False  # each axis steps over all that the smaller ones reach, as in every common layout
    starts = torch.zeros(1, dtype=torch.int64)
    for stride, size in axes:
        starts = (starts[:, None] + stride * torch.arange(size)).flatten()
    return bool((starts.sort().values.diff() < width).any())
