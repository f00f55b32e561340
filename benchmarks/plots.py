"""Draws the pictures of README.md and docs/ as SVG, from the files of docs/data/.

python benchmarks/plots.py          # writes docs/images/*.svg; the same data make the same bytes
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import click
from tables import ROOT, load

from gguf_run.runtime.bench.drawing import Drawing

IMAGES = ROOT / "docs/images"


def speed() -> str:
    """Draw bars for each tensor type: prefill and decode of both engines, with two threads."""
    rows = [row for row in load("speed")["rows"] if row["model"].startswith("llama-1b ") and row["threads"] == 2]
    rows = [row for row in rows if "isa" not in row and "depth" not in row]
    drawing, step, top = Drawing(800, 60 + 34 * len(rows) + 62), 34, 66
    drawing.text(16, 26, "Llama of 1.24 billion weights, 2 CPU cores (AMD Zen 5): tokens per second", kind="title")
    for x, kind, name in ((16, "a", "gguf-run"), (110, "b", "llama.cpp 0.5.0")):
        drawing.box(x, 38, 12, 12, kind)
        drawing.text(x + 18, 49, name)
    bottom = top + step * len(rows)
    for test, title, left, limit, every in (
        ("prefill", "prefill: a prompt of 512 tokens", 90, 500, 100),
        ("decode", "decode: token by token", 455, 80, 20),
    ):
        scale = 300 / limit
        for tick in range(0, limit + 1, every):
            drawing.line(left + tick * scale, top, left + tick * scale, bottom, "grid" if tick else "axis")
            drawing.text(left + tick * scale, bottom + 16, str(tick), "middle", "soft")
        drawing.text(left + 150, bottom + 36, f"{title}, tokens/s", "middle", "soft")
        for i, row in enumerate(rows):
            y = top + step * i
            for name, kind, shift in (("gguf-run", "a", 4), ("llama.cpp", "b", 17)):
                value = row[test][name]
                drawing.box(left, y + shift, value * scale, 12, kind, f"{name}: {value:g} tokens/s")
            end = left + max(row[test]["gguf-run"], row[test]["llama.cpp"]) * scale
            drawing.text(end + 5, y + 20, f"{row[test]['ratio']:.1f} ×", kind="soft")
    for i, row in enumerate(rows):
        drawing.text(82, top + step * i + 21, row["model"].split()[1], "end")
    return drawing.svg("Tokens per second of gguf-run and llama.cpp by tensor type")


@dataclass(frozen=True)
class Point:
    """A type with its price in bits and its mean divergence."""

    name: str
    bits: float
    kl: float
    kind: str = "a"


def quality() -> str:
    """Draw files of SmolLM2: bits per weight and divergence."""
    files = load("formats")["files"].items()
    points = [Point(name, row["bits"], row["kl_mean"]) for name, row in files if row["bits"] < 10]
    title = "Weights: how far predictions move from those of F16, by size (SmolLM2-135M)"
    return scatter(title, "bits per weight of the whole file", points, range(4, 10))


def kv_cache() -> str:
    """Draw types of KV cache that are smaller than f16: bits per number and divergence."""
    points = []
    for row in load("kv_cache")["rows"]:
        if row["memory"] < 1:
            name = row["cache"] if row["rotated"] else f"{row['cache']} unrotated"
            points.append(Point(name, 16 * row["memory"], row["kl_512"]["kl"], "a" if row["rotated"] else "c"))
    title = "KV cache: how far predictions move from those with an f32 cache, by size (SmolLM2-135M)"
    return scatter(title, "bits per number in the cache", points, range(4, 10))


def scatter(title: str, x_title: str, points: Sequence[Point], ticks: Sequence[int]) -> str:
    """Draw points: bits from the first tick on, divergence on a logarithmic scale."""
    drawing, left, top, right, bottom = Drawing(800, 460), 80, 50, 775, 405
    low = math.floor(math.log10(min(point.kl for point in points)))
    high = math.ceil(math.log10(max(point.kl for point in points)))

    def at(bits: float, kl: float) -> tuple[float, float]:
        part = (math.log10(kl) - low) / (high - low)
        x = left + (right - left) * (bits - ticks[0]) / (ticks[-1] - ticks[0])
        return x, bottom - (bottom - top) * part

    drawing.text(16, 26, title, kind="title")
    for tick in ticks:
        x = at(tick, 10**low)[0]
        drawing.line(x, top, x, bottom, "grid" if tick > ticks[0] else "axis")
        drawing.text(x, bottom + 18, str(tick), "middle", "soft")
    for power in range(low, high + 1):
        y = at(ticks[0], 10**power)[1]
        drawing.line(left, y, right, y, "grid" if power > low else "axis")
        drawing.text(left - 8, y + 4, f"{10.0**power:g}", "end", "soft")
    drawing.text((left + right) / 2, bottom + 40, x_title, "middle", "soft")
    drawing.text(left + 4, top - 6, "KL divergence (mean), logarithmic; lower is better", kind="soft")
    dots = [(*at(point.bits, point.kl), point) for point in sorted(points, key=lambda point: (-point.bits, point.kl))]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in dots]
    for x, y, point in dots:
        drawing.dot(x, y, point.kind, f"{point.name}: {point.bits:.2f} bits, KL {point.kl:.2g}")
    while dots:  # those that touch have one label
        x, y, first = dots[0]
        same = [dot for dot in dots if math.hypot(dot[0] - x, dot[1] - y) < 10 and dot[2].kind == first.kind]
        dots = [dot for dot in dots if dot not in same]
        name = ", ".join(dot[2].name for dot in same)
        place = next(_free(x, y, name, taken, (left, top, right, bottom)))
        taken.append(place)
        drawing.text((place[0] + place[2]) / 2, place[3] - 2, name, "middle")
    return drawing.svg(title)


Box = tuple[float, float, float, float]


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


PICTURES: Mapping[str, Callable[[], str]] = MappingProxyType(
    {picture.__name__: picture for picture in (speed, quality, kv_cache)}
)


@click.command()
def main() -> None:
    """Draw all pictures."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (IMAGES / f"{name}.svg").write_text(draw())


if __name__ == "__main__":
    main()
