"""membar and fence: memory operations are performed in program order, so they matter to the race detector only.

PTX ISA, "Parallel Synchronization and Communication Instructions: membar / fence".
"""

from __future__ import annotations

from typing import Any

from ..codegen import BlockBuilder
from ..module import Instruction
from ..registry import emits, helper
from ..wave import Group

_SEMANTICS = "sc acq_rel acquire release cta cluster gpu sys gl"
_RESTRICTED = "sync_restrict::shared::cta sync_restrict::shared::cluster"


@emits("membar", "fence", modifiers=f"{_SEMANTICS} {_RESTRICTED}")
def thread_fence(b: BlockBuilder, i: Instruction) -> None:
    b.effect(f"memory_fence(G, {b.mask})")


@emits("fence.mbarrier_init", modifiers="release cluster")
def barrier_fence(b: BlockBuilder, i: Instruction) -> None:
    """Makes the initialisation of mbarriers visible, to other CTAs and to the async proxy."""
    b.effect(f"proxy_fence(G, {b.mask}, True)")
    b.effect(f"memory_fence(G, {b.mask})")


@emits("fence.proxy.async", modifiers=f"global shared::cta shared::cluster {_RESTRICTED}")
@emits("fence.proxy.async::generic", modifiers=f"acquire release cta cluster gpu sys {_RESTRICTED}")
def async_fence(b: BlockBuilder, i: Instruction) -> None:
    """Between the generic and the async proxy; the one of global memory does nothing for shared memory."""
    if "global" not in i.parts:
        b.effect(f"proxy_fence(G, {b.mask}, False)")


@emits(
    "fence.proxy", "membar.proxy", modifiers=f"alias generic::async tensormap::generic generic::tensormap {_SEMANTICS}"
)
def other_fence(b: BlockBuilder, i: Instruction) -> None:
    """Proxies of constants, textures, aliases and tensor maps are not told apart here."""


@helper
def memory_fence(group: Group, mask: Any) -> None:
    if (races := group.wave.races) is not None:
        races.fence(group.lanes_where(mask))


@helper
def proxy_fence(group: Group, mask: Any, barriers_only: bool) -> None:
    if (races := group.wave.races) is not None:
        races.fence_proxy(group.lanes_where(mask), barriers_only=barriers_only)
