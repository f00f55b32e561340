"""What gguf-quantize and gguf-convert share: options, the table of a dry run, and the run with its closing lines."""

import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguf_run.runtime.cli.options import PATH, option
from gguf_run.runtime.load.machine import default_threads
from gguf_run.runtime.terminal.progress import progress
from gguf_run.runtime.terminal.table import table
from gguf_run.runtime.terminal.text import one_line, size_text

if TYPE_CHECKING:
    from gguf_run.runtime.quantize.plan import Plan

OPTIONS = [
    option("--imatrix", "Importance matrix, from gguf-imatrix.", type=PATH),
    option("--split-max-size", "Split the output into files of at most this size.", metavar="N(K|M|G)"),
    option("--dry-run", "Only show the types and sizes that the output would have.", is_flag=True),
    option("--threads -t", "Threads that compute.  [default: physical cores]", type=click.IntRange(1, 512)),
]


def show_types(plan: "Plan") -> Iterator[str]:
    """Yield the lines of a dry run: each tensor's types and sizes before and after."""
    from gguf_run.runtime.quantize.file import bits_per_weight

    rows = []
    for item in plan.items:
        source, target = item.source, item.target
        types = [source.type.name, "" if item.is_copy else target.type.name]
        sizes = [size_text(source.nbytes), size_text(target.nbytes), f"{bits_per_weight([target]):.2f}"]
        rows.append([one_line(target.name), " x ".join(map(str, target.ne)), *types, *sizes])
    yield from table(["tensor", "ne", "type", "to", "size", "to", "bits/weight"], rows, "llllrrr")
    yield ""
    yield _total(plan)
    if any(item.choice.needs_imatrix and item.importance is None for item in plan.items):
        yield "this type needs --imatrix"


def run_plan(plan: "Plan", path: Path, n_threads: int | None, limits: dict[str, Any]) -> Generator[str, None, Path]:
    """Write the files of a plan and yield the closing lines; return the first file.

    limits: split_max_size and split_max_tensors of GGUFWriter, None or 0 for no limit.
    """
    from gguf_run.runtime.quantize.file import quantize_file, type_reports

    start = time.monotonic()
    with progress("quantizing") as bar:
        split = {name: limit or 0 for name, limit in limits.items()}
        writer, losses = quantize_file(plan, path, n_threads or default_threads(), bar.set, **split)
    rows = []
    for report in type_reports(plan.items, losses):
        loss = ["-", "-", "copied"]
        if report.loss and report.worst:
            name, worst = report.worst
            loss = [f"{report.rmse:.3g}", f"{report.loss.relative():.2%}", f"{worst.relative():.2%} {one_line(name)}"]
        size = [str(report.n_tensors), size_text(report.nbytes), f"{report.bits_per_weight:.2f}"]
        rows.append([report.type, *size, *loss])
    yield from table(["type", "tensors", "size", "bits/weight", "RMSE", "of RMS", "worst tensor"], rows, "lrrrrrl")
    yield ""
    parts = f" and {len(writer.paths) - 1} more" if len(writer.paths) > 1 else ""
    yield f"{one_line(str(writer.paths[0]))}{parts}: {_total(plan)}, {time.monotonic() - start:.1f} s"
    return writer.paths[0]


def _total(plan: "Plan") -> str:
    from gguf_run.runtime.quantize.file import bits_per_weight

    sides = [item.source for item in plan.items], [item.target for item in plan.items]
    sizes = " -> ".join(size_text(sum(tensor.nbytes for tensor in side)) for side in sides)
    return f"{sizes}, {' -> '.join(f'{bits_per_weight(side):.2f}' for side in sides)} bits per weight"
