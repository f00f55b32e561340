"""Numbers that are measured: what is chosen from times, what the kernels run, and what stands on disk afterwards."""

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gguf_run.kernels_cpu.measure import tune
from gguf_run.kernels_cpu.measure.tune import Trial, choose, compare, measure, thread_counts, tune_once
from gguf_run.kernels_cpu.panels.panels import PANEL_OF, panel_id
from gguf_run.kernels_cpu.vector.isa import Tuning, stored_tuning

FOUND = Tuning(ahead=0, piece_bytes=65536, tile_tokens=8, n_threads=1)


def chosen(times: dict[int, Sequence[float]], gain: float = 0.95) -> int:
    rows = choose(times, gain)
    assert [row[0] for row in rows] == list(times)
    return next(value for value, *_, is_chosen in rows if is_chosen)


def test_a_clearly_faster_candidate_is_chosen() -> None:
    assert chosen({6144: [10.0] * 9, -1: [9.0] * 9, 0: [8.0] * 9, 16384: [10.2] * 9}) == 0


@pytest.mark.parametrize(
    "others",
    [
        [9.7] * 8,  # too small a gain
        [5.0, 5.0, 5.0, 5.0, 5.0, 11.0, 11.0, 11.0],  # five rounds of eight: something else was running
        [11.0] * 8,
    ],
)
def test_the_default_stays_without_a_clear_gain(others: list[float]) -> None:
    assert chosen({1: [10.0] * 8, 2: others}) == 1


def test_rounds_are_compared_with_themselves() -> None:
    """A machine that slows down for a while slows down all candidates of a round."""
    slow = [1.0, 1.0, 5.0, 7.0, 1.0, 6.0, 1.0, 1.0]
    assert chosen({1: slow, 2: [0.8 * t for t in slow]}) == 2
    assert chosen({1: slow, 2: slow}) == 1


def test_one_candidate_is_chosen() -> None:
    assert chosen({3: [1.0]}) == 3


def test_candidates_take_turns() -> None:
    order: list[int] = []

    def run(value: int) -> float:
        order.append(value)
        return float(value)

    times = compare([1, 2, 3], run)
    assert order[:6] == [1, 2, 3, 3, 2, 1]
    assert {value: set(found) for value, found in times.items()} == {1: {1.0}, 2: {2.0}, 3: {3.0}}
    assert len({len(found) for found in times.values()}) == 1


def test_a_slow_machine_gets_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_SECONDS", 0.0)
    assert len(compare([1, 2], lambda value: 1.0)[1]) == tune._LEAST_ROUNDS


def test_numbers_of_threads() -> None:
    assert {n: thread_counts(n) for n in (1, 2, 3, 8)} == {1: [1], 2: [2, 1], 3: [3, 2, 1], 8: [8, 6, 4]}


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_K", "F16"])
def test_measuring_runs_the_kernels(type_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With little memory and few rounds: each number has its candidates, one of which is chosen."""
    monkeypatch.setattr(tune, "_MOST_BYTES", 16 << 20)
    monkeypatch.setattr(tune, "_ROUNDS", 2)
    tuning, trials = measure(panel_id(PANEL_OF[type_name]), 2)
    by_number: dict[str, list[Trial]] = {}
    for trial in trials:
        by_number.setdefault(trial.number, []).append(trial)
        assert 0 < trial.seconds < 100
    assert list(by_number) == ["ahead", "piece_bytes", "tile_tokens", "n_threads"]
    for number, tried in by_number.items():
        (best,) = [trial.value for trial in tried if trial.chosen]
        stored = getattr(tuning, number)
        assert best == stored or (stored == 0 and number == "n_threads" and best == 2)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Measuring takes a moment and finds FOUND. The list grows by the panel each time."""
    calls: list[int] = []

    def found(panel: int, n_threads: int, free_bytes: int | None) -> tuple[Tuning, list[Trial]]:
        calls.append(panel)
        time.sleep(0.2)
        return FOUND, []

    monkeypatch.setattr(tune, "measure", found)
    return calls


def test_measured_once(tmp_path: Path, measured: list[int]) -> None:
    path = tmp_path / "tuning.json"
    tuning, line = tune_once(path, 3, 2, None)
    assert tuning == stored_tuning(path) == FOUND
    assert line.startswith("measured in ")
    assert tune_once(path, 3, 2, None) == (FOUND, "measured before")
    assert measured == [3]
    assert os.listdir(tmp_path) == ["tuning.json"]


def test_of_programs_that_start_together_one_measures(tmp_path: Path, measured: list[int]) -> None:
    path, results = tmp_path / "tuning.json", []
    threads = [threading.Thread(target=lambda: results.append(tune_once(path, 0, 2, None))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert measured == [0]
    lines = [line.partition(" in ")[0] for _, line in results]
    assert sorted(lines) == ["defaults: another process measures"] * 3 + ["measured"]
    assert all(
        tuning == (FOUND if line == "measured" else Tuning()) for (tuning, _), line in zip(results, lines, strict=True)
    )


def test_a_lock_of_a_process_that_was_killed_is_taken_over(tmp_path: Path, measured: list[int]) -> None:
    path, lock = tmp_path / "tuning.json", tmp_path / "tuning.lock"
    lock.touch()
    assert tune_once(path, 0, 2, None)[0] == Tuning()
    os.utime(lock, (time.time() - 3600,) * 2)
    assert tune_once(path, 0, 2, None)[0] == FOUND
    assert not lock.exists()


def test_an_interrupted_measurement_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune_once(tmp_path / "tuning.json", 0, 2, None)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"ahead": 0}', json.dumps(vars(FOUND) | {"ahead": "0"})])
def test_a_damaged_file_is_replaced(content: str, tmp_path: Path, measured: list[int]) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(content)
    assert tune_once(path, 0, 2, None)[0] == FOUND
    assert stored_tuning(path) == FOUND


def test_a_folder_that_takes_no_files_is_no_failure(tmp_path: Path, measured: list[int]) -> None:
    """Nor is a folder that has gone."""
    tuning, line = tune_once(tmp_path / "gone" / "tuning.json", 0, 2, None)
    assert tuning == FOUND
    assert "not kept: cannot write to " in line
    (tmp_path / "tuning.json").mkdir()
    (tmp_path / "tuning.json" / "file").touch()
    tuning, line = tune_once(tmp_path / "tuning.json", 0, 2, None)
    assert tuning == FOUND
    assert "not kept" in line


def no_memory(*_: object) -> None:
    raise MemoryError


@pytest.mark.parametrize(("free", "fails"), [(100 << 20, None), (None, no_memory)])
def test_little_memory(
    free: int | None, fails: Callable[..., None] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "measure", fails)
    path = tmp_path / "tuning.json"
    assert tune_once(path, 0, 2, free) == (Tuning(), "defaults: too little memory is free to measure")
    assert os.listdir(tmp_path) == []
