"""Draws the pictures of README.md and docs/ as SVG, from the files of docs/data/.

python benchmarks/plots.py          # writes docs/images/*.svg; the same data make the same bytes
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import click
from tables import ROOT, load

from gguf_run.runtime.bench.drawing import Drawing
from gguf_run.runtime.bench.scatter import Point, scatter

IMAGES = ROOT / "docs/images"


def speed() -> str:
    """Draw bars for each tensor type: prefill and decode of both engines, with two threads."""
    rows = [row for row in load("speed")["rows"] if row["model"].startswith("llama-1b ") and row["threads"] == 2]
    rows = [row for row in rows if "isa" not in row and "depth" not in row]
    drawing, step, top = Drawing(800, 60 + 34 * len(rows) + 62), 34, 66
    drawing.text(16, 26, "Llama of 1.24 billion weights, 2 CPU cores (AMD Zen 4): tokens per second", kind="title")
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
