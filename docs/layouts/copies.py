"""How many bytes a lane moves with one instruction, read off the copy atoms and the layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cute_attn.kernels.atoms import cp_async_atom, ldmatrix_atom
from cute_attn.kernels.attention_sm80 import AttentionConfig, AttentionSm80
from cute_attn.kernels.epilogue import OUTPUT_VECTOR

from .fragments import fragments
from .tiles import mmas_of
from .tracing import while_tracing

__all__ = ["Copy", "copies"]

_OUTPUT_BYTES = 2


@dataclass(frozen=True)
class Copy:
    """what: tensors; instruction: as SASS names it, with its width; nbytes: of a lane."""

    what: str
    instruction: str
    nbytes: int


def _vector(name: str, nbytes: int) -> str:
    return f"{name}.{8 * nbytes}" if nbytes > 4 else name


def copies(config: AttentionConfig) -> tuple[Copy, ...]:
    """From global to shared memory, into registers, and out."""

    def read() -> Any:
        bulk, matrices = cp_async_atom(), ldmatrix_atom()
        return bulk.layout_src_tv.shape[1], matrices.layout_src_tv.shape[1]

    bulk, row = while_tracing(read)
    kernel = AttentionSm80(config)
    found = [
        Copy("KV tiles and Q, global → shared", _vector("LDGSTS.E.BYPASS", bulk), bulk),
        Copy("Q, K and V, shared → registers", "LDSM.16.M(T)88.4", row),
    ]
    if kernel.recipe.quantised:
        c = fragments(mmas_of(config)[0])["C"]
        tokens = {kernel.image.score_tokens(c.place(0, e)[1], n) for n in range(2) for e in range(2)}
        assert tokens == set(range(len(tokens))), "a lane's tokens are not neighbours"
        found.append(Copy("K's scales, shared → registers", _vector("LDS", 4 * len(tokens)), 4 * len(tokens)))
    if kernel.delta_blocks:
        found += [
            Copy("delta, global → shared", _vector("LDGSTS.E.BYPASS", bulk), bulk),
            Copy("delta, shared → registers", _vector("LDS", 4 * len(tokens)), 4 * len(tokens)),
        ]
    run = _OUTPUT_BYTES * OUTPUT_VECTOR
    return (*found, Copy("O, registers → global", _vector("STG.E", run), run))
