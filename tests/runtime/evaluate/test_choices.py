"""Multiple choice: files of tasks, llama.cpp's order, and which choice wins, against every choice run from scratch."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from real import shared_data, smollm2
from tinymodel import TINY_GEMMA3, Tiny, write_tiny

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime import Model
from gguf_run.runtime.evaluate.choices import (
    Accuracy,
    Question,
    Task,
    _log_probabilities,
    accuracy,
    llama_cpp_order,
    make_tasks,
    read_choices,
    read_hellaswag,
    wilson_interval,
)
from gguf_run.runtime.evaluate.text import Scorer, tokens_of

# Files.


def test_hellaswag_file() -> None:
    text = "A cat sits. it\n2\nruns.\nsleeps.\nis\r\nflies.\nNext: he\r\n 0 \r\na\nb\nc\nd\n"
    assert read_hellaswag(text, "f") == [
        Question(
            ("A cat sits. it runs.", "A cat sits. it sleeps.", "A cat sits. it is", "A cat sits. it flies."), 2, 1
        ),
        Question(("Next: he a", "Next: he b", "Next: he c", "Next: he d"), 0, 7),
    ]
    assert read_hellaswag(text.removesuffix("\n"), "f") == read_hellaswag(text, "f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f: has 0 lines; a HellaSwag file has 6 for each task"),
        ("a\n1\nb\nc\nd\n", "f: has 5 lines"),
        ("a\n1\nb\nc\nd\ne\n\n", "f: has 7 lines"),
        ("a\n4\nb\nc\nd\ne\n", "f, line 2: is '4'; the right ending is 0, 1, 2 or 3"),
        ("a\n-1\nb\nc\nd\ne\n", "f, line 2: is '-1'"),
        ("a\n0\nb\nc\nd\ne\na\n\nb\nc\nd\ne\n", "f, line 8: is ''"),
    ],
)
def test_bad_hellaswag_files(text: str, message: str) -> None:
    with pytest.raises(GgufRunError, match=message):
        read_hellaswag(text, "f")


def test_choices_file() -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "2 + 2 =", "choices": ["3", "4"], "answer": 1, "id": 7},
        {"prompt": "Say:\n", "choices": ["ja", " nein"], "answer": " nein"},
        {"prompt": "", "choices": ["x", "y", "z"], "answer": 0},
    ]
    text = "\n\n".join(json.dumps(line) for line in lines) + "\n"
    assert read_choices(text, "f") == [
        Question(("2 + 2 = 3", "2 + 2 = 4"), 1, 1),
        Question(("Say:\nja", "Say:\n nein"), 1, 3),
        Question(("x", "y", "z"), 0, 5),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not valid JSON: "),
        ("[" * 100_000, "is not valid JSON: "),
        ("[1]", "is not a JSON object with prompt, choices and answer"),
        ("{}", "has no prompt and no choices and no answer"),
        ('{"prompt": "a", "choices": ["b", "c"]}', "has no answer"),
        ('{"prompt": 1, "choices": ["b", "c"], "answer": 0}', "prompt is not a text"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "choices is not a list of at least two texts"),
        ('{"prompt": "a", "choices": "bc", "answer": 0}', "choices is not a list"),
        ('{"prompt": "a", "choices": ["b", ""], "answer": 0}', "choices is not a list"),
        ('{"prompt": "a", "choices": ["b", 1], "answer": 0}', "choices is not a list"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "answer is 2; allowed: 0 to 1, or the text"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": -1}', "answer is -1"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "answer is True"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 1.0}', "answer is 1.0"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": "d"}', "answer 'd' is none of the choices"),
    ],
)
def test_bad_choices_files(line: str, message: str) -> None:
    good = '{"prompt": "a", "choices": ["b", "c"], "answer": 0}'
    with pytest.raises(GgufRunError, match=f"^f, line 2: {message}"):
        read_choices(f"{good}\n{line}\n{good}", "f")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_choices_file(text: str) -> None:
    with pytest.raises(GgufRunError, match="f: holds no tasks; each line is"):
        read_choices(text, "f")


# Order and interval.


@pytest.mark.parametrize(
    ("n", "first"),
    [
        (400, [166, 398, 287, 372, 0, 51, 121, 399, 59, 95, 37, 160]),
        (10042, [4187, 10013, 7233, 9363, 1, 1286, 3036, 10032, 1474, 2371, 927, 3984]),
        (7, [2, 6, 4, 5, 0, 1, 3]),
    ],
)
def test_llama_cpp_order(n: int, first: list[int]) -> None:
    """The indices were printed by llama.cpp's loop in C++, compiled with g++ 12.2."""
    order = llama_cpp_order(n)
    assert order[:12] == first
    assert sorted(order) == list(range(n))


def test_order_skips_draws_that_would_favour_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^32 is 3 * 1431655765 + 1: one draw of 32 bits is too many for three tasks."""
    draws = iter([0, 1, 0xFFFFFFFF, 7])

    class Draws:
        def __init__(self, seed: int) -> None:
            assert seed == 1

        def randint(self, low: int, high: int, dtype: type) -> int:
            return next(draws)

    monkeypatch.setattr(np.random, "RandomState", Draws)
    assert llama_cpp_order(3) == [0, 2, 1]


def test_wilson_interval() -> None:
    """81 of 263: Wilson's interval in Newcombe, Statistics in Medicine 17 (1998), table I."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1


# Tasks and scores.


@pytest.fixture(scope="module", params=[Tiny(), TINY_GEMMA3], ids=["llama", "gemma3"])
def scorer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scorer]:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny(path, request.param)
    with Model.load(path, n_ctx=48, n_threads=2, cache_type="f32") as model, Scorer(model, 2) as scorer:
        yield scorer


PROMPTS = ("the order", "the order", "the order of the other", "another")
CHOICES = ("and so on", "a", "of the road", "the other thing", "of it")


def questions(prompts: Sequence[str] = PROMPTS) -> list[Question]:
    return [
        Question(tuple(f"{prompt} {choice}" for choice in CHOICES[i % 3 :]), i % 2, i + 1)
        for i, prompt in enumerate(prompts)
    ]


def log_probabilities(model: Model, task: Task) -> tuple[list[float], list[float]]:
    """Sum and mean of each choice, every one run from scratch, in float64."""
    sums, means = [], []
    for choice in task.choices:
        logits = model.logits(choice).astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        at = np.arange(task.n_common, len(choice))
        values = log_p[at - 1, np.array(choice)[at]]
        sums.append(values.sum())
        means.append(values.mean())
    return sums, means


def test_tasks(scorer: Scorer) -> None:
    (task,) = make_tasks(scorer.model, [Question(("the a", "the the a", "the a"), 2, 1)], "f")
    assert task.choices == [tokens_of(scorer.model, text) for text in ("the a", "the the a", "the a")]
    # A choice that is the beginning of another still has its last token to be scored.
    (task,) = make_tasks(scorer.model, [Question(("the a", "the a a a"), 0, 1)], "f")
    assert task.n_common == len(task.choices[0]) - 1
    assert task.n_tokens == len(task.choices[1]) + 1


def test_accuracy_against_choices_from_scratch(scorer: Scorer) -> None:
    tasks = make_tasks(scorer.model, questions(), "f")
    found = list(accuracy(scorer, tasks))
    assert [step.n for step in found] == [1, 2, 3, 4]
    for answers in (np.argmax, np.argmin):  # all right, then all wrong
        by_sum, by_mean = ([int(answers(log_probabilities(scorer.model, task)[i])) for task in tasks] for i in range(2))
        right = 4 if answers is np.argmax else 0
        *_, last = accuracy(scorer, [Task(t.choices, t.n_common, a) for t, a in zip(tasks, by_mean, strict=True)])
        assert last.n_normalized == right
        *_, last = accuracy(scorer, [Task(t.choices, t.n_common, a) for t, a in zip(tasks, by_sum, strict=True)])
        assert last.n_sum == right
    # Length matters here, or the two could have been mixed up.
    both = [log_probabilities(scorer.model, task) for task in tasks]
    assert any(np.argmax(sums) != np.argmax(means) for sums, means in both)


def test_sums_are_exact(scorer: Scorer) -> None:
    """Not only which is largest."""
    for task in make_tasks(scorer.model, questions(), "f"):
        assert _log_probabilities(scorer, task, resumes=False) == pytest.approx(
            log_probabilities(scorer.model, task)[0], abs=1e-4
        )


def test_nothing_is_computed_twice(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens in common run once for all choices, and once for tasks that begin alike; the last token never runs."""
    decoder = scorer.model.decoder
    ran = 0
    original = decoder.forward

    def counting(ids: Sequence[int], n_outputs: int = 1, seq: int = 0) -> Any:
        nonlocal ran
        ran += len(ids)
        return original(ids, n_outputs, seq)

    monkeypatch.setattr(decoder, "forward", counting)
    tasks = make_tasks(scorer.model, questions(("the order", "the order")), "f")
    list(accuracy(scorer, tasks[:1]))
    first = ran
    assert first == tasks[0].n_tokens - len(tasks[0].choices)
    ran = 0
    list(accuracy(scorer, tasks))
    again = tasks[1].n_tokens - len(tasks[1].choices)
    ran_last, second_common = tasks[0].choices[-1][:-1], tasks[1].choices[0][: tasks[1].n_common]
    same = [a == b for a, b in zip(ran_last, second_common, strict=False)]
    n_shared = [*same, False].index(False)
    assert n_shared > 2
    assert ran == first + again - min(n_shared, len(second_common) - 1)


def test_ties_go_to_the_first(scorer: Scorer) -> None:
    same = make_tasks(scorer.model, [Question(("the a", "the a"), 0, 1), Question(("the a", "the a"), 1, 2)], "f")
    *_, last = accuracy(scorer, same)
    assert last == Accuracy(2, 1, 1)
    assert last.normalized == last.by_sum == (0.5, wilson_interval(1, 2))


@pytest.mark.parametrize(
    ("texts", "message"),
    [(("the a", "the " * 60), r"f, line 5: has \d+ tokens, the context holds 48: use a larger --ctx-size")],
)
def test_task_that_does_not_fit(scorer: Scorer, texts: tuple[str, ...], message: str) -> None:
    with pytest.raises(GgufRunError, match=message):
        make_tasks(scorer.model, [Question(("the a", "the b"), 0, 1), Question(texts, 0, 5)], "f")


def test_choices_without_a_beginning(scorer: Scorer) -> None:
    """With BOS there is something before them."""
    if scorer.model.tokenizer.add_bos:
        (task,) = make_tasks(scorer.model, [Question(("ab", "ba"), 0, 3)], "f")
        assert task.n_common >= 1
        assert len(list(accuracy(scorer, [task]))) == 1
    else:
        with pytest.raises(GgufRunError, match="f, line 3: the choices have no beginning in common: give a prompt"):
            make_tasks(scorer.model, [Question(("ab", "ba"), 0, 3)], "f")


def test_real_hellaswag() -> None:
    """The first tasks that llama.cpp draws, against its library's mean log-probabilities (v0.5.0, each ending run from
    scratch); 8-bit activations differ by some hundredths."""
    by_llama_cpp = [
        (-2.884, -3.301, -4.356, -4.286),
        (-4.679, -2.932, -3.562, -4.248),
        (-4.051, -3.747, -3.490, -4.392),
    ]
    questions = read_hellaswag(shared_data("hellaswag_val_400.txt").read_text(), "f")
    with Model.load(smollm2(), n_ctx=256, n_threads=2) as model, Scorer(model, 2) as scorer:
        for i, expected in zip(llama_cpp_order(len(questions)), by_llama_cpp, strict=False):
            (task,) = make_tasks(model, [questions[i]], "f")
            lengths = [len(choice) - task.n_common for choice in task.choices]
            assert _log_probabilities(scorer, task, resumes=False) / lengths == pytest.approx(expected, abs=0.1)
            assert [step.n_normalized for step in accuracy(scorer, [task])] == [np.argmax(expected) == task.answer]
