"""Results of gguf-bench in llama-bench's output formats, so that scripts made for those read them.

Column names, their order and types are llama-bench's (tools/llama-bench of llama.cpp), which its
compare-llama-bench.py relies on. Ours come after them: the machine's limits, and the fraction of them that was reached.
"""

import csv
import functools
import importlib.metadata
import io
import json
import platform
import re
import subprocess
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gguf_run.kernels_cpu.vector import isa
from gguf_run.runtime.bench.bench import Case, Result

# In order, with the type of the SQL column; BOOL is an INTEGER there.
FIELDS: Mapping[str, str] = {
    "build_commit": "TEXT", "build_number": "INTEGER", "cpu_info": "TEXT", "gpu_info": "TEXT", "backends": "TEXT",
    "model_filename": "TEXT", "model_type": "TEXT", "model_size": "INTEGER", "model_n_params": "INTEGER",
    "n_batch": "INTEGER", "n_ubatch": "INTEGER", "n_threads": "INTEGER", "cpu_mask": "TEXT", "cpu_strict": "BOOL",
    "poll": "INTEGER", "type_k": "TEXT", "type_v": "TEXT", "n_gpu_layers": "INTEGER", "n_cpu_moe": "INTEGER",
    "split_mode": "TEXT", "main_gpu": "INTEGER", "no_kv_offload": "BOOL", "flash_attn": "INTEGER", "devices": "TEXT",
    "tensor_split": "TEXT", "tensor_buft_overrides": "TEXT", "load_mode": "TEXT", "lazy_mode": "TEXT",
    "embeddings": "BOOL", "no_op_offload": "INTEGER", "no_host": "BOOL", "repack": "BOOL", "fit_target": "INTEGER",
    "fit_min_ctx": "INTEGER", "n_prompt": "INTEGER", "n_gen": "INTEGER", "n_depth": "INTEGER", "test_time": "TEXT",
    "avg_ns": "INTEGER", "stddev_ns": "INTEGER", "avg_ts": "REAL", "stddev_ts": "REAL",
}  # fmt: skip
# What llama-bench says of settings that nobody changed: two results are compared only where all of these are equal.
_UNCHANGED: Mapping[str, Any] = {
    "cpu_mask": "0x0", "cpu_strict": False, "poll": 50,
    "split_mode": "layer", "main_gpu": 0, "no_kv_offload": False, "flash_attn": -1,
    "tensor_buft_overrides": "none", "load_mode": "auto", "lazy_mode": "auto",
    "embeddings": False, "no_op_offload": 0, "no_host": False, "repack": True, "fit_target": 0, "fit_min_ctx": 0,
}  # fmt: skip


def fields(result: Result) -> dict[str, Any]:
    """Return all of FIELDS of a result, by name."""
    case, facts = result.case, result.facts
    commit, number = build()
    values = {
        "build_commit": commit,
        "build_number": number,
        "cpu_info": cpu_info(),
        "gpu_info": ", ".join(result.gpus),
        "backends": ",".join(["Triton"] * bool(result.gpus) + ["CPU"] * (not result.gpus or result.fraction is None)),
        "model_filename": case.model,
        "model_type": facts.model_type,
        "model_size": facts.model_size,
        "model_n_params": facts.n_params,
        "type_k": case.type_k,
        "type_v": case.type_v,
        "devices": case.device.replace(",", "/"),
        "n_gpu_layers": {"auto": -1, "all": -2}.get(case.gpu_layers) or int(case.gpu_layers),
        "n_cpu_moe": case.experts_on_cpu,
        "tensor_split": "/".join(f"{float(part):.2f}" for part in (case.tensor_split or "0").split(",")),
        "test_time": result.test_time,
        **{name: getattr(case, name) for name in ("n_batch", "n_ubatch", "n_threads", "n_prompt", "n_gen", "n_depth")},
        **{name: getattr(result, name) for name in ("avg_ns", "stddev_ns")},
        **{name: round(getattr(result, name), 6) for name in ("avg_ts", "stddev_ts")},
        **_UNCHANGED,
    }
    return {name: values[name] for name in FIELDS}


def own_fields(result: Result) -> dict[str, Any]:
    """Return what llama-bench does not have: limits in bytes and operations per second, and the fraction reached."""
    return {
        "limit_read_bytes": round(result.limits.read_bytes),
        "limit_int8_ops": round(result.limits.int8_ops),
        "limit_fraction": None if result.fraction is None else round(result.fraction, 4),
    }


@functools.cache
def build() -> tuple[str, int]:
    """Return what names this version: commit and number of commits in a checkout, else the installed version and 0."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        git = (
            ["git", "-C", str(root), "rev-parse", "--short=8", "HEAD"],
            ["git", "-C", str(root), "rev-list", "--count", "HEAD"],
        )
        try:
            commit, number = (subprocess.run(c, capture_output=True, text=True, check=True).stdout.strip() for c in git)
            return commit, int(number)
        except (OSError, subprocess.CalledProcessError):
            pass
    return f"gguf-run-{importlib.metadata.version('gguf-run')}", 0


@functools.cache
def cpu_info() -> str:
    """Return the processor's name."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


class Printer(Protocol):
    """Makes the text of one output format."""

    def head(self, cases: Sequence[Case]) -> str:
        """What stands before all results; cases: those that will run."""
        ...

    def row(self, result: Result) -> str: ...

    def foot(self, results: Sequence[Result]) -> str:
        """What stands after the results that there are."""
        ...


class Csv:
    def head(self, cases: Sequence[Case]) -> str:
        return ",".join([*FIELDS, "limit_read_bytes", "limit_int8_ops", "limit_fraction"]) + "\n"

    def row(self, result: Result) -> str:
        line = io.StringIO()
        csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(
            _number(value) for value in (fields(result) | own_fields(result)).values()
        )
        return line.getvalue()

    def foot(self, results: Sequence[Result]) -> str:
        return ""


class JsonLines:
    def head(self, cases: Sequence[Case]) -> str:
        return ""

    def row(self, result: Result) -> str:
        return json.dumps(_with_samples(result)) + "\n"

    def foot(self, results: Sequence[Result]) -> str:
        return ""


class Json:
    """An array, complete also if it ends before its time."""

    def __init__(self) -> None:
        self._separator = ""

    def head(self, cases: Sequence[Case]) -> str:
        return "[\n"

    def row(self, result: Result) -> str:
        text = self._separator + textwrap.indent(json.dumps(_with_samples(result), indent=2), "  ")
        self._separator = ",\n"
        return text

    def foot(self, results: Sequence[Result]) -> str:
        return "\n]\n"


def _with_samples(result: Result) -> dict[str, Any]:
    samples_ts = [round(speed, 3) for speed in result.samples_ts]
    return fields(result) | {"samples_ns": result.samples_ns, "samples_ts": samples_ts} | own_fields(result)


def _number(value: Any) -> Any:
    """Truth values as 0 and 1."""
    return int(value) if isinstance(value, bool) else value


class Sql:
    """llama-bench's table as it is, so that one database takes the results of both; what is ours stands in comments."""

    def head(self, cases: Sequence[Case]) -> str:
        columns = ",\n".join(f"  {name} {type.replace('BOOL', 'INTEGER')}" for name, type in FIELDS.items())
        return f"CREATE TABLE IF NOT EXISTS llama_bench (\n{columns}\n);\n\n"

    def row(self, result: Result) -> str:
        values = ", ".join(_quoted(_number(value)) for value in fields(result).values())
        comment = ", ".join(f"{name} {value}" for name, value in own_fields(result).items())
        return f"INSERT INTO llama_bench ({', '.join(FIELDS)}) VALUES ({values}); -- {comment}\n"

    def foot(self, results: Sequence[Result]) -> str:
        return ""


def _quoted(value: Any) -> str:
    return "'" + str(value).replace("'", "''") + "'"


# Columns of the table: title and width, negative for text that stands left. Those of _IF_CHANGED are shown when not all
# tests have the default.
_COLUMNS: Mapping[str, tuple[str, int]] = {
    "model_type": ("model", -30), "size": ("size", 10), "params": ("params", 10), "backends": ("backend", -10),
    "n_threads": ("threads", 7), "n_batch": ("n_batch", 7), "n_ubatch": ("n_ubatch", 8), "type_k": ("type_k", 6),
    "type_v": ("type_v", 6), "n_gpu_layers": ("ngl", 3), "n_cpu_moe": ("n_cpu_moe", 9), "tensor_split": ("ts", 12),
    "devices": ("dev", -12), "test": ("test", 15), "t/s": ("t/s", 20),
    "of limit": ("of limit", 8),
}  # fmt: skip
_IF_CHANGED = {
    "n_batch": "n_batch",
    "n_ubatch": "n_ubatch",
    "type_k": "type_k",
    "type_v": "type_v",
    "n_gpu_layers": "gpu_layers",
    "n_cpu_moe": "experts_on_cpu",
    "tensor_split": "tensor_split",
    "devices": "device",
}


class Markdown:
    def __init__(self) -> None:
        self._columns: list[str] = []

    def head(self, cases: Sequence[Case]) -> str:
        default = Case("", 0, 0)
        unchanged = {
            column
            for column, name in _IF_CHANGED.items()
            if all(getattr(case, name) == getattr(default, name) for case in cases)
        }
        self._columns = [name for name in _COLUMNS if name not in unchanged]
        rule = ("-" * (abs(width) - 1) + ("-" if width < 0 else ":") for _, width in self._shown())
        return self._line([title for title, _ in self._shown()]) + self._line(rule)

    def row(self, result: Result) -> str:
        values = fields(result) | {
            "backends": ", ".join([*result.gpus, *(["CPU"] * (not result.gpus or result.fraction is None))]),
            "size": _binary_size(result.facts.model_size),
            "params": _count(result.facts.n_params),
            "test": str(result.case),
            "t/s": f"{result.avg_ts:.2f} ± {result.stddev_ts:.2f}",
            "of limit": "" if result.fraction is None else f"{result.fraction:.1%}",
        }
        return self._line([str(values[name]) for name in self._columns])

    def foot(self, results: Sequence[Result]) -> str:
        commit, number = build()
        lines = ["", f"build: {commit} ({number})"]
        for limits in dict.fromkeys(result.limits for result in results):
            whose = limits.name or f"{limits.n_threads} thread{'s' * (limits.n_threads > 1)}"
            speeds = f"read {limits.read_bytes / 1e9:.1f} GB/s, int8 dot {limits.int8_ops / 1e9:.0f} Gop/s"
            speeds = speeds.replace("int8", "f16") if limits.name else f"{speeds} ({isa.current().name})"
            lines.append(f"limits, {whose}: {speeds}")
        return "\n".join(lines) + "\n"

    def _shown(self) -> list[tuple[str, int]]:
        return [_COLUMNS[name] for name in self._columns]

    def _line(self, cells: Iterator[str] | Sequence[str]) -> str:
        padded = (
            cell.ljust(-width) if width < 0 else cell.rjust(width)
            for cell, (_, width) in zip(cells, self._shown(), strict=True)
        )
        return f"| {' | '.join(padded)} |\n"


def _binary_size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.2f} MiB" if n_bytes < 2**30 else f"{n_bytes / 2**30:.2f} GiB"


def _count(n: int) -> str:
    return f"{n / 1e6:.2f} M" if n < 1e9 else f"{n / 1e9:.2f} B"


PRINTERS: Mapping[str, type[Printer]] = {"md": Markdown, "csv": Csv, "json": Json, "jsonl": JsonLines, "sql": Sql}
