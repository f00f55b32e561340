"""gguf-eval compare: files of one model beside their base, as a table, as JSON and as a picture."""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import click

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.bench.scatter import Point, round_ticks, scatter
from gguf_run.runtime.cli.options import to_load_options
from gguf_run.runtime.cli.report import Figure, load_scorer
from gguf_run.runtime.cli.session import check_place
from gguf_run.runtime.evaluate.compare_files import (
    N_CHUNK,
    check_vocabulary,
    compared,
    known_base,
    layer_of,
    layers,
    scoring,
)
from gguf_run.runtime.evaluate.kl import Comparison, kl_ratio
from gguf_run.runtime.evaluate.text import N_CTX, Scorer
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.quantize.file import bits_per_weight
from gguf_run.runtime.terminal.progress import progress
from gguf_run.runtime.terminal.table import table
from gguf_run.runtime.terminal.text import one_line, size_text
from gguf_run.runtime.terminal.text_input import read_text

_LEAST_KL = 1e-8  # what rounding alone gives; a logarithmic scale has no 0


@dataclass(frozen=True)
class Row:
    """A file on a text, or a layer of it."""

    text: str
    file: str  # as the user named it
    layer: int | None  # -1: what is in no layer
    nbytes: int
    bits: float  # per weight
    n_chunk: int
    figures: list[Figure]


def run(files: Sequence[Path], output: Path | None, as_json: bool, **given: Any) -> None:
    """Run the command; its help says what it does. given: arguments of compared_files."""
    if output is not None:
        check_place(output, "--output")
    rows = compared_files(files=files, **given)
    if as_json:
        click.echo(json.dumps({**given, "results": [*map(_record, rows)]}))
    else:
        click.echo("\n".join(table_of(rows)))
    if output is not None:
        output.write_text(_picture(rows))


def compared_files(
    models: Sequence[str], base: str, files: Sequence[Path], n_ctx: int | None = None, n_chunk: int | None = None,
    n_skip: int = 0, by_layer: bool = False, **options: Any,
) -> list[Row]:  # fmt: skip
    """Compare models with a base on the texts of files. options: of all models.

    by_layer: compare each layer of the models, in the midst of the base's others.
    Errors are those of known_base and layers.
    """
    texts, original, paths = [*map(read_text, files)], find_model(base), [*map(find_model, models)]
    for path in paths:
        check_vocabulary(path, original)
    n_ctx, n_chunk = N_CTX if n_ctx is None else n_ctx, N_CHUNK if n_chunk is None else n_chunk

    def load(source: Path | GGUFFile) -> AbstractContextManager[Scorer]:
        if isinstance(source, Path):
            return load_scorer(str(source), options, n_ctx=n_ctx)
        return scoring(source, to_load_options(options, n_ctx=n_ctx))

    def step() -> None:
        bar.set(next(done), (1 + len(tried)) * len(files) * n_chunk)

    done = count(1)
    tried: list[tuple[str, int | None, tuple[int, float], Path | GGUFFile]] = []
    with ExitStack() as stack:
        for model, path in zip(models, paths, strict=True):
            file, whole = (stack.enter_context(GGUFFile.open(one)) for one in (path, original))
            if by_layer:
                tried += [(model, layer, _size(file, layer), part) for layer, part in layers(file, whole)]
            else:
                tried.append((model, None, _size(file), path))
        bar = stack.enter_context(progress("evaluating", "chunks"))
        known = stack.enter_context(known_base(load, original, texts, step, n_chunk, n_ctx, n_skip))
        results = [compared(load, source, known, step) for *_, source in tried]
    has_first = len(tried) > 1 and not by_layer
    return [
        Row(
            str(file), model, layer, *size, result[i].n_chunk, _figures(result[i], results[0][i] if has_first else None)
        )
        for i, file in enumerate(files)
        for (model, layer, size, _), result in zip(tried, results, strict=True)
    ]


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


def _size(file: GGUFFile, layer: int | None = None) -> tuple[int, float]:
    """Return the bytes of a model's files, and the bits of a weight. layer: of the weights of one layer."""
    tensors = [*file.tensors.values()]
    if layer is not None:
        tensors = [tensor for tensor in tensors if layer_of(tensor.name) == layer]
        return sum(tensor.nbytes for tensor in tensors), bits_per_weight(tensors)
    parts = {file.path, *(tensor.file.path for tensor in tensors)}
    return sum(part.stat().st_size for part in parts), bits_per_weight(tensors)


def _record(row: Row) -> dict[str, Any]:
    facts = {
        "text": row.text,
        "file": row.file,
        "bytes": row.nbytes,
        "bits_per_weight": row.bits,
        "chunks": row.n_chunk,
    }
    layer = {} if row.layer is None else {"layer": row.layer}
    return facts | layer | {key: value for figure in row.figures for key, value in figure.json().items()}


def table_of(rows: Sequence[Row]) -> Iterator[str]:
    head = ["text", "file", "size", "bits/weight", *(figure.label for figure in rows[0].figures)]
    cells = []
    for row in rows:
        layer = "" if row.layer is None else f", layer {row.layer}" if row.layer >= 0 else ", other weights"
        facts = [one_line(row.text), one_line(row.file) + layer, size_text(row.nbytes), f"{row.bits:.2f}"]
        cells.append([*facts, *(figure.cell for figure in row.figures)])
    yield from table(head, cells, "ll" + "r" * (len(head) - 2))


def _picture(rows: Sequence[Row]) -> str:
    """Draw divergence by size, a line for each text; of layers by their numbers, a line for each text and file."""
    by_layer = rows[0].layer is not None
    lines = [f"{row.text}, {row.file}" if by_layer else row.text for row in rows]
    kinds = {line: "acb"[i % 3] for i, line in enumerate(dict.fromkeys(lines))}
    points = []
    for row, line in zip(rows, lines, strict=True):
        price = row.nbytes / 1e6 if row.layer is None else row.layer
        name = "" if by_layer else Path(row.file).stem
        points.append(Point(name, price, max(_LEAST_KL, row.figures[0].value), kinds[line], line))
    ticks = round_ticks(min(point.price for point in points), max(point.price for point in points))
    if by_layer:
        title, x_title = "How far predictions move if one layer alone is the file's", "layer; -1: weights of no layer"
        return scatter(title, x_title, points, ticks, "is the layer")
    title = "How far predictions move from those of the base, by size"
    return scatter(title, "size of the file, MB", points, ticks, "MB")
