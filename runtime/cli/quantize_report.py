"""What gguf-quantize and gguf-convert share: options, the table of a dry run, and the run with its closing lines."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguf_run.runtime.cli.common import progress
from gguf_run.runtime.cli.load_options import PATH
from gguf_run.runtime.load.machine import default_threads
from gguf_run.runtime.terminal.text import one_line, size_text, table

if TYPE_CHECKING:
    from gguf_run.runtime.quantize.plan import Plan
    from gguf_run.runtime.quantize.report import Sizes

IMATRIX = click.Option(["--imatrix"], type=PATH, help="Importance matrix, from gguf-imatrix.")
SPLIT_MAX_SIZE = click.Option(
    ["--split-max-size"], metavar="N(K|M|G)", help="Split the output into files of at most this size."
)
DRY_RUN = click.Option(["--dry-run"], is_flag=True, help="Only show the types and sizes that the output would have.")
THREADS = click.Option(
    ["--threads", "-t"], type=click.IntRange(1, 512), help="Threads that compute.  [default: physical cores]"
)


def show_types(plan: "Plan") -> Iterator[str]:
    """Yield the lines of a dry run: each tensor's types and sizes before and after."""
    from gguf_run.runtime.quantize.report import Sizes

    yield from table(
        ["tensor", "ne", "type", "to", "size", "to", "bits/weight"],
        [
            [
                one_line(item.target.name), " x ".join(map(str, item.target.ne)), item.source.type.name,
                "" if item.is_copy else item.target.type.name, size_text(item.source.nbytes),
                size_text(item.target.nbytes), f"{Sizes.of([item]).bits_per_weight()[1]:.2f}",
            ]
            for item in plan.items
        ],
        "llllrrr",
    )  # fmt: skip
    yield ""
    yield _total(Sizes.of(plan.items))
    if any(item.choice.needs_imatrix and item.importance is None for item in plan.items):
        yield "this type needs --imatrix"


def run_plan(plan: "Plan", path: Path, n_threads: int | None, limits: dict[str, Any]) -> Iterator[str]:
    """Write the files of a plan and yield the closing lines. limits: split_max_size, split_max_tensors (None: no)."""
    from gguf_run.runtime.quantize.file import quantize_file
    from gguf_run.runtime.quantize.report import Sizes, type_reports

    start = time.monotonic()
    with progress("quantizing") as bar:
        split = {name: limit or 0 for name, limit in limits.items()}
        writer, losses = quantize_file(plan, path, n_threads or default_threads(), bar.set, **split)
    rows = []
    for report in type_reports(plan.items, losses):
        size = [report.type, str(report.sizes.n_tensors), size_text(report.sizes.after)]
        size.append(f"{report.sizes.bits_per_weight()[1]:.2f}")
        if report.worst is None:
            rows.append([*size, "-", "-", "copied"])
        else:
            name, loss = report.worst
            rows.append([*size, f"{report.rmse:.3g}", f"{report.relative:.2%}", f"{loss:.2%} {one_line(name)}"])
    yield from table(["type", "tensors", "size", "bits/weight", "RMSE", "of RMS", "worst tensor"], rows, "lrrrrrl")
    yield ""
    parts = f" and {len(writer.paths) - 1} more" if len(writer.paths) > 1 else ""
    seconds = time.monotonic() - start
    yield f"{one_line(str(writer.paths[0]))}{parts}: {_total(Sizes.of(plan.items))}, {seconds:.1f} s"


def _total(sizes: "Sizes") -> str:
    before, after = sizes.bits_per_weight()
    return f"{size_text(sizes.before)} -> {size_text(sizes.after)}, {before:.2f} -> {after:.2f} bits per weight"
