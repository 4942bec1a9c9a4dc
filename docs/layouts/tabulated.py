"""The page's tables of budgets and of the main loop."""

from __future__ import annotations

from collections import Counter
from functools import partial

from cute_attn.kernels.attention_sm80 import AttentionSm80

from .banks import conflict_ways, phases, placements
from .budgets import registers, shared
from .copies import copies
from .fragments import MMAS, fragments
from .main_loop import STEPS, kernel_report, opcode_table, steady_loop
from .padding import padding
from .passports import layout_text
from .tables import merged, table
from .tiles import ARCH_NAMES, HEAD_DIM, HEAD_DIMS, LOOP_NAMES, NAMES, config_of, has

__all__ = [
    "CONFIG_DIMS", "PADDED_DIMS", "bank_table", "copy_table", "fragment_table", "loop_tables", "mma_table",
    "padding_table", "register_table", "shared_table",
]  # fmt: skip

CONFIG_DIMS = (64, 128, 192, 256)
"""Head dims that shared memory is given for."""

PADDED_DIMS = (16, 40, 72, 96, 200)
"""Head dims that padding is given for."""


def fragment_table() -> str:
    rows = []
    for mma in MMAS:
        for operand, fragment in fragments(mma).items():
            rows.append(
                (f"`{mma.title}`".replace("  ", " "), operand, "×".join(map(str, fragment.shape)),
                 layout_text(fragment.layout), fragment.registers)
            )  # fmt: skip
    return table(("MMA", "operand", "shape", "(lane, value) → index", "registers"), merged(rows))


def bank_table() -> str:
    rows = []
    for row_bytes in (HEAD_DIM, 2 * HEAD_DIM):
        for placement in placements(row_bytes):
            ways = sorted({conflict_ways(phase) for phase in phases(placement.layout)})
            passes = " or ".join(map(str, ways))
            rows.append((f"{row_bytes} B", placement.name, layout_text(placement.layout), passes))
    return table(("row", "placement", "shape:stride", "passes per ldmatrix phase"), rows)


def copy_table() -> str:
    rows = [
        (f"`{name}`", copy.what, f"`{copy.instruction}`", copy.nbytes)
        for name in NAMES
        for copy in copies(config_of(name))
    ]
    return table(("recipe", "copy", "instruction", "bytes a lane"), merged(rows))


def register_table() -> str:
    rows = []
    for name in NAMES:
        for head_dim in HEAD_DIMS:
            budget = registers(config_of(name, head_dim))
            rows.append((f"`{name}`", head_dim, *budget.parts.values(), budget.softmax, budget.used, budget.spills))
    parts = registers(config_of(NAMES[0])).parts
    return table(("recipe", "D", *parts, "between S and P", "ptxas", "spills"), rows)


def shared_table() -> str:
    rows = []
    for name in NAMES:
        for head_dim in CONFIG_DIMS:
            for arch in filter(partial(has, name), ARCH_NAMES):
                budget = shared(config_of(name, head_dim, arch), arch)
                rows.append(
                    (f"`{name}`", head_dim, f"`{arch}`", f"{budget.warps} × {budget.rows}", budget.queries,
                     f"{budget.stages} × {budget.stage}", budget.total, budget.by_shared, budget.ctas,
                     budget.ctas * budget.warps)
                )  # fmt: skip
    head = ("recipe", "D", "arch", "warps × rows", "sQ", "stages", "bytes a CTA", "CTAs by shared memory", "CTAs",
            "warps an SM")  # fmt: skip
    return table(head, merged(rows, 2))


def padding_table() -> str:
    """What head dims that are no multiple of the MMA's k, or of a lane's run of channels, are rounded up to."""
    rows = []
    for head_dim in PADDED_DIMS:
        for name in NAMES:
            p = padding(AttentionSm80(config_of(name, head_dim)))
            rows.append(
                (head_dim, f"`{name}`", p.key_dims, p.key_bytes, p.value_channels, p.nbytes, f"{100 * p.share:.0f} %",
                 p.chunks, p.runs)
            )  # fmt: skip
    head = ("D", "recipe", "K's dims", "bytes a row of K", "V's channels", "bytes a tile", "of them padding",
            "chunks read of a row", "lanes that store")  # fmt: skip
    return table(head, rows)


def loop_tables() -> str:
    return "\n\n".join(_loop_table(name) for name in LOOP_NAMES)


def mma_table() -> str:
    """Machine instructions of the MMAs of one warp and KV tile."""
    qk, pv = (step for step in STEPS if "·Kᵀ" in step or "P·V" in step)
    rows = []
    for name in NAMES:
        counts = Counter(
            (i.step, i.full) for i in steady_loop(config_of(name), "sm_80") if i.opcode in ("IMMA", "HMMA")
        )
        rows.append((f"`{name}`", *(_counted(counts, step) for step in (qk, pv))))
    return table(("recipe", qk, pv), rows)


def _counted(counts: Counter[tuple[str, str]], step: str) -> str:
    return ", ".join(f"{count} × `{opcode}`" for (at, opcode), count in sorted(counts.items()) if at == step)


def _loop_table(name: str) -> str:
    config = config_of(name)
    loop, steady = steady_loop(config, "sm_80"), kernel_report(config, "sm_80").steady
    assert steady is not None
    common, by_step = opcode_table(loop)
    columns, unit = [*common, "other"], steady.scores / 32
    rows = [
        (step, *(by_step[step][name] or "" for name in columns), f"{sum(by_step[step].values()) / unit:.2f}")
        for step in STEPS
    ]
    sums = [sum(counts[name] for counts in by_step.values()) for name in columns]
    rows.append(("**all**", *sums, f"**{len(loop) / unit:.2f}**"))
    busy = ", ".join(f"{pipe} {cycles:.1f}" for pipe, cycles in steady.floors.items())
    every = f"{steady.slots['all']:.2f} slots with the rescaling"
    note = f"`{name}`, cycles of a sub-partition per 32 scores: {busy}; {every}.\n\n"
    return note + table(("step", *columns, "slots per 32 scores"), rows)
