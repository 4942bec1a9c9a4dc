"""The page's tables."""

from __future__ import annotations

from cute_attn.arch import ARCHS
from cute_attn.kernels.kv_ring import KvRing
from cute_attn.kernels.swizzled_tile import SwizzledTile
from cute_attn.kernels.warpgroup_mma import ROWS
from cute_attn.kernels.warpgroup_recipes import WARPGROUP_RECIPES
from cute_attn.recipe import recipes
from cute_attn.report import LoopReport

from ..passports import layout_text
from ..tables import merged, table
from .cores import conflicts, operands
from .fragments import p_operand, s_accumulator, sums_accumulator
from .kernels import ARCH, HEAD_DIMS, NAMES, elsewhere, kernel_of, kernel_report
from .machine import barriers, roles
from .operands import parts_of_v, register_tensors

__all__ = [
    "barrier_table", "cost_table", "elsewhere_table", "fragment_table", "operand_table", "recipe_table",
    "register_table", "role_table", "shared_table", "waits",
]  # fmt: skip

_WARP = 32


def role_table() -> str:
    """Threads and registers of the roles, for every number of consumer warpgroups that a default tile config has."""
    rows = []
    for name in NAMES:
        for head_dim in HEAD_DIMS:
            kernel, registers = kernel_of(name, head_dim), roles(name, head_dim)
            groups = kernel.config.warpgroups
            total = kernel.consumers * registers.consumer + (kernel.threads - kernel.consumers) * registers.producer
            rows.append((f"`{name}`", head_dim, groups, groups * ROWS, kernel.threads, registers.consumer,
                         registers.producer, total))  # fmt: skip
    head = ("recipe", "D", "consumer warpgroups", "query rows", "threads", "registers of a consumer",
            "of a producer thread", "of the CTA")  # fmt: skip
    return table(head, merged(rows))


_ARRIVALS = {
    "full": ("the producer: `arrive.expect_tx`, and the bytes of the copy", "consumers, before they read the stage"),
    "empty": ("lane 0 of every consumer warp that has read the stage", "the producer, before it asks for a tile"),
    "own": ("the producer", "the producer, for a last tile of V that it has to clear (`TensorTiles`)"),
    "queue full": ("the producer, when it has written the number of a block", "consumers, before they read it"),
    "queue empty": ("lane 0 of every consumer warp, after its main loop", "the producer, before it writes there again"),
}


def barrier_table() -> str:
    """The mbarriers as programs with three, two and one warpgroups initialise them."""
    rows = []
    for name, head_dim in (("int8_fp8", 128), ("int8_fp8", 256), ("int8_fp16", 256)):
        found, config = barriers(name, head_dim), kernel_of(name, head_dim).config
        counts = {
            "full": found.full,
            "empty": found.empty,
            "own": (found.own,),
            "queue full": found.queue_full,
            "queue empty": found.queue_empty,
        }
        for which, arrivals in counts.items():
            (count,) = set(arrivals)
            rows.append((f"{config.warpgroups}", config.stages, f"{which}, {len(arrivals)}", count, *_ARRIVALS[which]))
    head = ("warpgroups", "stages", "barrier, how many", "arrivals a phase", "who arrives", "who waits")
    return table(head, rows)


def recipe_table() -> str:
    """What the recipes bring to the one main loop."""
    rows = []
    for name, recipe in WARPGROUP_RECIPES.items():
        kernel = kernel_of(name)
        image = kernel.image
        s, p = s_accumulator(name), p_operand(name)
        tiles = "TMA, one copy for 64 channels" if isinstance(image, SwizzledTile) else "one bulk copy of the image"
        keys = image.values if isinstance(image, SwizzledTile) else image.keys
        sums = "MMA, rows of ones" if image.sum_rows else "additions of the rounded P"
        parts = " + ".join(map(str, parts_of_v(name)))
        scale = recipes()[name].qk_scale or "–"
        rows.append((
            f"`{name}`", f"{keys}, {s.shape[1]} keys", f"{image.values}, k{p.shape[1]}, N {parts}", recipe.accumulate,
            sums, scale, tiles, "K and V" if recipe.turns == 1 else "K or V, by turns",
        ))  # fmt: skip
    head = ("recipe", "Q·Kᵀ", "P·V", "accumulate", "row sums", "`qk_scale`", "how a tile comes", "a stage has")
    return table(head, merged(rows))


_REASONS = {
    "smooth_q": "nothing in this main loop adds what smoothing Q took off the scores",
    "accumulate": "sums of warpgroup MMAs are float32 or int32 here",
}


def elsewhere_table() -> str:
    rows = [
        (f"`{field}={value}`", ", ".join(f"`{name}`" for name in names), fate, _REASONS[field])
        for (field, value), fates in elsewhere().items()
        for fate, names in fates.items()
    ]
    return table(("changed field", "of recipes", f"on {ARCH}", "why"), rows)


def operand_table() -> str:
    rows = [
        (o.name, f"{o.major}-major", f"{o.swizzle_bytes} B", f"8 × {o.swizzle_bytes} B", o.stride, o.leading or "–",
         _starts(o.starts), conflicts(o))
        for o in operands()
    ]  # fmt: skip
    head = ("operand", "major", "swizzle", "core", "stride (bytes)", "leading (bytes)", "instructions of k", "passes")
    return table(head, rows)


def _starts(starts: tuple[int, ...]) -> str:
    step = starts[1] - starts[0]
    other = next((i for i, start in enumerate(starts) if start != i * step), None)
    return f"{len(starts)}, {step} B apart" + (f"; number {other} at {starts[other]} B" if other else "")


def fragment_table() -> str:
    rows = []
    for name in ("int8_fp8", "int8_fp16", "bf16"):
        for what, fragment in (
            ("S", s_accumulator(name)), ("P, one k", p_operand(name)), ("P·V", sums_accumulator(name)),
        ):  # fmt: skip
            rows.append((f"`{name}`", what, "×".join(map(str, fragment.shape)), layout_text(fragment.layout),
                         fragment.registers))  # fmt: skip
    return table(("recipe", "fragment", "shape", "(thread, value) → index", "registers"), merged(rows))


def shared_table() -> str:
    rows = []
    for name in NAMES:
        for head_dim in HEAD_DIMS:
            kernel = kernel_of(name, head_dim)
            config = kernel.config
            rows.append((f"`{name}`", head_dim, f"{config.warpgroups} × {kernel.q_bytes}",
                         f"{config.stages} × {kernel.stage_bytes}", KvRing.barrier_bytes(config.stages),
                         kernel.shared_bytes, ARCHS[ARCH].shared_bytes - kernel.shared_bytes))  # fmt: skip
    head = ("recipe", "D", "sQ: warpgroups × bytes", "stages × bytes", "barriers", "bytes a CTA", "left")
    return table(head, merged(rows))


def register_table() -> str:
    rows = []
    for name in NAMES:
        for head_dim in HEAD_DIMS:
            held = {key: tensor.registers for key, tensor in register_tensors(name, head_dim).items()}
            kernel = kernel_report(name, head_dim)
            softmax = held["O"] + held["S"]
            product = held["O"] + held["P"] + held.get("PV", 0)
            rows.append((f"`{name}`", head_dim, held["O"], held["S"], held["P"], held.get("PV", "–"), softmax, product,
                         roles(name, head_dim).consumer, kernel.highest_register + 1))  # fmt: skip
    head = ("recipe", "D", "O", "S", "P", "PV", "O + S", "O + P + PV", "a consumer may have", "used")
    return table(head, merged(rows))


def waits(loop: LoopReport) -> int:
    """How often an iteration waits for the tensor cores."""
    return sum(instruction.opcode.startswith("WARPGROUP.DEPBAR") for instruction in loop.instructions)


_PIPES = {"xu": "XU", "alu": "ALU", "fma": "FMA", "lsu": "LSU"}


def cost_table() -> str:
    rows = []
    for name in NAMES:
        for head_dim in HEAD_DIMS:
            kernel = kernel_report(name, head_dim)
            steady = kernel.steady
            assert steady is not None
            floors = steady.floors
            most = max(steady.slots["fast"], *floors.values())
            bound = [_PIPES.get(pipe, pipe) for pipe, cycles in floors.items() if cycles == most] or ["issue"]
            cells = (f"{floors[pipe]:.2f}" for pipe in ("tensor", "xu", "alu", "fma"))
            rows.append((f"`{name}`", head_dim, f"{steady.slots['fast']:.2f}", f"{steady.slots['all']:.2f}", *cells,
                         ", ".join(bound), waits(steady), kernel.highest_register, steady.spills))  # fmt: skip
    head = ("recipe", "D", "slots", "with rescaling", "tensor", "XU", "ALU", "FMA", "largest", "waits",
            "highest register", "spills")  # fmt: skip
    return table(head, rows)
