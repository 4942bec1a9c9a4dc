"""Figure of the steady loop, instruction by instruction in the order of the machine code."""

from __future__ import annotations

from cute_attn.pipe_costs import classify

from .main_loop import STEPS, steady_loop
from .svg import FAINT, INK, PALE, Svg
from .tiles import HEAD_DIM, LOOP_NAMES, config_of

__all__ = ["draw_loop"]

_COLOURS = {
    "tensor": "#2f6db3",
    "shared load": "#e0852b",
    "fp32": "#3f9d5b",
    "mufu": "#c2417c",
    "convert": "#8b6bc4",
    "fp16": "#8b6bc4",
    "integer": "#7d8590",
    "asynchronous": "#b3a11f",
}
_LEGEND = {
    "tensor": "MMA",
    "shared load": "LDSM, LDS",
    "fp32": "FFMA, FMNMX",
    "mufu": "MUFU.EX2",
    "convert": "packing",
    "integer": "integer, other",
    "asynchronous": "cp.async",
}
_WIDE, _ROW = 880, 17


def draw_loop() -> Svg:
    """One panel per recipe: a tick per instruction, in the row of its step."""
    left, top = 190, 112
    panel = len(STEPS) * _ROW + 62
    svg = Svg(left + _WIDE + 36, top + len(LOOP_NAMES) * panel - 10, "The steady loop, instruction by instruction")
    svg.heading(
        24,
        28,
        f"The steady loop: one warp, one KV tile, head dim {HEAD_DIM}, sm_80",
        "a tick is one machine instruction, in the order of its address, in the row of the step that it serves",
    )
    x = 24.0
    for kind, label in _LEGEND.items():
        svg.rect(x, 64, 12, 12, _COLOURS[kind], line=0, radius=2)
        svg.text(x + 18, 70, label, anchor="start", fill=FAINT)
        x += 44 + 7 * len(label)
    for i, name in enumerate(LOOP_NAMES):
        _draw(svg, name, left, top + i * panel)
    return svg


def _draw(svg: Svg, name: str, x: float, y: float) -> None:
    loop = steady_loop(config_of(name), "sm_80")
    unit = _WIDE / len(loop)
    svg.text(24, y, name, anchor="start", bold=True, size=12.5)
    svg.text(x, y, f"{len(loop)} instructions, without the rescaling", anchor="start", fill=FAINT, prose=True)
    y += 16
    for i, step in enumerate(STEPS):
        svg.rect(x, y + i * _ROW, _WIDE, _ROW - 3, PALE, line=0)
        svg.text(x - 8, y + (i + 0.4) * _ROW, step, anchor="end", size=10, fill=INK)
        for colour in dict.fromkeys(_COLOURS.values()):
            ticks = [at for at, placed in enumerate(loop) if placed.step == step and _colour(placed.opcode) == colour]
            d = "".join(f"M{x + (at + 0.5) * unit:.1f} {y + i * _ROW:g}v{_ROW - 3}" for at in ticks)
            if d:
                svg.path(d, colour, round(unit * 0.8, 2))


def _colour(opcode: str) -> str:
    return _COLOURS.get(classify(opcode), _COLOURS["integer"])
