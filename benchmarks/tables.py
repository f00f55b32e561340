"""Writes the measured tables of README.md and docs/, each between two marks, from the files of docs/data/.

    python benchmarks/tables.py         # after a measurement; benchmarks/plots.py then draws the pictures

A table begins at an HTML comment with its name, `table: speed`, and ends at the next comment `end`.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SHOWN = ("SmolLM2-135M Q4_1", "Gemma 3 270M Q4_K_M", *(f"llama-1b {type}" for type in ("Q4_0", "Q4_K_M", "Q8_0")))
_MARK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(\n<!-- end -->)", re.DOTALL)
# When to choose a type, said once.
_WHEN = {
    "F32": "norms and biases; nothing is gained for matrices",
    "F16": "the original, for what is quantized later",
    "BF16": "the original of models trained in it: its range, fewer digits",
    "Q8_0": "hardly to be told from F16, half the size",
    "Q6_K": "nearly as good as Q8_0, a quarter smaller",
    "Q5_K": "good; where Q4_K is seen to lose",
    "Q4_K": "the usual choice (as Q4_K_M)",
    "Q3_K": "when Q4_K does not fit; with an importance matrix",
    "Q2_K": "the last resort; with an importance matrix",
    "Q4_0": "simple and fast; rows that 256 does not divide",
    "Q4_1": "as Q4_0, with a minimum; what AWQ and GPTQ become",
    "Q5_0": "stands in for Q4_K where 256 does not divide rows",
    "Q5_1": "stands in for Q5_K where 256 does not divide rows",
    "IQ4_NL": "better than Q4_0 at its size; rows that 256 does not divide",
    "IQ4_XS": "smaller than Q4_K, nearly as good",
    "MXFP4": "gpt-oss, whose experts were trained in it",
    "NVFP4": "checkpoints that NVIDIA's tools quantized",
    "TQ1_0": "models trained with weights -1, 0, 1 only",
    "TQ2_0": "as TQ1_0, simpler blocks",
}


def load(name: str) -> dict[str, Any]:
    """Return the contents of docs/data/NAME.json."""
    data: dict[str, Any] = json.loads((ROOT / "docs/data" / f"{name}.json").read_text())
    return data


def markdown(head: str, rows: Iterable[Iterable[object]]) -> str:
    """Return a table. head: as "model | prefill"."""
    names = head.split(" | ")
    lines = [names, ["---"] * len(names), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |".replace("  ", " ").replace("|---", "| ---") for line in lines)


def speed() -> str:
    """Return all rows against llama.cpp."""
    return _speed(load("speed")["rows"])


def speed_zen5() -> str:
    """Return the same of an older version on another CPU."""
    return _speed(load("speed_zen5")["rows"])


def speed_short() -> str:
    """Return some rows of two threads."""
    rows = {row["model"]: row for row in reversed(load("speed")["rows"]) if row["threads"] == 2 and not _limits(row)}
    return _speed([rows[name] for name in SHOWN])


def _limits(row: Mapping[str, Any]) -> list[str]:
    return [row["isa"]] if "isa" in row else [f"depth {row['depth']}"] if "depth" in row else []


def _speed(rows: Iterable[Mapping[str, Any]]) -> str:
    def cells(row: Mapping[str, Any]) -> Iterator[object]:
        yield from (row["model"], ", ".join([str(row["threads"]), *_limits(row)]))
        for test in ("prefill", "decode"):
            yield from (f"{row[test]['llama.cpp']:.4g}", f"{row[test]['gguf-run']:.4g}", f"{row[test]['ratio']:.2f}")
        yield f"{row['of_read']:.0%}"

    tests = "llama.cpp | gguf-run | ratio"
    return markdown(f"model | threads | prefill: {tests} | decode: {tests} | of a plain read", map(cells, rows))


def kv_cache() -> str:
    """Return every type of KV cache with its default rotation, and some without rotation."""
    rows = load("kv_cache")["rows"]
    return _kv_cache(rows)


def kv_cache_short() -> str:
    """Return the types of KV cache that were also timed."""
    return _kv_cache([row for row in load("kv_cache")["rows"] if "decode_ms" in row])


def _kv_cache(rows: Iterable[Mapping[str, Any]]) -> str:
    def kl(found: Mapping[str, Any] | None, chunks: int) -> str:
        return "" if found is None else f"{found['kl']:.2g}{'' if found['chunks'] == chunks else ' *'}"

    def cells(row: Mapping[str, Any]) -> Iterator[object]:
        plain = row["rotated"] or row["cache"] in ("f16", "bf16")
        yield from (row["cache"] + ("" if plain else " -"), f"{row['memory']:.2f}")
        yield from (kl(row.get("kl_512"), 64), kl(row.get("kl_4096"), 8), kl(row.get("peer_kl_512"), 15))
        yield from (f"{row[key]:g}" if key in row else "" for key in ("decode_ms", "pair_peer_ms", "pair_ratio"))

    head = "cache | memory | KL, 512 | KL, 4,096 | llama.cpp, 512 | ms a token | llama.cpp | ratio of the pair"
    return markdown(head, map(cells, rows))


def formats() -> str:
    """Return every tensor type."""
    timed = {row["model"]: row for row in reversed(load("speed")["rows"]) if row["threads"] == 2 and not _limits(row)}

    def cells(name: str, row: Mapping[str, Any]) -> Iterator[object]:
        yield from (name, f"{row['bits']:.5g}", row["block"], "yes" if "real" in row else "")
        yield from (f"{row[kind]:.2%}" if kind in row else "" for kind in ("gaussian", "real"))
        fast = timed.get(f"llama-1b {name}")
        yield from (f"{fast[test]['gguf-run']:.3g}" if fast else "" for test in ("prefill", "decode"))
        yield _WHEN.get(name, "")

    head = "type | bits | block | written | error, Gaussian | error, real | prefill | decode | when"
    rows = sorted(load("formats")["types"].items(), key=lambda item: -item[1]["bits"])
    return markdown(head, (cells(name, row) for name, row in rows))


def files() -> str:
    """Return files of SmolLM2 by file type."""

    def cells(name: str, row: Mapping[str, Any]) -> Iterator[object]:
        parts = sorted(row["parts"].items(), key=lambda item: -item[1])
        yield from (name, f"{row['bits']:.2f}", ", ".join(f"{type} {part:.0%}" for type, part in parts if part >= 0.01))
        yield from (f"{row['kl_mean']:.2g}", f"{row['same_top']:.1%}", f"{row['perplexity']:.2f}")

    rows = sorted(load("formats")["files"].items(), key=lambda item: -item[1]["bits"])
    return markdown("file | bits | its weights | KL | same top token | perplexity", (cells(*row) for row in rows))


TABLES: Mapping[str, Callable[[], str]] = MappingProxyType(
    {table.__name__: table for table in (speed, speed_zen5, speed_short, kv_cache, kv_cache_short, formats, files)}
)


def filled(text: str) -> str:
    """Return a document with its tables written from the data."""
    return _MARK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[4]}", text)


@click.command()
def main() -> None:
    """Write the tables of all documents anew."""
    for path in DOCUMENTS:
        text = path.read_text()
        if (new := filled(text)) != text:
            path.write_text(new)
            click.echo(f"{path.relative_to(ROOT)}: changed")


if __name__ == "__main__":
    main()
