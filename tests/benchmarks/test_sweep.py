"""benchmarks/sweep.py and benchmarks/pair.py: its rows, measuring a tiny model, going on after a stop, the table."""

import itertools
import json
from pathlib import Path

import pair
import pytest
import sweep
from click.testing import CliRunner
from tinymodel import Tiny, write_tiny


def test_rounds() -> None:
    rounds = pair.Rounds(pair.Test("pp", 100), peer=[4.0, 2.0, 5.0], ours=[1.0, 2.0, 1.0])
    assert (rounds.peer_speed, rounds.ours_speed, rounds.ratio) == (25, 100, 4)
    assert (rounds.range, rounds.best) == ((1, 5), 2)


def test_rows_are_those_of_the_table() -> None:
    rows = list(sweep.rows())
    assert len({str(row) for row in rows}) == len(rows) == 2 + 11 * 2 + 3 + 1
    assert sum(row.limit_goal == 0.95 for row in rows) == 11
    assert [str(row) for row in rows if row.depth] == ["llama-1b Q4_K_M, 2 threads, depth 8192"]
    order = [row.model for row in rows]
    assert len(set(order)) == 1 + sum(a != b for a, b in itertools.pairwise(order)), "a file, then the next"


def record(row: sweep.Row, pp: float, tg: float, panels: float) -> str:
    """A line of results: the peer takes a second for each test, we pp and tg seconds."""
    tests = [
        {"test": {"kind": kind, "n": 64, "depth": 0}, "peer": [1.0, 1.0], "ours": [mine] * 2}
        | {"of_panels": [panels] * 2, "of_file": [0.5, 0.5]}
        for kind, mine in (("pp", pp), ("tg", tg))
    ]
    return json.dumps({"row": str(row), "tests": tests}) + "\n"


def test_table_tells_what_is_missed(tmp_path: Path) -> None:
    good, bad = list(sweep.rows())[2:4]  # goals 2.0, 1.15, 95 %; 2.0, 1.5, none
    results = tmp_path / "results.jsonl"
    results.write_text(record(bad, 0.1, 0.1, 0.1) + record(good, 0.5, 0.8, 0.96) + record(bad, 0.8, 0.8, 0.9))
    lines = list(sweep.table(sweep.read_results(results)))
    assert {line.count(" | ") for line in lines if "---" not in line} == {9}
    assert lines[1].count("---") == 10
    assert lines[2].startswith("| llama-1b Q4_0, 2 threads | 64 | 128 | 2.00 (2.00 to 2.00) | 96% | 64 | 80 | 1.25 (")
    assert lines[2].endswith(") | 96% | 50% |")
    assert "| **1.25** (1.25 to 1.25; goal 2.0) | 90% |" in lines[3]
    assert "| **1.25** (1.25 to 1.25; goal 1.5) | 90% | 50% |" in lines[3]


def test_only_missing_rows_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str]] = []

    def measure(row: sweep.Row, path: Path, plan: sweep.Plan) -> object:
        assert path.is_file()
        ran.append((str(row), path.name))
        return json.loads(record(row, 0.1, 0.1, 1.0))

    monkeypatch.setattr(sweep, "measure", measure)
    monkeypatch.setattr(sweep, "find_model", lambda name: tmp_path)
    monkeypatch.setattr(sweep, "model_file", lambda model, folder, gemma: sweep.made_file(model, folder))
    results, models = tmp_path / "results.jsonl", tmp_path / "models"
    models.mkdir()
    for type in ("Q4_0", "Q4_1"):
        (models / f"llama-1b-{type}.gguf").touch()
    results.write_text(record(list(sweep.rows())[2], 0.5, 0.8, 0.96))
    command = [str(results), "--models", str(models), "--row", "llama-1b Q4_[01]", "--delete"]
    assert CliRunner().invoke(sweep.main, command, catch_exceptions=False).exit_code == 0
    assert [name for name, _ in ran] == [
        *("llama-1b Q4_0, 1 thread", "llama-1b Q4_0, 2 threads, AVX2"),
        *("llama-1b Q4_1, 2 threads", "llama-1b Q4_1, 1 thread"),
    ]
    assert not list(models.iterdir())
    assert len(results.read_text().splitlines()) == 5
    assert CliRunner().invoke(sweep.main, command).exit_code == 0
    assert len(ran) == 4


def test_row_needs_a_folder(tmp_path: Path) -> None:
    result = CliRunner().invoke(sweep.main, [str(tmp_path / "r"), "--row", "Q4_0"])
    assert result.exit_code == 2
    assert "--models: give the folder" in result.output


def test_a_row_is_measured_and_its_instruction_set_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides are gguf-run here: llama.cpp needs npm."""
    path = tmp_path / "tiny.gguf"
    write_tiny(path, Tiny())

    class Ours(pair.Worker):
        def __init__(self, name: str, model: Path, n_threads: int, n_ctx: int, cpu: str = "auto", **options: object):
            super().__init__("ours", model, n_threads, n_ctx, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sweep, "Worker", Ours)
    plan = sweep.Plan(n_prompt=8, n_gen=4, repeat=2, seconds=0)
    found = sweep.measure(sweep.Row("tiny", n_threads=1, depth=16), path, plan)
    assert found["row"] == "tiny, 1 thread, depth 16"
    assert [test["test"] for test in found["tests"]] == [
        {"kind": "pp", "n": 8, "depth": 16},
        {"kind": "tg", "n": 4, "depth": 16},
    ]
    for test in found["tests"]:
        assert len(test["peer"]) == len(test["ours"]) == 2
        assert min(test["peer"] + test["ours"]) > 0
        for of_file, of_panels, limits in zip(test["of_file"], test["of_panels"], test["limits"], strict=True):
            assert 0 < of_file <= of_panels  # may be above 1: caches hold so small a model
            assert limits["read_bytes"] > 1e7
