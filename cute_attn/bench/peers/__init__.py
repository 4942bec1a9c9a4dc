"""The peers, one file each: the only places that call their packages."""

from __future__ import annotations

from cute_attn.bench.contender import Contender
from cute_attn.bench.peers.cudnn_fp8 import CudnnFp8
from cute_attn.bench.peers.flash_attn_3 import FlashAttn3Fp8
from cute_attn.bench.peers.flash_attn_4 import FlashAttn4
from cute_attn.bench.peers.sage import Sage
from cute_attn.bench.peers.sparge import Sparge
from cute_attn.bench.peers.torch_sdpa import TorchSdpa

__all__ = ["chosen_peers", "peers"]


def peers(capability: tuple[int, int]) -> dict[str, Contender]:
    """Every peer that this package can measure, installed or not, on a device of that compute capability, by name."""
    every: tuple[Contender, ...] = (
        TorchSdpa(capability, "flash"),
        TorchSdpa(capability, "cudnn"),
        FlashAttn4(capability),
        FlashAttn3Fp8(capability),
        CudnnFp8(capability),
        Sage(capability),
        Sparge(capability, 1.0),
        Sparge(capability, 0.5),
    )
    return {peer.name: peer for peer in every}


def chosen_peers(names: list[str] | None, capability: tuple[int, int]) -> list[Contender]:
    """The peers that ``--peers`` names; None: all; ["none"]: none. Raises ValueError for others."""
    known = peers(capability)
    if names == ["none"]:
        return []
    for name in names or ():
        if name not in known:
            raise ValueError(f"--peers {name} is not known; use some of {', '.join(known)}, or none")
    return [known[name] for name in (known if names is None else dict.fromkeys(names))]
