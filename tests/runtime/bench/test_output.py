"""gguf-bench's output formats against what llama-bench prints and its comparison script needs, written out here."""

import csv
import io
import json
import math
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tinymodel import write_tiny

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_cpu.measure.limits import Limits
from gguf_run.runtime.bench import output as bench_output
from gguf_run.runtime.bench.bench import Case, ModelFacts, Result
from gguf_run.runtime.bench.output import PRINTERS

# llama-bench's columns, in its order, and the types of its SQL table.
COLUMNS = {
    "build_commit": "TEXT", "build_number": "INTEGER", "cpu_info": "TEXT", "gpu_info": "TEXT", "backends": "TEXT",
    "model_filename": "TEXT", "model_type": "TEXT", "model_size": "INTEGER", "model_n_params": "INTEGER",
    "n_batch": "INTEGER", "n_ubatch": "INTEGER", "n_threads": "INTEGER", "cpu_mask": "TEXT", "cpu_strict": "INTEGER",
    "poll": "INTEGER", "type_k": "TEXT", "type_v": "TEXT", "n_gpu_layers": "INTEGER", "n_cpu_moe": "INTEGER",
    "split_mode": "TEXT", "main_gpu": "INTEGER", "no_kv_offload": "INTEGER", "flash_attn": "INTEGER", "devices": "TEXT",
    "tensor_split": "TEXT", "tensor_buft_overrides": "TEXT", "load_mode": "TEXT", "lazy_mode": "TEXT",
    "embeddings": "INTEGER", "no_op_offload": "INTEGER", "no_host": "INTEGER", "repack": "INTEGER",
    "fit_target": "INTEGER", "fit_min_ctx": "INTEGER", "n_prompt": "INTEGER", "n_gen": "INTEGER", "n_depth": "INTEGER",
    "test_time": "TEXT", "avg_ns": "INTEGER", "stddev_ns": "INTEGER", "avg_ts": "REAL", "stddev_ts": "REAL",
}  # fmt: skip
# What compare-llama-bench.py joins two builds on, or asks for.
KEYS = {
    "cpu_info", "gpu_info", "backends", "n_gpu_layers", "n_cpu_moe", "tensor_buft_overrides", "model_filename",
    "model_type", "n_batch", "n_ubatch", "embeddings", "cpu_mask", "cpu_strict", "poll", "n_threads", "type_k",
    "type_v", "load_mode", "no_kv_offload", "split_mode", "main_gpu", "tensor_split", "flash_attn", "n_prompt", "n_gen",
    "n_depth", "fit_target", "fit_min_ctx", "build_commit", "test_time", "avg_ts",
}  # fmt: skip
# The values that llama-bench gives when only models, lengths and threads are chosen.
DEFAULTS = {
    "gpu_info": "", "backends": "CPU", "n_batch": 2048, "n_ubatch": 512, "cpu_mask": "0x0", "cpu_strict": False,
    "poll": 50, "type_k": "f16", "type_v": "f16", "n_gpu_layers": -1, "n_cpu_moe": 0, "split_mode": "layer",
    "main_gpu": 0, "no_kv_offload": False, "flash_attn": -1, "devices": "auto", "tensor_split": "0.00",
    "tensor_buft_overrides": "none", "load_mode": "auto", "embeddings": False, "fit_target": 0, "fit_min_ctx": 0,
}  # fmt: skip
OWN = ["limit_read_bytes", "limit_int8_ops", "limit_fraction"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny(path)
    with GGUFFile.open(path) as file:
        facts = ModelFacts.of(file)
    facts = replace(facts, model_type="llama 8B Q4_K - Medium", model_size=4_920_739_232, n_params=8_030_261_248)
    limits = Limits(2, 40e9, 1800e9)
    samples = (400_000_000, 500_000_000)
    time = "2026-01-02T03:04:05Z"
    return [
        Result(Case('it\'s, "m".gguf', 512, 0, n_threads=2), facts, limits, 0.4567, time, samples),
        Result(Case('it\'s, "m".gguf', 0, 128, 64, n_threads=2), facts, limits, 0.98, time, samples),
    ]


@pytest.fixture(autouse=True)
def known_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_output, "build", lambda: ("abcd1234", 77))
    monkeypatch.setattr(bench_output, "cpu_info", lambda: "A CPU")


def text_of(name: str, results: list[Result]) -> str:
    printer = PRINTERS[name]()
    return (
        printer.head([result.case for result in results]) + "".join(map(printer.row, results)) + printer.foot(results)
    )


def check_row(row: dict[str, Any], result: Result) -> None:
    assert set(row) >= KEYS
    assert {name: row[name] for name in DEFAULTS} == DEFAULTS
    assert row["model_filename"] == 'it\'s, "m".gguf'
    assert (row["model_type"], row["model_size"]) == ("llama 8B Q4_K - Medium", 4_920_739_232)
    assert (row["build_commit"], row["build_number"], row["cpu_info"]) == ("abcd1234", 77, "A CPU")
    assert (row["n_prompt"], row["n_gen"], row["n_depth"]) == (
        result.case.n_prompt,
        result.case.n_gen,
        result.case.n_depth,
    )
    assert (row["avg_ns"], row["stddev_ns"]) == (450_000_000, 70_710_678)
    assert row["avg_ts"] == pytest.approx(result.avg_ts, abs=1e-6)
    assert row["test_time"] == "2026-01-02T03:04:05Z"


@pytest.mark.parametrize("n", [0, 1, 2])
def test_json(results: list[Result], n: int) -> None:
    """Complete, however many results there are."""
    rows = json.loads(text_of("json", results[:n]))
    assert len(rows) == n
    for row, result in zip(rows, results, strict=False):
        assert list(row) == [*COLUMNS, "samples_ns", "samples_ts", *OWN]
        check_row(row, result)
        assert row["samples_ns"] == [400_000_000, 500_000_000]
        assert row["samples_ts"] == pytest.approx([n * 2.5 for n in (512, 409.6)] if row["n_prompt"] else [320, 256])
        assert row["limit_fraction"] == result.fraction


def test_jsonl(results: list[Result]) -> None:
    lines = text_of("jsonl", results).splitlines()
    assert [json.loads(line) for line in lines] == json.loads(text_of("json", results))


def test_csv(results: list[Result]) -> None:
    text = text_of("csv", results)
    head, first, *_ = text.splitlines()
    assert head == ",".join([*COLUMNS, *OWN])
    assert first.startswith('"abcd1234","77","A CPU","","CPU","it\'s, ""m"".gguf",')
    for row, result in zip(csv.DictReader(io.StringIO(text)), results, strict=True):
        numbers = {name: type for name, type in COLUMNS.items() if type != "TEXT"}
        check_row({name: float(value) if name in numbers else value for name, value in row.items()}, result)


def test_sql(results: list[Result]) -> None:
    """Two runs go into one database, of llama-bench's own schema."""
    database = sqlite3.connect(":memory:")
    database.executescript(text_of("sql", results))
    database.executescript(text_of("sql", results))
    assert {name: type for _, name, type, *_ in database.execute("PRAGMA table_info(llama_bench)")} == COLUMNS
    database.row_factory = sqlite3.Row
    rows = [dict(row) for row in database.execute("SELECT * FROM llama_bench")]
    assert len(rows) == 4
    for row, result in zip(rows, results * 2, strict=True):
        check_row(row, result)
    assert "-- limit_read_bytes 40000000000, limit_int8_ops 1800000000000, limit_fraction 0.4567" in text_of(
        "sql", results
    )


def test_markdown(results: list[Result]) -> None:
    """llama-bench's table with a column more."""
    table = """\
| model                          |       size |     params | backend    | threads |            test |                  t/s | of limit |
| ------------------------------ | ---------: | ---------: | ---------- | ------: | --------------: | -------------------: | -------: |
| llama 8B Q4_K - Medium         |   4.58 GiB |     8.03 B | CPU        |       2 |           pp512 |     1152.00 ± 181.02 |    45.7% |
| llama 8B Q4_K - Medium         |   4.58 GiB |     8.03 B | CPU        |       2 |     tg128 @ d64 |       288.00 ± 45.25 |    98.0% |

build: abcd1234 (77)
limits, 2 threads: read 40.0 GB/s, int8 dot 1800 Gop/s ("""  # noqa: E501
    assert text_of("md", results).startswith(table)
    small = replace(results[0].facts, model_size=96_576_768, n_params=134_515_008)
    row = text_of("md", [replace(results[0], facts=small)]).splitlines()[2]
    assert row.split(" | ")[1:3] == [" 92.10 MiB", "  134.52 M"]


@pytest.mark.parametrize(
    ("change", "title", "value"),
    [
        ({"n_batch": 64}, "n_batch", "     64"),
        ({"n_ubatch": 32}, "n_ubatch", "      32"),
        ({"type_k": "f32", "type_v": "q8_0"}, "type_k | type_v", "   f32 |   q8_0"),
        ({"device": "cpu"}, "dev         ", "cpu         "),
        ({"gpu_layers": "12"}, "ngl", " 12"),
        ({"gpu_layers": "all"}, "ngl", " -2"),
        ({"n_cpu_moe": 3}, "n_cpu_moe", "        3"),
        ({"cpu_moe": True}, "n_cpu_moe", "       -1"),
        (
            {"device": "cuda:0,cuda:1", "tensor_split": "3,1"},
            "          ts | dev         ",
            "   3.00/1.00 | cuda:0/cuda:1",
        ),
    ],
)
def test_markdown_shows_what_differs_from_the_defaults(
    results: list[Result], change: dict[str, Any], title: str, value: str
) -> None:
    other = replace(results[0], case=replace(results[0].case, **change))
    lines = text_of("md", [results[0], other]).splitlines()
    assert f"| {title} |" in lines[0]
    assert f"| {value} |" in lines[3]
    assert title not in text_of("md", results)


def test_markdown_lists_the_limits_of_each_number_of_threads(results: list[Result]) -> None:
    one = replace(results[0], limits=Limits(1, 20e9, 900e9))
    lines = text_of("md", [*results, one]).splitlines()
    assert [line.split(":")[0] for line in lines[-2:]] == ["limits, 2 threads", "limits, 1 thread"]
    assert text_of("md", []).count("limits") == 0


def test_an_undetermined_number_is_never_printed(results: list[Result]) -> None:
    single = replace(results[0], samples_ns=(400_000_000,))
    row = json.loads(text_of("jsonl", [single]))
    assert (row["stddev_ns"], row["stddev_ts"]) == (0, 0)
    assert all(math.isfinite(value) for value in row.values() if isinstance(value, int | float))


def test_build_names_the_commit_or_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    build = bench_output.build.__wrapped__
    commit, number = build()
    if (Path(bench_output.__file__).resolve().parents[2] / ".git").exists():
        assert len(commit) >= 8
        assert int(commit, 16) >= 0
        assert number > 0
    monkeypatch.setattr(bench_output, "__file__", str(tmp_path / "runtime/bench/output.py"))
    commit, number = build()
    assert commit.startswith("gguf-run-")
    assert number == 0
    assert bench_output.cpu_info()


def test_gpus_are_named(results: list[Result]) -> None:
    limits = Limits(0, 4.3e12, 7.9e14, "GPU 0, NVIDIA H200")
    gpu = replace(results[0], limits=limits, gpus=("GPU 0, NVIDIA H200",))
    both = replace(gpu, fraction=None)
    assert [bench_output.fields(result)["backends"] for result in (gpu, both)] == ["Triton", "Triton,CPU"]
    assert bench_output.fields(gpu)["gpu_info"] == "GPU 0, NVIDIA H200"
    lines = text_of("md", [gpu, both]).splitlines()
    assert "| GPU 0, NVIDIA H200 |" in lines[2]
    assert lines[2].endswith("45.7% |")
    assert "| GPU 0, NVIDIA H200, CPU |" in lines[3]
    assert lines[3].endswith("|          |")
    assert lines[-1] == "limits, GPU 0, NVIDIA H200: read 4300.0 GB/s, f16 dot 790000 Gop/s"
    assert '"limit_fraction": null' in text_of("jsonl", [both])
