"""Several prompts answered together, on small random models: each gets what it gets alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tinymodel import TINY_GEMMA3, Tiny, write_tiny

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime import Model
from gguf_run.runtime.engine.check import ContextError

MODELS = {"llama": Tiny(), "gemma3": TINY_GEMMA3}
START = "the order and another one " * 2
PROMPTS = [START + end for end in ("", "a", "of the order and the other", "b c d e f g h i j k l m n o p ")]
GREEDY = {"temperature": 0.0, "max_tokens": 20}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path: Path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny(path, MODELS[request.param])
    with Model.load(path, n_threads=2, n_ctx=128, n_batch=32, n_seq=4, cache_type="f32") as model:
        yield model


def alone(model: Model, prompt: str, **options: object) -> tuple[str, str]:
    return "".join(model.generate(prompt, **options)), model.stats.finish  # type: ignore[arg-type]


def test_answers_are_those_of_each_prompt_alone(model: Model) -> None:
    expected = [alone(model, prompt, **GREEDY) for prompt in PROMPTS]
    ids = [model.tokenize(prompt) for prompt in PROMPTS]
    n_common = min(len(ids[0]) - 1, next(i for i, column in enumerate(zip(*ids, strict=False)) if len({*column}) > 1))
    for prompts in ([0, 1, 2, 3], [2, 0], [3]):
        answers = model.generate_batch([PROMPTS[i] for i in prompts], **GREEDY)  # type: ignore[arg-type]
        assert [(answer.text, answer.finish) for answer in answers] == [expected[i] for i in prompts]
        assert [answer.n_prompt for answer in answers] == [len(ids[i]) for i in prompts]
        assert model.stats.n_decoded == sum(max(0, answer.n_decoded - 1) for answer in answers)
    model.generate_batch(PROMPTS, **GREEDY)  # type: ignore[arg-type]
    assert model.stats.n_reused >= 3 * n_common > 0
    assert alone(model, PROMPTS[1], **GREEDY) == expected[1]


def test_sequences_leave_the_batch_at_their_own_time(model: Model) -> None:
    """At a stop string, at the end of the context."""
    texts = [alone(model, prompt, temperature=0.0)[0] for prompt in PROMPTS]
    stop = texts[1][3:5]
    options = {"temperature": 0.0, "stop": [stop]}
    expected = [alone(model, prompt, **options) for prompt in PROMPTS]
    answers = model.generate_batch(PROMPTS, **options)  # type: ignore[arg-type]
    assert [(answer.text, answer.finish) for answer in answers] == expected
    assert answers[1].finish == "stop"


def test_each_sequence_has_a_seed_of_its_own(model: Model) -> None:
    drawn = model.generate_batch([START] * 4, seed=5, temperature=1.5, max_tokens=20)
    assert [answer.seed for answer in drawn] == [5, 6, 7, 8]
    assert len({answer.text for answer in drawn}) > 1
    assert drawn[2].text == alone(model, START, seed=7, temperature=1.5, max_tokens=20)[0]
    seeds = {answer.seed for answer in model.generate_batch([START] * 4, max_tokens=1)}
    assert len(seeds) == 4


def test_more_prompts_than_sequences(model: Model) -> None:
    """The others wait for their turn."""
    prompts = [f"{prompt}{i} " for i in range(3) for prompt in PROMPTS]
    expected = [alone(model, prompt, **GREEDY) for prompt in prompts]
    answers = model.generate_batch(prompts, **GREEDY)  # type: ignore[arg-type]
    assert [(answer.text, answer.finish) for answer in answers] == expected
    assert model.stats.prefill_s > 0
    assert model.stats.decode_s > 0


def test_what_a_batch_cannot_be(model: Model) -> None:
    with pytest.raises(GgufRunError, match="a batch of 0 prompts: give one at least"):
        model.generate_batch([])
    with pytest.raises(ContextError, match=r"prompt 1 has .* tokens, the context holds 128"):
        model.generate_batch([START, START * 20])


def test_a_long_text_goes_on_by_context_shifts(model: Model) -> None:
    text = "".join(model.generate(START, temperature=0.0, max_tokens=150, context_shift=True, n_keep=10))
    assert text
    assert model.stats.finish in ("length", "stop")
    if model.stats.finish == "length":
        assert model.stats.n_decoded == 149
        assert model.decoder.n_past < 128
    assert np.isfinite(model.logits(model.tokenize(START))).all()
