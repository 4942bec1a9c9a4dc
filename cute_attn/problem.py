"""The problem of one attention call: shapes, element type, mask."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DTYPES", "LAYOUTS", "Problem"]

DTYPES = ("float16", "bfloat16")
LAYOUTS = ("bhsd", "bshd")


@dataclass(frozen=True)
class Problem:
    """Shapes and mask of one attention forward. Sizes are in elements.

    batch:            B
    heads, kv_heads:  query heads Hq and key/value heads Hkv; Hq is a multiple of Hkv (grouped-query attention)
    seq_q, seq_k:     tokens of Q, and of K and V
    head_dim:         D, the same for Q, K and V
    dtype:            element type of Q, K, V and the output: "float16" or "bfloat16"
    causal:           query i sees the keys j ≤ i + seq_k − seq_q (aligned bottom-right)

    Raises ValueError, naming the field, when the numbers contradict each other, TypeError for sizes that are no ints.
    """

    batch: int
    heads: int
    kv_heads: int
    seq_q: int
    seq_k: int
    head_dim: int
    dtype: str
    causal: bool = False

    def __post_init__(self) -> None:
        for field in ("batch", "heads", "kv_heads", "seq_q", "seq_k", "head_dim"):
            if not isinstance(getattr(self, field), int):
                raise TypeError(f"{field} must be an int, got {getattr(self, field)!r}")
        for field in ("batch", "seq_q", "seq_k"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} is negative")
        for field in ("heads", "kv_heads", "head_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}; at least 1 is needed")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} query heads cannot share {self.kv_heads} key/value heads: "
                "the number of query heads must be a multiple of the number of key/value heads"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not offered; use {' or '.join(DTYPES)}")

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def flops(self) -> int:
        """4·B·Hq·Sq·Sk·D, half of it when causal: the field's convention for TFLOPS and TOPS."""
        full = 4 * self.batch * self.heads * self.seq_q * self.seq_k * self.head_dim
        return full // 2 if self.causal else full
