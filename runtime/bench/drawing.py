"""A picture as SVG.

Text stays text. Colours follow the reader's light or dark mode, and a card as background keeps them readable in both.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape

_STYLE = """text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 14px; font-weight: 600 } .soft { fill: #59636e }
.card { fill: #ffffff; stroke: #d1d9e0 } .grid { stroke: #d1d9e0 } .axis { stroke: #59636e }
.a { fill: #0969da } .b { fill: #b0b8c1 } .c { fill: #bc4c00 }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc } .soft { fill: #9198a1 }
.card { fill: #0d1117; stroke: #3d444d } .grid { stroke: #3d444d } .axis { stroke: #9198a1 }
.a { fill: #4493f8 } .b { fill: #656c76 } .c { fill: #f0883e }
}"""


@dataclass
class Drawing:
    """The elements of one picture. Sizes are in pixels."""

    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> None:
        """Add a text. anchor: which part of the text is at x, "start", "middle" or "end". kind: a class of _STYLE."""
        kind = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, title: str = "") -> None:
        size = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        self.parts.append(f'<rect {size} class="{kind}"><title>{escape(title)}</title></rect>')

    def line(self, x0: float, y0: float, x1: float, y1: float, kind: str) -> None:
        self.parts.append(f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="{kind}"/>')

    def curve(self, points: Iterable[tuple[float, float]], colour: str) -> None:
        """Add a line through points. colour: one of the middle tones, which both modes can show."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')

    def dot(self, x: float, y: float, kind: str, title: str) -> None:
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{kind}"><title>{escape(title)}</title></circle>'
        )

    def svg(self, title: str) -> str:
        """Return the file. title: what screen readers say."""
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        card = f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="6" class="card"/>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escape(title)}</title>'
        return "\n".join([head, f"<style>\n{_STYLE}\n</style>", card, *self.parts, "</svg>\n"])
