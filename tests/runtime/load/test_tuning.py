"""Loading a model fits the kernels to the machine: once, for models that are worth it, and never with an error."""

import json
from pathlib import Path

import pytest
from tinymodel import Tiny, write_tiny

from gguf_run.kernels_cpu.measure import tune
from gguf_run.kernels_cpu.vector.isa import Tuning
from gguf_run.runtime import Model
from gguf_run.runtime.load import load_model

FOUND = Tuning(ahead=0, piece_bytes=65536)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose numbers stand in tmp_path."""
    monkeypatch.setattr(load_model, "tuning_path", lambda panel: tmp_path / f"tuning-{panel}.json")
    write_tiny(tmp_path / "tiny.gguf", Tiny())
    return tmp_path / "tiny.gguf"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads that the machine was measured with, each time."""
    found: list[int] = []

    def measure(panel: int, n_threads: int, free_bytes: int | None) -> tuple[Tuning, list[tune.Trial]]:
        found.append(n_threads)
        return FOUND, []

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(load_model, "default_threads", lambda: 3)
    return found


def test_a_small_model_is_not_worth_a_second(model: Path, calls: list[int]) -> None:
    with Model.load(model, device="cpu") as loaded:
        assert loaded.tuning.startswith("defaults; ahead 0, ")
    assert calls == []


def test_the_first_model_measures_and_the_second_reads(
    model: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all cores, whatever number of threads is asked for."""
    monkeypatch.setattr(load_model, "_MEASURED_FROM", 1)
    for how in ("measured in", "measured before; "):
        with Model.load(model, device="cpu", n_threads=2) as loaded:
            assert loaded.tuning.startswith(how)
            assert loaded.decoder.backends[0].tuning == FOUND
            assert loaded.decoder.backends[0].n_threads == 2
    assert calls == [3]


def test_measured_threads_are_the_default(model: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    panels = []
    monkeypatch.setattr(load_model, "tuning_path", lambda panel: panels.append(panel) or model.parent / "here.json")
    (model.parent / "here.json").write_text(json.dumps(vars(Tuning(n_threads=2))))
    for asked, threads in ((None, 2), (1, 1)):
        with Model.load(model, device="cpu", n_threads=asked) as loaded:
            assert f" {threads} thread" in loaded.where
    (model.parent / "here.json").write_text("damaged")
    with Model.load(model, device="cpu") as loaded:
        assert " 3 threads" in loaded.where
        assert loaded.tuning.startswith("defaults")
