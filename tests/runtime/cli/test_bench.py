"""gguf-bench from outside: how options are read, what is printed when, and how it ends."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tinymodel import Tiny, write_tiny

from gguf_run.formats.errors import OptionError
from gguf_run.kernels_cpu.measure import tune
from gguf_run.kernels_cpu.measure.limits import Limits, measure_limits
from gguf_run.runtime import Model
from gguf_run.runtime.bench import bench, tuning
from gguf_run.runtime.cli.bench import _cache_types, main, parse_values

COMMAND = [sys.executable, "-c", "from gguf_run.runtime.cli.bench import main; main(prog_name='gguf-bench')"]
QUICK = ("-p", 4, "-n", 2, "-r", 2, "-t", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny(path, Tiny(n_ctx=4096))
    # Compile what is not cached yet: no test is to see the line that says so.
    for cache_type in ("f16", "f32"):
        Model.load(path, cache_type=cache_type).close()
    measure_limits(1, n_bytes=1, seconds=1e-6)
    return path


@pytest.fixture
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring them takes half a second, which one test is enough to spend."""
    monkeypatch.setattr(bench, "measure_limits", lambda n_threads: Limits(n_threads, 1e10, 1e12))


def invoke(*arguments: Any) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert "internal error" not in result.stderr
    return result


def names_of(result: Result) -> list[str]:
    """The column "test" of a table."""
    return [line.split("|")[-4].strip() for line in result.stdout.splitlines()[2:] if line.startswith("|")]


# Options.


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["512"], [512]),
        (["1,2,4"], [1, 2, 4]),
        (["1", "2,4"], [1, 2, 4]),
        (["2-5"], [2, 3, 4, 5]),
        (["128-512+128"], [128, 256, 384, 512]),
        (["128-500+128"], [128, 256, 384]),
        (["1-64*4"], [1, 4, 16, 64]),
        (["3-20*2,7"], [3, 6, 12, 7]),
        (["5-5"], [5]),
        (["5-5*1"], [5]),
        (["0"], [0]),
        ([" 1 , 2 "], [1, 2]),
        (["8,8"], [8, 8]),
    ],
)
def test_parse_values(texts: list[str], values: list[int]) -> None:
    assert parse_values("-x", texts, 0) == values


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "1,",
        "a",
        "-1",
        "1.5",
        "1-",
        "5-2",
        "1-9+0",
        "1-9*1",
        "0-9*2",
        "1-9/2",
        "1-2-3",
        "99999999999",
        "1;2",
        "²",
    ],
)
def test_parse_values_rejects(text: str) -> None:
    with pytest.raises(OptionError, match="--n-prompt"):
        parse_values("--n-prompt", [text], 0)


def test_parse_values_has_bounds() -> None:
    assert parse_values("-t", ["1-8"], 1, 8) == list(range(1, 9))
    for text in ("0", "0-4", "9", "4-9", "2147483647"):
        with pytest.raises(OptionError, match="allowed are 1 to 8"):
            parse_values("-t", [text], 1, 8)
    with pytest.raises(OptionError, match="at most 10000 numbers"):
        parse_values("-p", ["1-2147483647"], 0)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ["pp512", "tg128"]),
        (["-p", "8,4", "-n", "3", "-n", "2"], ["pp8", "pp4", "tg3", "tg2"]),
        (["-p", "0", "-n", "1-4*2"], ["tg1", "tg2", "tg4"]),
        (["-p", "4", "-n", "0", "-pg", "6,2", "-pg", "0,3"], ["pp4", "pp6+tg2", "tg3"]),
        (["-p4", "-n2", "-d", "0,8"], ["pp4", "tg2", "pp4 @ d8", "tg2 @ d8"]),
        (["--n-prompt", "4", "--n-gen", "0", "--n-depth", "5"], ["pp4 @ d5"]),
    ],
)
@pytest.mark.usefixtures("no_limits")
def test_tests_run_in_llama_benchs_order(model: Path, options: list[str], names: list[str]) -> None:
    result = invoke(model, "-r", 1, "-t", 1, *options)
    assert result.exit_code == 0
    assert names_of(result) == names


@pytest.mark.usefixtures("no_limits")
def test_combinations(model: Path) -> None:
    """Models outermost, then devices, batches, cache types, threads; lengths innermost."""
    types = ("-ct", "f32", "-ctk", "f16")
    result = invoke(model, model, "-p4", "-n2", "-r1", "-t1,2", "-b8,4", "-ub", 2, "-dev", "cpu", *types, "-o", "jsonl")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["n_batch"], row["type_k"], row["n_threads"], row["n_prompt"]) for row in rows] == [
        (b, k, t, p) for _ in range(2) for b in (8, 4) for k in ("f32", "f16") for t in (1, 2) for p in (4, 0)
    ]
    assert all(row["type_k"] == row["type_v"] for row in rows)
    assert {(row["n_ubatch"], row["devices"]) for row in rows} == {(2, "cpu")}
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ([], ["f16/f16"]),
        (["-ct", "q8_0,f16"], ["q8_0/q8_0", "f16/f16"]),
        (["-ctk", "q8_0,f32"], ["q8_0/f16", "f32/f16"]),
        (["-ctk", "q8_0,f32", "-ctv", "f32"], ["q8_0/f32", "f32/f32"]),
        (["-ct", "q8_0", "-ctv", "f16,q8_0"], ["q8_0/q8_0", "f16/f16", "f16/q8_0"]),
    ],
)
def test_cache_types(options: list[str], pairs: list[str]) -> None:
    named = {name: options[i + 1 : i + 2] for i, name in enumerate(options) if name.startswith("-c")}
    found = _cache_types(*(named.get(name, []) for name in ("-ct", "-ctk", "-ctv")))
    assert ["/".join(pair) for pair in found] == pairs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-p", "x"], "--n-prompt 'x'"),
        (["-n", "-3"], "--n-gen '-3'"),
        (["-d", "1e3"], "--n-depth '1e3'"),
        (["-b", "0"], "--batch-size '0': allowed are 1"),
        (["-ub", "0"], "--ubatch-size '0'"),
        (["-t", "0"], "--threads '0'"),
        (["-t", "100000"], "--threads '100000'"),
        (["-pg", "5"], "-pg '5': must be two numbers"),
        (["-pg", "5,6,7"], "-pg '5,6,7'"),
        (["-pg", "1-2"], "-pg '1-2'"),
        (["-pg", "a,b"], "-pg 'a'"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-p", "0", "-n", "0", "-pg", "0,0"], "nothing to measure"),
        (["-ctk", "q7_0"], "--cache-type-k 'q7_0': allowed are f32, f16, bf16, q8_0,"),
        (["-ctv", ""], "--cache-type-v ''"),
        (["-ct", "f16,Q8_0"], "--cache-type 'Q8_0'"),
        (["-dev", "tpu"], "--device 'tpu'"),
        (["-dev", "cuda:0/cuda:0"], "--device cuda:0,cuda:0: several devices must be different GPUs"),
        (["-ngl", "3,x"], "--gpu-layers x: allowed are a number of layers"),
        (["-cmoe", "-ncmoe", "2"], "--n-cpu-moe 2: must be a number of layers from 0, without --cpu-moe"),
        (["-ts", "1/1"], "--tensor-split 1,1 has 2 parts"),
        (["-p", "1-200", "-d", "1-200"], "more than 10000 tests"),
        (["-p", "2000000000", "-d", "2000000000"], "a context of 4000000000 tokens"),
        (["-r", "0"], "repetitions"),
        (["--delay", "-1"], "delay"),
        (["--delay", "nan"], "delay"),
        (["-o", "xml"], "output"),
    ],
)
def test_bad_options(model: Path, options: list[str], words: str) -> None:
    result = invoke(model, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert sum(line.lower().startswith("error: ") for line in result.stderr.splitlines()) == 1


def test_a_model_is_needed() -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "Missing argument" in result.stderr


# What comes out.


def test_everything_is_measured(model: Path) -> None:
    result = invoke(model, *QUICK, "-o", "json")
    assert (result.exit_code, result.stderr) == (0, "")
    prompt, generation = json.loads(result.stdout)
    for row, n in ((prompt, 4), (generation, 2)):
        assert len(row["samples_ns"]) == 2
        assert row["samples_ts"] == pytest.approx([1e9 * n / ns for ns in row["samples_ns"]], abs=1e-3)
        assert row["avg_ts"] == pytest.approx(sum(row["samples_ts"]) / 2, abs=1e-3)
        assert row["avg_ts"] > 0
        assert row["limit_read_bytes"] > 1e7
        assert row["limit_int8_ops"] > 1e7
        assert row["limit_fraction"] > 0
        assert row["model_filename"] == str(model)
    assert prompt["limit_read_bytes"] == generation["limit_read_bytes"]


@pytest.mark.usefixtures("no_limits")
def test_table(model: Path) -> None:
    result = invoke(model, *QUICK)
    head, rule, *rows, empty, build, limits = result.stdout.splitlines()
    assert [title.strip() for title in head.split("|")] == [
        "", "model", "size", "params", "backend", "threads", "test", "t/s", "of limit", ""
    ]  # fmt: skip
    assert re.fullmatch(r"(\| -+[-:] )+\|", rule)
    assert len(rows) == 2
    assert {len(line) for line in (head, rule, *rows)} == {len(head)}
    assert empty == ""
    assert re.fullmatch(r"build: \S+", build)
    assert limits.startswith("limits, 1 thread: read 10.0 GB/s, int8 dot 1000 Gop/s (")


# Errors and the end.


@pytest.mark.usefixtures("no_limits")
def test_a_missing_model_stops_before_anything_is_printed(model: Path, tmp_path: Path) -> None:
    for models in ([tmp_path / "gone.gguf"], [model, tmp_path / "gone.gguf"], [tmp_path]):
        result = invoke(*models, *QUICK)
        assert (result.exit_code, result.stdout) == (1, "")
        assert re.fullmatch(rf"error: [^\n]*{re.escape(str(models[-1]))}[^\n]*\n", result.stderr)


@pytest.mark.usefixtures("no_limits")
def test_a_model_that_cannot_be_loaded_stops_after_the_rows_before(model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    write_tiny(bad, Tiny(metadata={"block_count": 3}))
    result = invoke(model, bad, model, *QUICK, "-o", "json")
    assert result.exit_code == 1
    assert len(json.loads(result.stdout)) == 2
    assert re.fullmatch(rf"error: {re.escape(str(bad))}: tensor [^\n]*\n", result.stderr)


@pytest.mark.usefixtures("no_limits")
def test_a_context_beyond_memory(model: Path) -> None:
    result = invoke(model, "-p", 2_000_000_000, "-n", 0)
    assert result.exit_code == 1
    assert "out of memory" in result.stderr
    assert result.stderr.count("\n") == 1


def test_interrupted(model: Path) -> None:
    """Ctrl-C: what was measured is there, and complete in its format."""
    arguments = [str(model), "-p", "4", "-n", "4000", "-r", "100", "-t", "1", "-o", "json"]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        seen = b""
        while b"samples_ns" not in seen:  # pp4 has run, tg4000 takes its time
            seen += os.read(process.stdout.fileno(), 65536)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert errors == b"\n"
    assert [row["n_prompt"] for row in json.loads(seen + rest)] == [4]


def test_closed_stdout(model: Path) -> None:
    command = " ".join([*(f'"{word}"' for word in COMMAND), str(model), "-p 4 -n 2 -r 1 -t 1"])
    done = subprocess.run(["bash", "-c", f"{command} >&-"], capture_output=True, timeout=240)
    assert done.returncode == 1
    assert done.stderr == b"error: stdout is closed: there is nowhere to write to\n"


def lines_of_terminal(command: list[str]) -> Iterator[bytes]:
    """What a command writes to a wide terminal, in pieces."""
    master, slave = pty.openpty()
    wide = os.environ | {"COLUMNS": "200"}
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=wide) as process:
        os.close(slave)
        while process.poll() is None or select.select([master], [], [], 0)[0]:
            if select.select([master], [], [], 0.1)[0]:
                try:
                    yield os.read(master, 65536)
                except OSError:  # the other end is closed
                    break
    os.close(master)


def test_progress_on_a_terminal(model: Path) -> None:
    shown = b"".join(lines_of_terminal([*COMMAND, str(model), *map(str, QUICK)])).decode()
    for line in ("measuring the limits", "loading tiny.gguf", "pp4: warming up", "tg2: run 2 of 2"):
        assert f"\r{line}" in shown
    # What stays on the screen: a line break never ends a line of progress.
    final = [line.rsplit("\r", 1)[-1] for line in shown.replace("\r\n", "\n").split("\n")]
    assert [line.split("|")[-4].strip() for line in final if line.startswith("|")][2:] == ["pp4", "tg2"]
    assert not any("run 2" in line for line in final)


# Fitting the kernels to the CPU.


def test_tune_shows_the_candidates_and_keeps_the_choice(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tuning.json"
    monkeypatch.setattr(tuning, "tuning_path", lambda panel: path)
    monkeypatch.setattr(tune, "_MOST_BYTES", 8 << 20)
    monkeypatch.setattr(tune, "_ROUNDS", 2)
    result = invoke("--tune", model)
    assert result.exit_code == 0
    head, _, *rows, last = result.stdout.splitlines()
    assert head == "| number | candidate | ms | to the default | rounds won | |"
    assert last == f"kept in {path}"
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    found = {number: int(value) for number, value, *_, chosen in cells if chosen == "chosen"}
    kept = json.loads(path.read_text())
    assert kept.keys() == found.keys()
    assert found | {"n_threads": kept["n_threads"]} == kept
    path.unlink()
    path.mkdir()
    assert invoke("--tune", model).stdout.splitlines()[-1].startswith(f"not kept: cannot write to {path}")
