"""Results of gguf-bench as text: a Markdown table, JSON, or CSV.

Columns have llama-bench's names (tools/llama-bench of llama.cpp). Columns of ours come last: the machine's limits, and
the fraction of them that was reached.
"""

import csv
import functools
import importlib.metadata
import io
import itertools
import json
import platform
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_run.kernels_cpu.vector import isa
from gguf_run.runtime.bench.bench import Case, Result
from gguf_run.runtime.terminal.table import fold
from gguf_run.runtime.terminal.text import n_columns


@functools.cache
def build() -> str:
    """Return what names this version: the commit of a checkout, else the installed version."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        git = ["git", "-C", str(root), "rev-parse", "--short=8", "HEAD"]
        with suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return f"gguf-run-{importlib.metadata.version('gguf-run')}"


@functools.cache
def cpu_info() -> str:
    """Return the processor's name."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


_GPU_LAYERS = {"None": -1, "auto": -1, "all": -2}
CASE_COLUMNS: Mapping[str, Callable[[Case], Any]] = {
    "model_filename": lambda c: c.name,
    "n_batch": lambda c: c.n_batch,
    "n_ubatch": lambda c: c.n_ubatch,
    "n_threads": lambda c: c.options.n_threads,
    "type_k": lambda c: c.cache_types[0],
    "type_v": lambda c: c.cache_types[1],
    "n_gpu_layers": lambda c: _GPU_LAYERS.get(layers := str(c.options.gpu_layers)) or int(layers),
    "n_cpu_moe": lambda c: -1 if c.options.cpu_moe else c.options.n_cpu_moe or 0,
    "tensor_split": lambda c: "/".join(f"{float(part):.2f}" for part in (c.options.tensor_split or "0").split(",")),
    "devices": lambda c: c.options.device.replace(",", "/"),
    "n_prompt": lambda c: c.n_prompt,
    "n_gen": lambda c: c.n_gen,
    "n_depth": lambda c: c.n_depth,
}
RESULT_COLUMNS: Mapping[str, Callable[[Result], Any]] = {
    "build_commit": lambda r: build(),
    "cpu_info": lambda r: cpu_info(),
    "gpu_info": lambda r: ", ".join(r.gpus),
    "backends": lambda r: ",".join(["Triton"] * bool(r.gpus) + ["CPU"] * r.on_cpu),
    "model_type": lambda r: r.model.model_type,
    "model_size": lambda r: r.model.model_size,
    "model_n_params": lambda r: r.model.n_params,
    "test_time": lambda r: r.test_time,
    "avg_ts": lambda r: round(r.avg_ts, 6),
    "stddev_ts": lambda r: round(r.stddev_ts, 6),
    "limit_read_bytes": lambda r: round(r.limits.read_bytes),
    "limit_int8_ops": lambda r: round(r.limits.int8_ops),
    "limit_fraction": lambda r: None if r.fraction is None else round(r.fraction, 4),
}


def fields(result: Result) -> dict[str, Any]:
    """Return the columns of a result."""
    of_case = {name: column(result.case) for name, column in CASE_COLUMNS.items()}
    return of_case | {name: column(result) for name, column in RESULT_COLUMNS.items()}


@dataclass(frozen=True)
class Printer:
    """How results are written in an output format."""

    head: str  # text before all results
    row: Callable[[Result], str]  # text of a result, written when the result is there
    foot: Callable[[Sequence[Result]], str] = lambda results: ""  # text after all results that are there


def _csv(cases: Sequence[Case]) -> Printer:
    """A line of names, then a line for each result."""

    def row(result: Result) -> str:
        line = io.StringIO()
        csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(fields(result).values())
        return line.getvalue()

    return Printer(",".join([*CASE_COLUMNS, *RESULT_COLUMNS]) + "\n", row)


def _json_lines(cases: Sequence[Case]) -> Printer:
    """One JSON object in a line for each result."""
    return Printer("", lambda result: json.dumps(_with_samples(result)) + "\n")


def _json(cases: Sequence[Case]) -> Printer:
    """A JSON array. The array is complete even if Ctrl-C ends the tests."""
    separators = itertools.chain([""], itertools.repeat(",\n"))

    def row(result: Result) -> str:
        return next(separators) + textwrap.indent(json.dumps(_with_samples(result), indent=2), "  ")

    return Printer("[\n", row, lambda results: "\n]\n")


def _with_samples(result: Result) -> dict[str, Any]:
    samples_ts = [round(speed, 3) for speed in result.samples_ts]
    return fields(result) | {"samples_ns": result.samples_ns, "samples_ts": samples_ts}


@dataclass(frozen=True)
class Column:
    """A column of the Markdown table."""

    title: str
    align: str  # "<": text at the left, ">": at the right
    width: int
    cell: Callable[[Result], object] | None = None  # what the column shows; None: CASE_COLUMNS[name]
    name: str = ""  # the column is left out if CASE_COLUMNS[name] is the default for all tests

    def text(self, result: Result) -> str:
        """The cell of a result."""
        return str(self.cell(result) if self.cell else CASE_COLUMNS[self.name](result.case))

    def is_shown(self, cases: Sequence[Case]) -> bool:
        """Whether a test has another value than the default."""
        value = CASE_COLUMNS.get(self.name)
        return value is None or any(value(case) != value(Case("", 0, 0)) for case in cases)


def _binary_size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.2f} MiB" if n_bytes < 2**30 else f"{n_bytes / 2**30:.2f} GiB"


def _count(n: int) -> str:
    return f"{n / 1e6:.2f} M" if n < 1e9 else f"{n / 1e9:.2f} B"


TABLE = (
    Column("model", "<", 30, lambda r: r.model.model_type),
    Column("size", ">", 10, lambda r: _binary_size(r.model.model_size)),
    Column("params", ">", 10, lambda r: _count(r.model.n_params)),
    Column("backend", "<", 10, lambda r: ", ".join([*r.gpus, *["CPU"] * r.on_cpu])),
    Column("threads", ">", 7, lambda r: r.case.options.n_threads),
    Column("n_batch", ">", 7, name="n_batch"),
    Column("n_ubatch", ">", 8, name="n_ubatch"),
    Column("type_k", ">", 6, name="type_k"),
    Column("type_v", ">", 6, name="type_v"),
    Column("ngl", ">", 3, name="n_gpu_layers"),
    Column("n_cpu_moe", ">", 9, name="n_cpu_moe"),
    Column("ts", ">", 12, name="tensor_split"),
    Column("dev", "<", 12, name="devices"),
    Column("test", ">", 15, lambda r: r.case),
    Column("t/s", ">", 20, lambda r: f"{r.avg_ts:.2f} ± {r.stddev_ts:.2f}"),
    Column("of limit", ">", 8, lambda r: "" if r.fraction is None else f"{r.fraction:.1%}"),
)


def _markdown(cases: Sequence[Case]) -> Printer:
    """llama-bench's table, and below it the build and the limits of the machine."""
    columns = [column for column in TABLE if column.is_shown(cases)]

    def line(cells: Iterable[str]) -> str:
        padded = [f"{cell:{column.align}{column.width}}" for column, cell in zip(columns, cells, strict=True)]
        whole = f"| {' | '.join(padded)} |"
        if len(whole) <= (width := n_columns(sys.stdout)):
            return f"{whole}\n"
        return "".join(f"{part}\n" for part in fold([f"| {cell}" for cell in padded], " ", width))

    def row(result: Result) -> str:
        return line(column.text(result) for column in columns)

    rule = ("-" * (column.width - 1) + ("-" if column.align == "<" else ":") for column in columns)
    return Printer(line(column.title for column in columns) + line(rule), row, _build_and_limits)


def _build_and_limits(results: Sequence[Result]) -> str:
    lines = ["", f"build: {build()}"]
    for limits in dict.fromkeys(result.limits for result in results):
        whose = limits.name or f"{limits.n_threads} thread{'s' * (limits.n_threads > 1)}"
        kind, instructions = ("f16", "") if limits.name else ("int8", f" ({isa.current().name})")
        speeds = f"read {limits.read_bytes / 1e9:.1f} GB/s, {kind} dot {limits.int8_ops / 1e9:.0f} Gop/s"
        lines.append(f"limits, {whose}: {speeds}{instructions}")
    return "\n".join(lines) + "\n"


PRINTERS: Mapping[str, Callable[[Sequence[Case]], Printer]] = {
    "md": _markdown,
    "csv": _csv,
    "json": _json,
    "jsonl": _json_lines,
}
