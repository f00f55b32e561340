"""A picture of lines through points: how some numbers go on, on scales that begin near the least of them."""

from collections.abc import Mapping, Sequence

from gguf_run.runtime.bench.drawing import Drawing
from gguf_run.runtime.bench.scatter import round_ticks

_COLOURS = ("#2f81f7", "#db6d28", "#8b949e")


def curves(title: str, x_title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Draw up to three lines, by their names; x begins at 0. A line without points has a name alone."""
    drawing, left, top, right, bottom = Drawing(800, 400), 70, 50, 775, 345
    points = [point for line in lines.values() for point in line]
    ticks = round_ticks(min(y for _, y in points), max(y for _, y in points))
    last = max(x for x, _ in points) or 1

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / last, bottom - (bottom - top) * (y - ticks[0]) / (ticks[-1] - ticks[0])

    drawing.text(16, 26, title, kind="title")
    for tick in ticks:
        y = at(0, tick)[1]
        drawing.line(left, y, right, y, "grid" if tick > ticks[0] else "axis")
        drawing.text(left - 8, y + 4, f"{tick:g}", "end", "soft")
    for part in range(5):
        drawing.text(at(last * part / 4, ticks[0])[0], bottom + 18, f"{last * part / 4:g}", "middle", "soft")
    drawing.text((left + right) / 2, bottom + 40, x_title, "middle", "soft")
    for i, ((name, line), colour) in enumerate(zip(lines.items(), _COLOURS, strict=False)):
        drawing.curve([at(x, y) for x, y in line], colour)
        drawing.curve([(right - 100, top + 14 + 18 * i), (right - 80, top + 14 + 18 * i)], colour)
        drawing.text(right - 74, top + 18 + 18 * i, name, kind="soft")
    return drawing.svg(title)
