"""Threads that share one model: each answer is that of a single thread, nobody waits for ever, errors are ours."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinymodel import write_tiny

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime import Model

PROMPTS = ("the order", "and another one", "the", "this is one")
GREEDY: Any = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("threads") / "tiny.gguf"
    write_tiny(path)
    return path


@pytest.fixture
def model(path: Path) -> Iterator[Model]:
    with Model.load(path, n_threads=2, n_seq=2) as model:
        yield model


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Start a thread; its result, or its error, comes into the list."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def result_of(work: Callable[[], Any], seconds: float = 60) -> Any:
    thread, results = in_thread(work)
    thread.join(seconds)
    assert results, "the thread waits for ever"
    return results[0]


def text(model: Model, prompt: str, **options: Any) -> str:
    return "".join(model.generate(prompt, **GREEDY | {"max_tokens": 40} | options))


def test_four_threads(model: Model) -> None:
    expected = [text(model, prompt) for prompt in PROMPTS]
    for _ in range(3):
        started = [in_thread(lambda prompt=prompt: text(model, prompt)) for prompt in PROMPTS]  # type: ignore[misc]
        for (thread, found), answer in zip(started, expected, strict=True):
            thread.join(60)
            assert found == [answer]


def test_a_pool_with_all_entry_points(model: Model, tmp_path: Path) -> None:
    ids = model.tokenize("the order and another one")
    messages = [{"role": "user", "content": "the"}]
    uses: list[Callable[[], Any]] = [
        lambda: text(model, PROMPTS[0]),
        lambda: "".join(model.chat(messages, max_tokens=8, **GREEDY)),
        lambda: model.logits(ids),
        lambda: [answer.text for answer in model.generate_batch(PROMPTS[:2], max_tokens=8, **GREEDY)],
        lambda: model.complete(PROMPTS[1], max_tokens=8, logprobs=1, **GREEDY).text,
        lambda: model.reset(),
        lambda: model.tokenize("the order and another one"),
        lambda: model.save_session(tmp_path / threading.current_thread().name),
    ]
    expected = [use() for use in uses]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: uses[i % len(uses)](), range(5 * len(uses))))
    for i, value in enumerate(found):
        right = expected[i % len(uses)]
        # A prompt that is known in part is computed in other parts: texts agree, logits from an empty context exactly.
        assert (value == right).all() if isinstance(right, np.ndarray) else value == right


def test_an_answer_is_read_by_several_threads(model: Model) -> None:
    """A web server's pool: each piece is asked for by another thread, and two answers come by turns."""
    expected = [text(model, prompt, max_tokens=6) for prompt in PROMPTS[:2]]
    with ThreadPoolExecutor(2) as pool, ThreadPoolExecutor(2) as other:

        def read(prompt: str) -> str:
            pieces, found = model.generate(prompt, max_tokens=6, **GREEDY), ""
            for reader in [pool, other] * 5:
                found += reader.submit(next, pieces, "").result(60)
            return found

        with ThreadPoolExecutor(2) as programs:
            assert list(programs.map(read, PROMPTS[:2])) == expected


def test_several_threads_read_one_answer(model: Model) -> None:
    """Each piece goes to one of them."""
    answer = model.complete(PROMPTS[0], max_tokens=30, **GREEDY)
    pieces = model.generate(PROMPTS[0], max_tokens=30, **GREEDY)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda _: list(pieces), range(4)))
    assert sorted(id for part in parts for piece in part for id in piece.ids) == sorted(answer.ids)
    assert pieces.answer().text == answer.text


def test_a_busy_thread_leaves_room_for_others(model: Model) -> None:
    """One asks again and again, and never waits; another one asks once."""
    stop = threading.Event()

    def ask_again() -> None:
        while not stop.is_set():
            model.complete("the", max_tokens=2, **GREEDY)

    thread, _ = in_thread(ask_again)
    try:
        for _ in range(5):
            assert result_of(lambda: text(model, PROMPTS[0], max_tokens=2))
    finally:
        stop.set()
        thread.join(60)


def test_a_wait_that_is_interrupted(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C: nobody waits for a thread that has gone."""

    def interrupted(_: float | None = None) -> None:
        raise KeyboardInterrupt

    def wait() -> str:
        try:
            model.reset()
            return "computed"
        except KeyboardInterrupt:
            return "interrupted"

    with model.engine.working(), monkeypatch.context() as patch:
        patch.setattr(model.engine.changed, "wait", interrupted)
        assert result_of(wait) == "interrupted"
    assert result_of(wait) == "computed"


@pytest.mark.parametrize("how", ["dropped", "closed", "at its end", "thread ended", "never begun"])
def test_answers_that_do_not_go_on(model: Model, how: str) -> None:
    """They hold up nobody."""
    expected = text(model, PROMPTS[0])
    pieces = model.generate(PROMPTS[1], max_tokens=3, **GREEDY)
    if how == "thread ended":
        pieces = result_of(lambda: begun(model))
    elif how != "never begun":
        next(pieces)
    if how == "dropped":
        del pieces
    elif how == "closed":
        pieces.close()
    elif how == "at its end":
        while not next(pieces).finish_reason:
            pass
    assert result_of(lambda: text(model, PROMPTS[0])) == expected


def begun(model: Model) -> Any:
    pieces = model.generate(PROMPTS[1], **GREEDY)
    next(pieces)
    return pieces


def test_answers_that_nobody_reads(model: Model) -> None:
    """More than the cache has sequences: they make room, and go on when they are read."""
    expected = text(model, PROMPTS[1])
    unread = [begun(model) for _ in range(3)]
    assert result_of(lambda: text(model, PROMPTS[0])) == text(model, PROMPTS[0])
    for pieces in unread:
        assert pieces.answer().text.startswith(expected)
        assert pieces.job.n_preempted == 0  # its reader was away: no page was lost


def test_saving_takes_nothing(model: Model, tmp_path: Path) -> None:
    pieces = begun(model)
    model.save_session(tmp_path / "s")
    assert next(pieces)
    thread, saved = in_thread(lambda: model.save_session(tmp_path / "t"))
    assert next(pieces)
    thread.join(60)
    assert saved == [None]


def test_a_model_is_closed_while_threads_use_it(path: Path) -> None:
    for _ in range(3):
        model = Model.load(path, n_threads=2)
        pieces = model.generate(PROMPTS[0], context_shift=True, **GREEDY)
        assert next(pieces)
        started = [in_thread(lambda pieces=pieces: "".join(pieces))]  # type: ignore[misc]
        endless = {"max_tokens": None, "context_shift": True}
        started += [in_thread(partial(text, model, PROMPTS[1], **endless)) for _ in range(2)]
        time.sleep(0.05)
        model.close()
        for thread, found in started:
            thread.join(60)
            assert isinstance(found[0], GgufRunError)
            assert "the model is closed" in str(found[0])


def test_an_answer_is_closed_by_another_thread(model: Model) -> None:
    """A button that stops."""
    pieces = model.generate(PROMPTS[0], context_shift=True, **GREEDY)
    thread, found = in_thread(lambda: "".join(pieces))
    time.sleep(0.05)
    pieces.close()
    thread.join(60)
    assert found == [pieces.answer().text]
    assert text(model, PROMPTS[0])


@pytest.mark.parametrize("use", ["generate", "logits", "close", "reset"])
def test_a_logits_processor_that_uses_its_model(model: Model, use: str) -> None:
    def processor(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        assert model.detokenize([*map(int, ids)])
        {
            "generate": lambda: list(model.generate("the")), "logits": lambda: model.logits([1]),
            "close": model.close, "reset": model.reset,
        }[use]()  # fmt: skip
        return logits

    with pytest.raises(GgufRunError, match="a logits processor, or what it calls, uses the model that waits for it"):
        list(model.generate("the", logits_processors=[processor]))
    assert text(model, "the")


def test_the_thread_of_the_engine(model: Model) -> None:
    """Others only read. It ends with the model, also while it runs."""
    expected = [text(model, prompt) for prompt in PROMPTS]
    model.engine.start()
    model.engine.start()
    answers = [model.generate(prompt, max_tokens=40, **GREEDY) for prompt in PROMPTS]
    assert ["".join(pieces) for pieces in answers] == expected
    assert [answer.text for answer in model.generate_batch(PROMPTS, max_tokens=40, **GREEDY)] == expected
    assert model.logits([1, 2]).shape[0] == 2
    endless = model.generate(PROMPTS[0], context_shift=True, **GREEDY)
    next(endless)
    model.close()
    with pytest.raises(GgufRunError, match="the model is closed"):
        "".join(endless)
    assert threading.active_count() < 50


def test_coroutines(model: Model) -> None:
    async def read(prompt: str) -> str:
        return "".join([piece async for piece in model.generate(prompt, max_tokens=40, **GREEDY)])

    async def stopped() -> str:
        found = ""
        async for piece in model.generate(PROMPTS[0], context_shift=True, **GREEDY):
            found += piece
            if len(found) > 20:
                break
        return found

    async def read_all() -> list[str]:
        return await asyncio.gather(*map(read, PROMPTS), stopped())

    expected = [text(model, prompt) for prompt in PROMPTS]
    with pytest.raises(GgufRunError, match=r"call Engine\.start first"):
        asyncio.run(read(PROMPTS[0]))
    model.engine.start()
    *found, start = asyncio.run(read_all())
    assert found == expected
    assert expected[0].startswith(start[:20])
    deadline = time.monotonic() + 60
    while model.engine.jobs and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not model.engine.jobs


def test_coroutines_hear_of_errors_and_of_the_end(path: Path) -> None:
    def broken(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        raise ValueError("a processor")

    async def read(model: Model, **options: Any) -> None:
        async for _ in model.generate(PROMPTS[0], **options):
            pass

    async def closed(model: Model) -> None:
        reader = asyncio.create_task(read(model, context_shift=True, **GREEDY))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(model.close)
        await reader

    with Model.load(path, n_threads=2) as model:
        model.engine.start()
        with pytest.raises(ValueError, match="a processor"):
            asyncio.run(read(model, logits_processors=[broken]))
        with pytest.raises(GgufRunError, match="the model is closed"):
            asyncio.run(closed(model))
