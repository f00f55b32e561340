"""Answers are the same with and without guesses, whatever is guessed."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_decoder import GREEDY, N_VOCAB, FakeDecoder, Oracle, check, check_index, engine_of, expected, ids_of, request
from tinymodel import TINY_GEMMA3, Tiny, write_tiny

from gguf_run.runtime.engine.engine import Engine
from gguf_run.runtime.engine.speculation import MOST, Speculation
from gguf_run.runtime.model import Model
from gguf_run.runtime.sampling.params import SamplingParams

RANDOM = SamplingParams(seed=5, temperature=3.0)


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf_run.runtime.engine.speculation.Lookup", Oracle)


def guessing(n_outputs: int = 64, stop_ids: Sequence[int] = (), **options: Any) -> Engine:
    decoder = FakeDecoder(cost=(5, 0.2, 0.2, 0.05), **options)
    decoder.n_outputs = n_outputs
    return engine_of(decoder, stop_ids, speculation=Speculation())


def runs_of(engine: Engine) -> list[dict[int, int]]:
    return engine.decoder.runs  # type: ignore[attr-defined, no-any-return]


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("windows", [(0,), (0, 70)])
def test_one_answer(windows: tuple[int, ...]) -> None:
    engine = guessing(windows=windows)
    sequence = engine.add(request([1, 2, 3], 300))
    assert ids_of(sequence) == expected([1, 2, 3], 300)
    job = sequence.job
    assert len(runs_of(engine)) < 100
    assert max(run[0] for run in runs_of(engine)) == 1 + MOST
    assert job.n_decoded == 299
    assert 0.5 * job.n_guessed < job.n_right < job.n_guessed
    assert job.n_right + len(runs_of(engine)) == 300
    check(engine)
    assert check_index(engine) > 0
    assert engine.decoder.cache.slots[0].ids == [1, 2, 3, *expected([1, 2, 3], 299)]


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("n_cells", [None, 256])
def test_many_answers(n_cells: int | None) -> None:
    """Of all lengths, while prompts arrive, and in a cache that is too small for all."""
    engine, rng = guessing(n_cells=n_cells), random.Random(2)
    asked = [[rng.randrange(N_VOCAB) for _ in range(rng.randint(1, 150))] for _ in range(12)]
    sequences = []
    for i, ids in enumerate(asked):
        sequences.append(engine.add(request(ids, 20 + 5 * i)))
        for _ in range(4):
            engine.step()
            check(engine)
    while engine.step():
        check(engine)
    assert [ids_of(sequence) for sequence in sequences] == [expected(ids, 20 + 5 * i) for i, ids in enumerate(asked)]
    assert sum(sequence.job.n_right for sequence in sequences) > 100
    assert check_index(engine) > 0


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("max_tokens", [1, 2, 7, 40])
def test_the_end_lies_in_a_guess(max_tokens: int, right: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Oracle, "right", right)
    prompt, text = [1, 2, 3], expected([1, 2, 3], 200)
    for options in (
        {"max_tokens": max_tokens},
        {"max_tokens": 200, "stop": ["".join(chr(0x4E00 + i) for i in text[9:11])]},
    ):
        engine = guessing()
        job = (sequence := engine.add(request(prompt, **options))).job
        assert ids_of(sequence) == text[: max_tokens if options["max_tokens"] == max_tokens else 9]
        held = engine.decoder.cache.slots[0].ids
        assert held == [*prompt, *job.reply.tokens[:-1]]
    engine = guessing(stop_ids=[text[30]])
    assert ids_of(engine.add(request(prompt, 200))) == text[: text.index(text[30])]
    engine = guessing(n_ctx=64)
    answer = (sequence := engine.add(request(prompt, None))).answer()
    assert (list(answer.ids), answer.finish) == (text[:62], "context")


@pytest.mark.usefixtures("oracle")
def test_a_context_that_is_shifted() -> None:
    """The sums of the fake decoder stay those of the first positions, so the oracle is wrong from then on."""
    texts = []
    for speculation in (None, Speculation()):
        decoder = FakeDecoder(n_ctx=192, n_seq=1)
        decoder.is_shifted, decoder.n_outputs = True, 64
        engine = engine_of(decoder, speculation=speculation)
        texts.append(ids_of(engine.add(request([1, 2, 3], 500, context_shift=True))))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "sampling",
    [
        RANDOM,
        SamplingParams(seed=1, temperature=2.0, repeat_penalty=1.5, mirostat=2),
        SamplingParams(temperature=0, logprobs=2),
    ],
)
def test_draws_are_the_same(sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guesses are the answer that is drawn without them, with faults."""
    plain = engine_of(FakeDecoder()).add(request([1, 2, 3], 100, sampling=sampling)).answer()

    class Drawn(Oracle):
        def guess(self, most: int) -> list[int]:
            self.n_same, start = 8, len(self._ids) - 3
            return [id if self.rng.random() < 0.9 else 0 for id in plain.ids[start : start + most]]

    monkeypatch.setattr("gguf_run.runtime.engine.speculation.Lookup", Drawn)
    engine = guessing()
    sequence = engine.add(request([1, 2, 3], 100, sampling=sampling))
    answer = sequence.answer()
    assert answer.ids == plain.ids
    assert [(one.id, one.logprob) for one in answer.logprobs] == [(one.id, one.logprob) for one in plain.logprobs]
    assert sequence.job.n_right > 50


@pytest.mark.usefixtures("oracle")
def test_wrong_guesses_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for one from time to time."""
    monkeypatch.setattr(Oracle, "right", 0.0)
    engine = guessing()
    sequence = engine.add(request([1, 2, 3], 500))
    assert ids_of(sequence) == expected([1, 2, 3], 500)
    assert sequence.job.n_right == 0
    late = [run[0] - 1 for run in runs_of(engine)[200:]]
    assert 0 < sum(late) < 60


@pytest.mark.usefixtures("oracle")
def test_rows_that_cost_as_much_as_steps_are_not_guessed() -> None:
    engine = guessing()
    engine.decoder.cost = (0.1, 5, 5, 0)  # type: ignore[attr-defined]
    sequence = engine.add(request([1, 2, 3], 300))
    assert ids_of(sequence) == expected([1, 2, 3], 300)
    assert sum(run[0] - 1 for run in runs_of(engine)[100:]) < 20


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("n_outputs", [4, 6])
def test_rows_of_logits_are_few(n_outputs: int) -> None:
    engine = guessing(n_outputs)
    sequences = [engine.add(request([i, 2], 50)) for i in range(4)]
    while engine.step():
        pass
    assert [ids_of(sequence) for sequence in sequences] == [expected([i, 2], 50) for i in range(4)]


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("where", ["step", "sample"])
def test_an_interrupt(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer goes on as if nothing had been."""
    engine = guessing()
    sequence, found = engine.add(request([1, 2, 3], 60)), list[str]()
    n_calls = 0

    def sample(*arguments: Any) -> int:
        nonlocal n_calls
        n_calls += 1
        if n_calls % 7 == 0:
            raise KeyboardInterrupt
        return original(*arguments)

    original = sequence.job.reply.sampler.sample
    if where == "sample":
        monkeypatch.setattr(sequence.job.reply.sampler, "sample", sample)
    n_interrupts = 0
    while not sequence.job.is_over or sequence.job.pieces:
        if where == "step" and len(runs_of(engine)) % 3 == 2:
            engine.decoder.fails = [KeyboardInterrupt()]  # type: ignore[attr-defined]
        try:
            found += [next(sequence)]
        except KeyboardInterrupt:
            n_interrupts += 1
    assert n_interrupts > 1
    assert ids_of(found) == expected([1, 2, 3], 60)


@pytest.mark.usefixtures("oracle")
def test_an_error_in_a_guess_ends_one_answer() -> None:
    def broken(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        if len(ids) == 9:
            raise ValueError("a processor")
        return logits

    engine = guessing()
    bad = engine.add(request([1, 2, 3], 60, sampling=SamplingParams(temperature=0, logits_processors=[broken])))
    good = engine.add(request([4, 5, 6], 60, sampling=GREEDY))
    while engine.step():
        check(engine)
    assert ids_of(good) == expected([4, 5, 6], 60)
    found = list[str]()
    with pytest.raises(ValueError, match="a processor"):
        found.extend(bad)
    assert ids_of(found) == expected([1, 2, 3], 6)
    assert engine.healthy


@pytest.mark.parametrize("tiny", [Tiny(), TINY_GEMMA3])
def test_real_models(tiny: Tiny, tmp_path: Path) -> None:
    """Their texts repeat themselves."""
    write_tiny(path := tmp_path / "tiny.gguf", tiny)
    prompts = [[5, 6, 7] * 5, [9] * 20, [20, 21, 22, 23, 24]]
    answers, n_right = [], 0
    for speculate in (False, True):
        with Model.load(path, device="cpu", n_threads=1, n_seq=3, cache_type="f32", speculate=speculate) as model:
            options = {"max_tokens": 60, "ignore_eos": True}
            for temperature in (0.0, 0.7):
                answers.append(
                    [a.ids for a in model.generate_batch(prompts, temperature=temperature, seed=1, **options)]
                )
                n_right += model.stats.n_right
                answers.append([model.complete(p, temperature=temperature, seed=1, **options).ids for p in prompts])
                n_right += model.stats.n_right
    assert answers[:4] == answers[4:]
    assert n_right > 20
