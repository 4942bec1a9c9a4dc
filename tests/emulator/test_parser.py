"""The PTX parser: declarations that stand for something else, and the directives of an entry."""

from __future__ import annotations

import numpy as np

from cute_attn.emulator.parser import parse

from .harness import run


def test_vector_registers_in_a_scope() -> None:
    """As the CuTe DSL's inline assembly declares them; a second scope may use the name again."""
    out = np.zeros(8, np.uint32)
    run(
        """
        setp.eq.u32 %p1, %r50, 0;
        {
            .reg .v4 .s32 abcd;
            mov.s32 abcd.x, 10; mov.s32 abcd.y, 20; mov.s32 abcd.z, 30; mov.s32 abcd.w, 40;
            @%p1 st.global.v4.s32 [%rd0], abcd;
        }
        {
            .reg .v2 .b32 abcd, other;
            mov.b32 abcd.x, 50; mov.b32 abcd.y, 60; mov.b32 other.y, 80;
            add.u32 other.x, abcd.x, 20;
            @%p1 st.global.v2.b32 [%rd0+16], abcd;
            @%p1 st.global.v2.b32 [%rd0+24], other;
        }
        """,
        {"out": out},
    )
    assert out.tolist() == [10, 20, 30, 40, 50, 60, 70, 80]


def test_directives_of_clusters() -> None:
    kernels = parse(
        """
.version 8.8
.target sm_90a
.address_size 64
.visible .entry plain() { ret; }
.visible .entry fixed() .reqntid 128, 1, 1 .explicitcluster .reqnctapercluster 2, 1, 1 { ret; }
.visible .entry bounded() .explicitcluster .maxclusterrank 8 { ret; }
"""
    )
    found = {name: (k.required_cluster, k.needs_cluster, k.max_cluster) for name, k in kernels.items()}
    assert found == {
        "plain": (None, False, None),
        "fixed": ((2, 1, 1), True, None),
        "bounded": (None, True, 8),
    }
    assert kernels["fixed"].required_block == (128, 1, 1)
