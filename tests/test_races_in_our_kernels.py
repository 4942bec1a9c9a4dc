"""The race detector on our own kernels: nothing found, and every barrier, wait or commit that is taken away is."""

from __future__ import annotations

import pytest
import torch

import cute_attn
from cute_attn.emulator.errors import DataRace, MissingFence, MissingProxyFence

from .mutants import findings


@pytest.fixture(autouse=True)
def on_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")


def inputs(seq: int, head_dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 1, seq, head_dim, generator=generator).half() for _ in range(3)]


def test_attention_without_one_barrier_wait_or_commit() -> None:
    """Causal, so that the masked and the steady loop both run."""
    q, k, v = inputs(256, 64)
    found = findings(
        "AttentionSm80",
        r"bar\.sync|cp\.async\.wait_group|cp\.async\.commit_group",
        lambda: cute_attn.attention(q, k, v, causal=True, arch="sm_80"),
    )
    opcodes = [what.split()[1].rstrip(";") for what in found]
    # Of each of the two waits there are two variants: without it, and with one for all but the newest group.
    assert {opcode: opcodes.count(opcode) for opcode in {*opcodes}} == {
        "bar.sync": 2,
        "cp.async.wait_group": 4,
        "cp.async.commit_group": 3,
    }
    assert [what for what, error in found.items() if not isinstance(error, DataRace)] == []
    for what, error in found.items():
        assert ("no barrier orders" if "bar.sync" in what else "cp.async.wait_group") in str(error)


def test_attention_of_one_stage_without_one_barrier_or_wait() -> None:
    q, k, v = inputs(192, 32)
    config = cute_attn.TileConfig(stages=1, m_tiles=1)
    found = findings(
        "AttentionSm80",
        r"bar\.sync|cp\.async\.wait_group",
        lambda: cute_attn.attention(q, k, v, recipe="fp16", causal=True, config=config, arch="sm_80"),
    )
    assert sum("bar.sync" in what for what in found) == 4  # two a tile, in the masked and in the steady loop
    assert [what for what, error in found.items() if not isinstance(error, DataRace)] == []


@pytest.mark.parametrize(("recipe", "stages", "waits"), [("int8_fp8", 1, 4), ("bf16", 2, 7)])
def test_warpgroup_attention_without_one_barrier_fence_or_wait(recipe: str, stages: int, waits: int) -> None:
    """Causal, and of two CTAs one with a warpgroup that gives a tile back unread: every loop runs.

    waits: at mbarriers, of the producer, for tiles given back, and for the tiles of the masked and of the steady loop.
    As few stages as can be: whoever skips one wait takes the next tile for the one before.

    One fence says nothing new: before a steady tile's scores there is the one before the last tile's P·V, which comes
    after all that is done with the registers of scores.
    """
    q, k, v = (x.bfloat16() for x in inputs(384, 32))
    config = cute_attn.WarpgroupTileConfig(warpgroups=3, stages=stages, persistent=False)
    found = findings(
        "AttentionSm90",
        r"bar\.sync|fence\.|mbarrier\.try_wait|wgmma\.fence|wgmma\.wait_group",
        lambda: cute_attn.attention(q, k, v, recipe=recipe, causal=True, config=config, arch="sm_90a"),
    )

    def of(opcode: str) -> list[type]:
        return [type(error) for what, error in found.items() if opcode in what]

    assert of("fence.mbarrier_init") == of("fence.proxy.async") == [MissingProxyFence]
    assert of("bar.sync") == [DataRace, DataRace]  # the mbarriers' initialisation, and Q
    assert of("wgmma.fence") == [MissingFence, MissingFence, type(None), MissingFence]
    assert len(of("mbarrier.try_wait")) == waits
    assert len(of("wgmma.wait_group")) == 8  # without it, or with all but the newest, of scores and P·V in both loops
    assert type(None) not in of("mbarrier.try_wait") + of("wgmma.wait_group")


def test_quantiser_without_one_barrier() -> None:
    q, k, v = inputs(128, 64)
    found = findings("KeyValueTiles", r"bar\.sync", lambda: cute_attn.quantize(q, k, v, arch="sm_80"))
    assert [what for what, error in found.items() if not isinstance(error, DataRace)] == []


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("causal, seq, head_dim", [(False, 200, 128), (True, 333, 64)])
def test_nothing_is_found_in_any_order(seed: int | None, causal: bool, seq: int, head_dim: int) -> None:
    q, k, v = inputs(seq, head_dim)
    usual = cute_attn.attention(q, k, v, causal=causal, arch="sm_80")
    with cute_attn.emulator.settings(seed=seed, races=True):
        assert torch.equal(cute_attn.attention(q, k, v, causal=causal, arch="sm_80"), usual)
