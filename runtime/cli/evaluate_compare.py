"""gguf-eval compare: files of one model beside their base, as a table, as JSON and as a picture."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.bench.scatter import Point, round_ticks, scatter
from gguf_run.runtime.cli.report import Figure, load_scorer
from gguf_run.runtime.cli.session import check_place
from gguf_run.runtime.evaluate.compare_files import N_CHUNK, check_vocabularies, compared, known_base
from gguf_run.runtime.evaluate.kl import Comparison, kl_ratio
from gguf_run.runtime.evaluate.text import N_CTX
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.quantize.file import bits_per_weight
from gguf_run.runtime.terminal.progress import Progress, progress
from gguf_run.runtime.terminal.table import table
from gguf_run.runtime.terminal.text import one_line, size_text
from gguf_run.runtime.terminal.text_input import read_text

_LEAST_KL = 1e-8  # what rounding alone gives; a logarithmic scale has no 0


@dataclass(frozen=True)
class Row:
    """A file and what it loses."""

    file: str  # as the user named it
    nbytes: int
    bits: float  # per weight
    texts: list[Comparison]  # one for each text


def run(
    models: Sequence[str], base: str, files: Sequence[Path], n_ctx: int | None, n_chunk: int | None, n_skip: int,
    output: Path | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Run the command; its help says what it does."""
    if output is not None:
        check_place(output, "--output")
    texts, original, paths = [*map(read_text, files)], find_model(base), [*map(find_model, models)]
    check_vocabularies(original, paths)
    sizes, n_ctx = [*map(_size, paths)], N_CTX if n_ctx is None else n_ctx
    n_chunk = N_CHUNK if n_chunk is None else n_chunk

    def load(path: Path) -> Any:
        return load_scorer(str(path), options, n_ctx=n_ctx)

    with progress("evaluating", "chunks") as bar:
        step = counted(bar, (1 + len(paths)) * len(files) * n_chunk)
        with known_base(load, original, texts, step, n_chunk, n_ctx, n_skip) as known:
            rows = [
                Row(model, *size, compared(load, path, known, step))
                for model, path, size in zip(models, paths, sizes, strict=True)
            ]
    names = [str(file) for file in files]
    if as_json:
        facts = {"base": base, "chunks": {name: len(part.chunks) for name, part in zip(names, known, strict=True)}}
        click.echo(json.dumps({**facts, "n_ctx": n_ctx, "skip": n_skip, **options, "files": _records(rows, names)}))
    else:
        click.echo("\n".join(_table(rows, names)))
    if output is not None:
        output.write_text(_picture(rows, names))


def counted(bar: Progress, total: int) -> Any:
    """Return a function that counts its calls and shows the number; total: of all calls."""
    done = iter(range(1, total + 1))
    return lambda _: bar.set(next(done), total)


def figures(done: Comparison, first: Comparison | None = None) -> list[Figure]:
    """Return what is shown of a file. first: what its divergence is compared with, None: nothing."""
    found = done.by_chunk()
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


def _records(rows: Sequence[Row], names: Sequence[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for row in rows:
        texts = {
            name: {key: value for figure in figures(done, first) for key, value in figure.json().items()}
            for name, done, first in zip(names, row.texts, rows[0].texts, strict=True)
        }
        found.append({"file": row.file, "bytes": row.nbytes, "bits_per_weight": row.bits, "texts": texts})
    return found


def _table(rows: Sequence[Row], names: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the table: all files on the first text, then on the next."""
    cells, head = [], ["text", "file", "size", "bits/weight"]
    head += [figure.label for figure in figures(rows[0].texts[0], rows[0].texts[0])]
    for i, name in enumerate(names):
        for row in rows:
            shown = [figure.cell for figure in figures(row.texts[i], rows[0].texts[i])]
            cells.append([one_line(name), one_line(row.file), size_text(row.nbytes), f"{row.bits:.2f}", *shown])
    yield from table(head, cells, "llrr" + "r" * (len(head) - 4))


def _picture(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Draw divergence by size, a line for each text."""
    points = [
        Point(
            Path(row.file).name.removesuffix(".gguf"),
            row.nbytes / 1e6,
            max(_LEAST_KL, kl),
            "acb"[i % 3],
            Path(name).name,
        )
        for row in rows
        for i, name in enumerate(names)
        for kl in [row.texts[i].by_chunk()["kl_mean"].value]
    ]
    sizes = [row.nbytes / 1e6 for row in rows]
    title = "How far predictions move from those of the base, by size"
    return scatter(title, "size of the file, MB", points, round_ticks(min(sizes), max(sizes)), "MB")
