"""A drawing surface that writes SVG: shapes, monospaced labels, one palette, the same bytes every time."""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.sax.saxutils import escape

__all__ = ["CARD", "FAINT", "GRID", "INK", "LANES", "PALE", "ROWS", "Svg"]

INK, FAINT, GRID, CARD, PALE = "#1f2430", "#6b7280", "#c9ccd3", "#fcfbf8", "#eeedea"

LANES = ("#8ec3f0", "#f7c36b", "#93d3a2", "#e5a3c8")
"""One colour per lane of a quad (t = lane % 4), told apart also without colour vision."""

ROWS = ("#8ec3f0", "#f7c36b", "#93d3a2", "#e5a3c8", "#c3b1ec", "#f2a08a", "#9fd9d9", "#d6cf7a")
"""One colour per row of an ldmatrix phase."""

_STYLE = (
    "text{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace}"
    ".p{font-family:system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif}"
)


@dataclass
class Svg:
    """One figure on a card of its own background, so that it reads on light and on dark pages."""

    width: int
    height: int
    title: str
    parts: list[str] = field(default_factory=list)

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = "none",
        *,
        stroke: str = GRID,
        line: float = 1,
        radius: float = 0,
        opacity: float = 1,
    ) -> None:
        round_ = f' rx="{radius:g}"' if radius else ""
        edge = f' stroke="{stroke}" stroke-width="{line:g}"' if line else ""
        edge += f' opacity="{opacity:g}"' if opacity < 1 else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"{round_} fill="{fill}"{edge}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: object,
        *,
        size: float = 11,
        fill: str = INK,
        anchor: str = "middle",
        bold: bool = False,
        prose: bool = False,
    ) -> None:
        """One line of text; ``y`` is its middle."""
        kind = ' class="p"' if prose else ""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y + size * 0.36:g}" font-size="{size:g}" fill="{fill}" text-anchor="{anchor}"'
            f"{kind}{weight}>{escape(str(text))}</text>"
        )

    def heading(self, x: float, y: float, text: str, note: str = "") -> None:
        """A panel's title, and what it shows in smaller letters."""
        self.text(x, y, text, size=13, anchor="start", bold=True, prose=True)
        if note:
            self.text(x, y + 18, note, size=11, anchor="start", fill=FAINT, prose=True)

    def path(self, d: str, stroke: str, line: float = 1.5) -> None:
        self.parts.append(f'<path d="{d}" fill="none" stroke="{stroke}" stroke-width="{line:g}"/>')

    def curve(self, x0: float, y0: float, x1: float, y1: float, stroke: str, line: float = 1.5) -> None:
        """A smooth vertical connection."""
        half = (y0 + y1) / 2
        self.path(f"M{x0:g} {y0:g}C{x0:g} {half:g} {x1:g} {half:g} {x1:g} {y1:g}", stroke, line)

    def render(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style>"
            f'<rect width="{self.width}" height="{self.height}" rx="10" fill="{CARD}"/>'
        )
        return "\n".join([head, *self.parts, "</svg>"]) + "\n"
