"""A picture of points: what something costs, and how far predictions move for it, on a logarithmic scale."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from gguf_run.runtime.bench.drawing import Drawing

Box = tuple[float, float, float, float]
_COLOURS = {"a": "#2f81f7", "b": "#8b949e", "c": "#db6d28"}  # of a line whose points have this class


@dataclass(frozen=True)
class Point:
    """A name with its price and its mean divergence."""

    name: str  # "": none is drawn
    price: float
    kl: float  # more than 0
    kind: str = "a"  # a class of drawing.py
    line: str = ""  # points of one line are joined


def round_ticks(low: float, high: float) -> list[float]:
    """Return four to ten round numbers at equal distances, from one below `low` to one above `high`."""
    span = max(high - low, high / 10)
    step = next(s * 10.0**p for p in range(-9, 12) for s in (1, 2, 5) if span <= 7 * s * 10.0**p)
    first = math.floor(low / step - 0.2)
    return [i * step for i in range(first, math.ceil(high / step + 0.2) + 1)]


def scatter(title: str, x_title: str, points: Sequence[Point], ticks: Sequence[float], unit: str = "bits") -> str:
    """Draw points: the price from the first tick on, divergence on a logarithmic scale. unit: of the price."""
    drawing, left, top, right, bottom = Drawing(800, 460), 80, 50, 775, 405
    low = math.floor(math.log10(min(point.kl for point in points)))
    high = max(low + 1, math.ceil(math.log10(max(point.kl for point in points))))

    def at(price: float, kl: float) -> tuple[float, float]:
        part = (math.log10(kl) - low) / (high - low)
        x = left + (right - left) * (price - ticks[0]) / (ticks[-1] - ticks[0])
        return x, bottom - (bottom - top) * part

    drawing.text(16, 26, title, kind="title")
    for tick in ticks:
        x = at(tick, 10**low)[0]
        drawing.line(x, top, x, bottom, "grid" if tick > ticks[0] else "axis")
        drawing.text(x, bottom + 18, f"{tick:g}", "middle", "soft")
    for power in range(low, high + 1):
        y = at(ticks[0], 10**power)[1]
        drawing.line(left, y, right, y, "grid" if power > low else "axis")
        drawing.text(left - 8, y + 4, f"{10.0**power:g}", "end", "soft")
    drawing.text((left + right) / 2, bottom + 40, x_title, "middle", "soft")
    drawing.text(left + 4, top - 6, "KL divergence (mean), logarithmic; lower is better", kind="soft")
    dots = [(*at(point.price, point.kl), point) for point in sorted(points, key=lambda point: (-point.price, point.kl))]
    for i, name in enumerate(dict.fromkeys(point.line for point in points if point.line)):
        line = [(x, y) for x, y, point in dots if point.line == name]
        colour = _COLOURS[next(point.kind for point in points if point.line == name)]
        drawing.curve(line, colour)
        drawing.curve([(right - 200, top + 14 + 18 * i), (right - 180, top + 14 + 18 * i)], colour)
        drawing.text(right - 174, top + 18 + 18 * i, name, kind="soft")
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in dots]
    for x, y, point in dots:
        drawing.dot(x, y, point.kind, f"{point.name or point.line}: {point.price:.4g} {unit}, KL {point.kl:.2g}")
    dots = [dot for dot in dots if dot[2].name]
    while dots:  # those that touch have one label
        x, y, first = dots[0]
        same = [dot for dot in dots if math.hypot(dot[0] - x, dot[1] - y) < 10 and dot[2].kind == first.kind]
        dots = [dot for dot in dots if dot not in same]
        name = ", ".join(dot[2].name for dot in same)
        place = next(_free(x, y, name, taken, (left, top, right, bottom)))
        taken.append(place)
        drawing.text((place[0] + place[2]) / 2, place[3] - 2, name, "middle")
    return drawing.svg(title)


def _free(x: float, y: float, name: str, taken: Iterable[Box], frame: Box) -> Iterator[Box]:
    """Yield places for the name of a dot that cover nothing, the best first. The last place may cover something."""
    width = 7 * len(name)
    for far in range(0, 60, 6):
        for dx, dy in ((7 + far, 0), (-7 - far - width, 0), (-width / 2, -13 - far), (-width / 2, 13 + far)):
            box = (x + dx, y + dy - 6, x + dx + width, y + dy + 6)
            inside = frame[0] < box[0] and frame[1] < box[1] and box[2] < frame[2] and box[3] < frame[3]
            if inside and all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken):
                yield box
    yield x + 7, y - 6, x + 7 + width, y + 6
