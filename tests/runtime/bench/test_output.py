"""gguf-bench's output formats against what llama-bench prints, written out here."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tinymodel import write_tiny

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_cpu.measure.limits import Limits
from gguf_run.runtime.bench import output as bench_output
from gguf_run.runtime.bench.bench import DEFAULTS, BenchedModel, Case, Result
from gguf_run.runtime.bench.output import PRINTERS

# The columns, most of them with llama-bench's names, and the values that it gives when only models, lengths and threads
# are chosen (None: the test below says which).
COLUMNS: dict[str, Any] = {
    "model_filename": None, "n_batch": 2048, "n_ubatch": 512, "n_threads": 2, "type_k": "f16", "type_v": "f16",
    "n_gpu_layers": -1, "n_cpu_moe": 0, "tensor_split": "0.00", "devices": "auto",
    "n_prompt": None, "n_gen": None, "n_depth": None,
    "build_commit": "abcd1234", "cpu_info": "A CPU", "gpu_info": "", "backends": "CPU",
    "model_type": "llama 8B Q4_K - Medium", "model_size": 4_920_739_232, "model_n_params": 8_030_261_248,
    "test_time": "2026-01-02T03:04:05Z",
    "avg_ts": None, "stddev_ts": None,
    "limit_read_bytes": 40_000_000_000, "limit_int8_ops": 1_800_000_000_000, "limit_fraction": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny(path)
    with GGUFFile.open(path) as file:
        model = BenchedModel.of(file)
    model = replace(model, model_type="llama 8B Q4_K - Medium", model_size=4_920_739_232, n_params=8_030_261_248)
    limits = Limits(2, 40e9, 1800e9)
    samples = (400_000_000, 500_000_000)
    time = "2026-01-02T03:04:05Z"
    options = replace(DEFAULTS, n_threads=2)
    return [
        Result(Case('it\'s, "m".gguf', 512, 0, options=options), model, limits, 0.4567, time, samples),
        Result(Case('it\'s, "m".gguf', 0, 128, 64, options=options), model, limits, 0.98, time, samples),
    ]


@pytest.fixture(autouse=True)
def known_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_output, "build", lambda: "abcd1234")
    monkeypatch.setattr(bench_output, "cpu_info", lambda: "A CPU")


def text_of(name: str, results: list[Result]) -> str:
    printer = PRINTERS[name]([result.case for result in results])
    return printer.head + "".join(map(printer.row, results)) + printer.foot(results)


def check_row(row: dict[str, Any], result: Result) -> None:
    known = {name: value for name, value in COLUMNS.items() if value is not None}
    assert {name: row[name] for name in known} == known
    assert row["model_filename"] == 'it\'s, "m".gguf'
    lengths = result.case.n_prompt, result.case.n_gen, result.case.n_depth
    assert (row["n_prompt"], row["n_gen"], row["n_depth"]) == lengths
    assert (row["avg_ts"], row["stddev_ts"]) == pytest.approx((result.avg_ts, result.stddev_ts), abs=1e-6)
    assert row["limit_fraction"] == result.fraction


@pytest.mark.parametrize("n", [0, 1, 2])
def test_json(results: list[Result], n: int) -> None:
    """Complete, however many results there are."""
    rows = json.loads(text_of("json", results[:n]))
    assert len(rows) == n
    for row, result in zip(rows, results, strict=False):
        assert list(row) == [*COLUMNS, "samples_ns", "samples_ts"]
        check_row(row, result)
        assert row["samples_ns"] == [400_000_000, 500_000_000]
        assert row["samples_ts"] == pytest.approx([n * 2.5 for n in (512, 409.6)] if row["n_prompt"] else [320, 256])


def test_jsonl(results: list[Result]) -> None:
    lines = text_of("jsonl", results).splitlines()
    assert [json.loads(line) for line in lines] == json.loads(text_of("json", results))


def test_csv(results: list[Result]) -> None:
    text = text_of("csv", results)
    head, first, *_ = text.splitlines()
    assert head == ",".join(COLUMNS)
    assert first.startswith('"it\'s, ""m"".gguf","2048","512","2","f16",')
    for row, result in zip(csv.DictReader(io.StringIO(text)), results, strict=True):
        texts = {"model_filename"} | {name for name, value in COLUMNS.items() if isinstance(value, str)}
        check_row({name: value if name in texts else float(value) for name, value in row.items()}, result)


def test_markdown(results: list[Result]) -> None:
    """llama-bench's table with a column more."""
    table = """\
| model                          |       size |     params | backend    | threads |            test |                  t/s | of limit |
| ------------------------------ | ---------: | ---------: | ---------- | ------: | --------------: | -------------------: | -------: |
| llama 8B Q4_K - Medium         |   4.58 GiB |     8.03 B | CPU        |       2 |           pp512 |     1152.00 ± 181.02 |    45.7% |
| llama 8B Q4_K - Medium         |   4.58 GiB |     8.03 B | CPU        |       2 |     tg128 @ d64 |       288.00 ± 45.25 |    98.0% |

build: abcd1234
limits, 2 threads: read 40.0 GB/s, int8 dot 1800 Gop/s ("""  # noqa: E501
    assert text_of("md", results).startswith(table)
    small = replace(results[0].model, model_size=96_576_768, n_params=134_515_008)
    row = text_of("md", [replace(results[0], model=small)]).splitlines()[2]
    assert row.split(" | ")[1:3] == [" 92.10 MiB", "  134.52 M"]


@pytest.mark.parametrize(
    ("change", "title", "value"),
    [
        ({"n_batch": 64}, "n_batch", "     64"),
        ({"n_ubatch": 32}, "n_ubatch", "      32"),
        ({"cache_type": ("f32", "q8_0")}, "type_k | type_v", "   f32 |   q8_0"),
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
    of_case = {name: change.pop(name) for name in ("n_batch", "n_ubatch") if name in change}
    case = replace(results[0].case, **of_case, options=replace(results[0].case.options, **change))
    other = replace(results[0], case=case)
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
    assert row["stddev_ts"] == 0
    assert all(math.isfinite(value) for value in row.values() if isinstance(value, int | float))


def test_build_names_the_commit_or_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    build = bench_output.build.__wrapped__
    if (Path(bench_output.__file__).resolve().parents[2] / ".git").exists():
        assert len(build()) >= 8
        assert int(build(), 16) >= 0
    monkeypatch.setattr(bench_output, "__file__", str(tmp_path / "runtime/bench/output.py"))
    assert build().startswith("gguf-run-")
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
