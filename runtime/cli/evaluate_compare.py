"""gguf-eval compare: files of one model beside their base, as a table, as JSON and as a picture."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import click

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.bench.scatter import Point, round_ticks, scatter
from gguf_run.runtime.cli.report import Figure, load_scorer
from gguf_run.runtime.cli.session import check_place
from gguf_run.runtime.evaluate.compare_files import N_CHUNK, check_vocabulary, compared, known_base
from gguf_run.runtime.evaluate.kl import Comparison, kl_ratio
from gguf_run.runtime.evaluate.text import N_CTX
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.quantize.file import bits_per_weight
from gguf_run.runtime.terminal.progress import progress
from gguf_run.runtime.terminal.table import table
from gguf_run.runtime.terminal.text import one_line, size_text
from gguf_run.runtime.terminal.text_input import read_text

_LEAST_KL = 1e-8  # what rounding alone gives; a logarithmic scale has no 0


@dataclass(frozen=True)
class _Row:
    """A file on a text."""

    text: str
    file: str  # as the user named it
    nbytes: int
    bits: float  # per weight
    figures: list[Figure]


def run(
    models: Sequence[str], base: str, files: Sequence[Path], n_ctx: int | None = None, n_chunk: int | None = None,
    n_skip: int = 0, output: Path | None = None, as_json: bool = False, **options: Any,
) -> None:  # fmt: skip
    """Run the command; its help says what it does."""
    if output is not None:
        check_place(output, "--output")
    texts, original, paths = [*map(read_text, files)], find_model(base), [*map(find_model, models)]
    for path in paths:
        check_vocabulary(path, original)
    sizes, n_ctx, n_chunk = (
        [*map(_size, paths)],
        N_CTX if n_ctx is None else n_ctx,
        N_CHUNK if n_chunk is None else n_chunk,
    )

    def load(path: Path) -> Any:
        return load_scorer(str(path), options, n_ctx=n_ctx)

    def step() -> None:
        bar.set(next(done), (1 + len(paths)) * len(files) * n_chunk)

    done = count(1)
    with (
        progress("evaluating", "chunks") as bar,
        known_base(load, original, texts, step, n_chunk, n_ctx, n_skip) as known,
    ):
        results = [compared(load, path, known, step) for path in paths]
    rows = [
        _Row(str(file), model, *size, _figures(result[i], results[0][i] if len(models) > 1 else None))
        for i, file in enumerate(files)
        for model, size, result in zip(models, sizes, results, strict=True)
    ]
    facts = {"base": base, "n_ctx": n_ctx, "skip": n_skip, "chunks": [r.n_chunk for r in results[0]], **options}
    click.echo(json.dumps({**facts, "results": [*map(_record, rows)]}) if as_json else "\n".join(_table(rows)))
    if output is not None:
        output.write_text(_picture(rows))


def _figures(done: Comparison, first: Comparison | None) -> list[Figure]:
    """Return what is shown of a file. first: what its divergence is compared with, None: nothing."""
    found = done.by_chunk().estimates()
    kl, ratio, same = (found[name] for name in ("kl_mean", "perplexity_ratio", "same_top"))
    of_first = kl_ratio(done, first) if first else None
    return [
        Figure("kl_mean", "KL divergence, mean", kl.value, kl.error),
        *([Figure("kl_ratio", "of the first", of_first.value, of_first.error)] if of_first else []),
        Figure("kl_99", "KL, 99 %", done.kl_percentiles()[99.0]),
        Figure("same_top", "same top token", same.value, same.error, percent=True),
        Figure("perplexity_ratio", "perplexity ratio", ratio.value, ratio.error),
    ]


def _size(path: Path) -> tuple[int, float]:
    """Return the bytes of a model's files, and the bits of a weight."""
    with GGUFFile.open(path) as file:
        tensors = [*file.tensors.values()]
        parts = {file.path, *(tensor.file.path for tensor in tensors)}
        return sum(part.stat().st_size for part in parts), bits_per_weight(tensors)


def _record(row: _Row) -> dict[str, Any]:
    facts = {"text": row.text, "file": row.file, "bytes": row.nbytes, "bits_per_weight": row.bits}
    return facts | {key: value for figure in row.figures for key, value in figure.json().items()}


def _table(rows: Sequence[_Row]) -> Iterator[str]:
    head = ["text", "file", "size", "bits/weight", *(figure.label for figure in rows[0].figures)]
    cells = [
        [
            one_line(row.text),
            one_line(row.file),
            size_text(row.nbytes),
            f"{row.bits:.2f}",
            *(f.cell for f in row.figures),
        ]
        for row in rows
    ]
    yield from table(head, cells, "ll" + "r" * (len(head) - 2))


def _picture(rows: Sequence[_Row]) -> str:
    """Draw divergence by size, a line for each text."""
    kinds = {text: "acb"[i % 3] for i, text in enumerate(dict.fromkeys(row.text for row in rows))}
    points = [
        Point(Path(row.file).stem, row.nbytes / 1e6, max(_LEAST_KL, row.figures[0].value), kinds[row.text], row.text)
        for row in rows
    ]
    ticks = round_ticks(min(point.price for point in points), max(point.price for point in points))
    return scatter(
        "How far predictions move from those of the base, by size", "size of the file, MB", points, ticks, "MB"
    )
