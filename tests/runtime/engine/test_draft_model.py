"""Guesses of a second model."""

from pathlib import Path

import pytest
from fake_decoder import FakeDecoder, check, engine_of, expected, ids_of, request
from tinymodel import Tiny, write_tiny

from gguf_run.formats.errors import OptionError
from gguf_run.runtime.engine.draft_model import DraftModel
from gguf_run.runtime.engine.speculation import MOST, Speculation
from gguf_run.runtime.model import Model


@pytest.mark.parametrize("n_seq", [1, 3])
def test_the_same_decoder_is_always_right(n_seq: int) -> None:
    decoder, other = (FakeDecoder(n_seq=n_seq, cost=(5, 0.2, 0.2, 0)) for _ in range(2))
    decoder.n_outputs = 64
    speculation = Speculation()
    speculation.draft = DraftModel(other)  # type: ignore[arg-type]
    engine = engine_of(decoder, speculation=speculation)
    asked = [[i, *range(90 * i)] for i in range(5)]
    sequences = [engine.add(request([id % 97 for id in ids], 100)) for ids in asked]
    while engine.step():
        check(engine)
    assert [ids_of(sequence) for sequence in sequences] == [expected([id % 97 for id in ids], 100) for ids in asked]
    for sequence in sequences:
        assert 50 < sequence.job.n_right == sequence.job.n_guessed
    assert max(n for run in decoder.runs for n in run.values()) > MOST


def test_an_error_of_the_draft_model_ends_the_answers_of_a_step() -> None:
    decoder, other = (FakeDecoder(cost=(5, 0.2, 0.2, 0)) for _ in range(2))
    speculation = Speculation()
    speculation.draft = DraftModel(other)  # type: ignore[arg-type]
    engine = engine_of(decoder, speculation=speculation)
    sequence = engine.add(request([1, 2, 3], 50))
    next(sequence)
    other.fails = [ValueError("broken")]
    with pytest.raises(ValueError, match="broken"):
        sequence.answer()
    check(engine)
    assert ids_of(engine.add(request([1, 2, 3], 50))) == expected([1, 2, 3], 50)


def test_a_text_runs_in_parts() -> None:
    """Guesses come when all of it has run; a known start does not run again."""
    other = FakeDecoder(n_batch=200)
    draft = DraftModel(other)  # type: ignore[arg-type]
    engine = engine_of(FakeDecoder())
    job = (sequence := engine.add(request([i % 97 for i in range(300)], 5))).job
    engine.step()
    engine.step()
    assert [draft.guess({job: 3}) for _ in range(2)] == [{}, {}]
    assert draft.guess({job: 3}) == {job: expected(job.ids, 3)}
    assert [run[0] for run in other.runs] == [128, 128, len(job.ids) - 256, 1, 1]
    other.cache.clear(job.row)
    assert draft.guess({job: 1}) == {job: expected(job.ids, 1)}
    assert other.runs[-1][0] < 64
    sequence.close()


def test_a_model_that_guesses_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny(path)
    with Model.load(path, device="cpu", n_threads=1) as plain:
        texts = [plain.complete("the", max_tokens=40, temperature=t, seed=3).ids for t in (0.0, 1.0)]
    with Model.load(path, device="cpu", n_threads=1, draft_model=path) as model:
        assert [model.complete("the", max_tokens=40, temperature=t, seed=3).ids for t in (0.0, 1.0)] == texts
        assert model.stats.n_guessed < 2 * model.stats.n_right  # those behind the end of a text are wrong


@pytest.mark.parametrize(
    ("tiny", "message"),
    [
        (Tiny(extra_tokens=6), r"--draft-model .*draft.gguf: has \d+ tokens, the model \d+; use a model with the same"),
        (Tiny(vocab="spm"), r"--draft-model .*draft.gguf: has "),
    ],
)
def test_another_vocabulary(tmp_path: Path, tiny: Tiny, message: str) -> None:
    write_tiny(tmp_path / "tiny.gguf")
    write_tiny(tmp_path / "draft.gguf", tiny)
    with pytest.raises(OptionError, match=message):
        Model.load(tmp_path / "tiny.gguf", device="cpu", n_threads=1, draft_model=tmp_path / "draft.gguf")


def test_the_text_is_that_without_guesses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where activations are rounded: a guessed token gets the same bits as one that runs alone."""
    monkeypatch.setattr(Speculation, "_worth", lambda self, lookup, ids: ids)  # whatever it costs
    write_tiny(tmp_path / "tiny.gguf", Tiny(type="Q8_0", n_ctx=400))
    texts = []
    for guesses in ({}, {"speculate": True}, {"draft_model": tmp_path / "tiny.gguf"}):
        options = {"device": "cpu", "n_threads": 2, "deterministic": True, **guesses}
        found, n_guessed = [], 0
        with Model.load(tmp_path / "tiny.gguf", **options) as model:  # type: ignore[arg-type]
            for temperature in (0, 0.9):
                found.append(model.complete([5, 6, 7, 8] * 9, max_tokens=200, temperature=temperature, seed=3).ids)
                n_guessed += model.stats.n_guessed
        texts.append(found)
        assert (n_guessed > 0) == bool(guesses)
    assert texts[1:] == texts[:1] * 2
