"""One answer at a time, and what goes wrong, over a decoder of a few lines."""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from fake_decoder import (
    GREEDY,
    N_VOCAB,
    FakeDecoder,
    check,
    engine_of,
    expected,
    ids_of,
    next_id,
    reply_of,
    request,
    sums,
)

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.kernels_cpu.replay.team import Team
from gguf_run.models.pages import CacheFullError
from gguf_run.runtime.engine import shift
from gguf_run.runtime.engine.check import ContextError, QueueFullError
from gguf_run.runtime.engine.engine import Engine
from gguf_run.runtime.sampling.many import ManySampler
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.sampling.sampler import Sampler

LONG = [7 * i % N_VOCAB for i in range(1000)]


def generate(engine: Engine, ids: Sequence[int], max_tokens: int | None = 5, **options: Any) -> tuple[list[int], Any]:
    sequence = engine.add(request(ids, max_tokens, **options))
    return ids_of(sequence), sequence.job


def test_prefill_then_one_token_at_a_time() -> None:
    decoder = FakeDecoder()
    out, job = generate(engine_of(decoder), [7, 8, 9])
    assert out == expected([7, 8, 9], 5)
    assert decoder.runs == [{0: 3}] + [{0: 1}] * 4
    assert (job.finish, job.n_prompt, job.n_decoded, job.n_reused) == ("length", 3, 4, 0)
    assert job.prefill_s == pytest.approx(0.0095, abs=1e-4)
    assert job.decode_s == pytest.approx(4 * 0.006, abs=1e-4)


def test_a_long_prompt_runs_in_parts() -> None:
    decoder = FakeDecoder(n_batch=256)
    assert generate(engine_of(decoder), LONG[:600], 1)[0] == expected(LONG[:600], 1)
    assert decoder.runs == [{0: 256}, {0: 256}, {0: 88}]


def test_common_start_is_not_computed_again() -> None:
    """A chat sends its whole history each time."""
    decoder = FakeDecoder(n_seq=1)
    engine = engine_of(decoder)
    first, _ = generate(engine, [5, 6, 7])
    decoder.runs.clear()
    prompt = [5, 6, 7, *first, 50, 51]
    out, job = generate(engine, prompt)
    assert out == expected(prompt, 5)
    assert decoder.runs[0] == {0: 3}  # the last answered token was never run: it is new too
    assert job.n_reused == 7


@pytest.mark.parametrize(("prompt", "n_reused"), [([5, 6, 7], 3), ([5, 6], 1), ([5, 9, 7], 1), ([4], 0)])
@pytest.mark.parametrize("n_seq", [1, 3])
def test_context_goes_back(prompt: list[int], n_reused: int, n_seq: int) -> None:
    """To the same prompt, to a shorter one (its last token runs again, for its logits), to another one."""
    engine = engine_of(FakeDecoder(n_seq=n_seq))
    generate(engine, [5, 6, 7])
    out, job = generate(engine, prompt)
    assert out == expected(prompt, 5)
    assert job.n_reused == n_reused or (n_seq > 1 and prompt == [5, 9, 7])
    assert generate(engine, [5, 6, 7, 8])[0] == expected([5, 6, 7, 8], 5)


@pytest.mark.parametrize("fails_after", [1, 2, 3])
def test_an_interrupted_answer_goes_on(fails_after: int) -> None:
    """Ctrl-C in the prompt or in the answer: the pieces that follow are those that would have come."""
    decoder = FakeDecoder(n_batch=128)
    engine = engine_of(decoder)
    sequence, found = engine.add(request(LONG[:200])), list[str]()
    while not sequence.job.is_over:
        decoder.fails = [KeyboardInterrupt()] if len(decoder.runs) == fails_after else []
        try:
            found += [next(sequence)]
        except KeyboardInterrupt:
            check(engine)
    assert ids_of(found) == expected(LONG[:200], 5)


def test_logits_that_an_interrupt_has_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token runs again."""
    decoder = FakeDecoder()
    engine = engine_of(decoder)
    sequence = engine.add(request([1, 2, 3]))
    found = [next(sequence)]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sequence.job.reply.sampler, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(sequence)
    assert ids_of([*found, *sequence]) == expected([1, 2, 3], 5)
    assert len(decoder.runs) == 6


def test_stop_id_is_not_given_out() -> None:
    third = expected([1, 2], 3)[2]
    out, job = generate(engine_of(FakeDecoder(), [third]), [1, 2], None)
    assert out == expected([1, 2], 2)
    assert (job.finish, job.n_decoded) == ("stop", 2)


@pytest.mark.parametrize("n_prompt", [1, 9, 10])
def test_ends_when_the_context_is_full(n_prompt: int) -> None:
    """Each token that is run takes a position; the last one chosen is not run any more."""
    engine = engine_of(FakeDecoder(n_ctx=10))
    out, job = generate(engine, range(n_prompt), None)
    assert len(out) == 10 - n_prompt + 1
    assert job.finish == "context"


def test_what_is_refused_at_once() -> None:
    decoder = FakeDecoder(n_ctx=10)
    engine = engine_of(decoder)
    with pytest.raises(ContextError, match=r"11 tokens.* holds 10: .*--ctx-size"):
        engine.add(request(range(11)))
    with pytest.raises(GgufRunError, match="empty"):
        engine.add(request([]))
    for max_tokens in (0, -1):
        with pytest.raises(OptionError, match="max_tokens"):
            engine.add(request([1], max_tokens))
    with pytest.raises(ContextError, match=r"65 tokens, the context holds 64"):
        engine_of(FakeDecoder(n_ctx=128, n_cells=64)).add(request(range(65)))
    assert not decoder.runs
    assert not engine.step()


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=5, temperature=3.0), SamplingParams(seed=5, top_k=65)])
def test_the_greatest_logits_are_enough(params: SamplingParams) -> None:
    """The same ids, whether the decoder gives all logits or finds the greatest itself."""
    answers = []
    for deterministic in (False, True):
        engine = engine_of(FakeDecoder(), deterministic=deterministic)
        answers.append(ids_of(engine.add(request([1, 2, 3], 100, sampling=params))))
    assert answers[0] == answers[1]


def test_repeat_penalty_sees_prompt_and_answer() -> None:
    engine = engine_of(FakeDecoder())
    sequence = engine.add(request([4, 5], 2, sampling=SamplingParams(temperature=0, repeat_penalty=2)))
    out = ids_of(sequence)
    assert list(sequence.job.reply.sampler.state.recent) == [4, 5, *out]


def with_shifts(ids: Sequence[int], n: int, n_ctx: int, n_keep: int, can_shift: bool) -> tuple[list[int], list[int]]:
    """The next n tokens, and what stands in a context of n_ctx at the end: half behind n_keep goes when it is full."""
    held, out, todo = list[int](), list[int](), list(ids)
    total = np.uint64(0)
    with np.errstate(over="ignore"):
        while True:
            for id in todo:
                if len(held) == n_ctx:
                    del held[n_keep : n_keep + (n_ctx - n_keep) // 2 // 32 * 32]
                    total = total if can_shift else sums(held)[-1]
                held.append(id)
                total += weight(held)
            if len(out) == n:
                return out[:n], held
            out.append(next_id(total))
            todo = [out[-1]] if len(out) < n else []


def weight(held: Sequence[int]) -> np.uint64:
    """What the last token adds to the sum."""
    both = sums([0] * (len(held) - 1) + [held[-1]])
    return both[-1] - (both[-2] if len(held) > 1 else np.uint64(0))


def no_pages(*_: Any) -> None:
    raise CacheFullError("full")


@pytest.mark.parametrize("can_shift", [True, False])
@pytest.mark.parametrize(("n_prompt", "n_keep"), [(100, 0), (200, 1), (900, 33), (192, 64), (191, 96)])
def test_a_full_context_goes_on(n_prompt: int, n_keep: int, can_shift: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """can_shift: there may be no pages for the tokens that move: then what stays runs again."""
    if not can_shift:
        monkeypatch.setattr(shift, "shift", no_pages)
    decoder = FakeDecoder(n_ctx=192, n_seq=1)
    decoder.is_shifted = True
    engine, prompt = engine_of(decoder), LONG[:n_prompt]
    n_kept = max(32, -(-n_keep // 32) * 32)
    out, held = with_shifts(prompt, 300, 192, n_kept, can_shift)
    found, job = generate(engine, prompt, 300, context_shift=True, n_keep=n_keep)
    assert found == out
    assert decoder.cache.slots[0].ids == held
    assert job.finish == "length"
    # A conversation is given anew from its beginning each time: what is gone is known too.
    prompt = [*prompt, *out, 3, 4]
    again, job = generate(engine, prompt, 1, context_shift=True, n_keep=n_keep)
    if can_shift:
        assert again == with_shifts(prompt, 1, 192, n_kept, can_shift)[0]
    assert job.n_reused == len(prompt) - 3
    # Another one shares what was kept.
    other, job = generate(engine, [*prompt[:40], 9, 9], 1)
    assert other == expected([*prompt[:40], 9, 9], 1)
    assert job.n_reused in (min(40, n_kept), 40)


@pytest.mark.parametrize(("n_ctx", "n_keep"), [(64, 0), (95, 0), (128, 65), (128, -1)])
def test_contexts_that_cannot_be_shifted(n_ctx: int, n_keep: int) -> None:
    with pytest.raises(OptionError, match=r"n_keep \(--keep\) is .* in a context of"):
        engine_of(FakeDecoder(n_ctx=n_ctx)).add(request([1], context_shift=True, n_keep=n_keep))


def test_an_error_of_a_step_ends_its_answers_only() -> None:
    decoder = FakeDecoder()
    engine = engine_of(decoder)
    first, second, late = (engine.add(request([i, 2, 3])) for i in range(3))
    engine.step()
    late.close()
    decoder.fails = [ValueError("broken")]
    engine.step()
    for sequence in (first, second):
        assert len(sequence.job.pieces) == 1
        next(sequence)
        with pytest.raises(ValueError, match="broken"):
            next(sequence)
        assert list(sequence) == []
    assert list(late) == [late.answer().text]
    check(engine)
    assert engine.healthy
    assert generate(engine, [1, 2, 3])[0] == expected([1, 2, 3], 5)


def test_a_second_error_in_a_row_is_unhealthy() -> None:
    decoder = FakeDecoder()
    engine = engine_of(decoder)
    for n, healthy in ((1, True), (2, False)):
        decoder.fails = [ValueError(f"broken {n}")]
        with pytest.raises(ValueError, match=f"broken {n}"):
            generate(engine, [1])
        assert engine.healthy == healthy
    assert generate(engine, [1])[0] == expected([1], 5)
    assert engine.healthy


def test_an_error_of_sampling_ends_one_answer() -> None:
    def broken(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        if len(ids) == 5:
            raise ValueError("a processor")
        return logits

    engine = engine_of(FakeDecoder())
    sampling = SamplingParams(temperature=0, logits_processors=[broken])
    bad, good = engine.add(request([1, 2, 3], sampling=sampling)), engine.add(request([4, 5, 6]))
    while engine.step():
        pass
    assert ids_of(good) == expected([4, 5, 6], 5)
    assert ids_of([next(bad), next(bad)]) == expected([1, 2, 3], 2)
    with pytest.raises(ValueError, match="a processor"):
        next(bad)
    assert engine.healthy


def test_cancel_and_close() -> None:
    engine = engine_of(FakeDecoder())
    first, second, waiting = (engine.add(request([i, 2, 3])) for i in range(3))
    next(first)
    engine.cancel(first)
    engine.cancel(first)
    assert list(first) == []
    second.answer()
    engine.cancel(second)
    assert second.answer().finish == "length"
    dropped = engine.add(request([1]))
    del dropped
    assert engine.step()
    assert [job.number for job in engine.jobs] == [waiting.job.number]
    check(engine)
    engine.close()
    assert next(waiting)
    with pytest.raises(GgufRunError, match="the model is closed"):
        next(waiting)
    assert list(waiting) == []
    with pytest.raises(GgufRunError, match="the model is closed"):
        engine.add(request([1]))
    engine.cancel(waiting)
    engine.close()


def test_the_queue_has_a_limit() -> None:
    engine = engine_of(FakeDecoder(n_seq=1), max_queue=2)
    held = [engine.add(request([i, 1])) for i in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait, max_queue is 2"):
        engine.add(request([5]))
    engine.step()
    held.append(engine.add(request([5])))
    assert [ids_of(sequence) for sequence in held] == [expected(ids, 5) for ids in ([0, 1], [1, 1], [5])]


class Grammar:
    """Even tokens only; after a token that 4 divides, twice 7 and 3 come by force."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allowed(self) -> np.ndarray:
        return np.full(-(-N_VOCAB // 32), 0x55555555, np.uint32)

    def accept(self, id: int) -> None:
        self.accepted.append(id)

    def forced(self) -> Sequence[int]:
        return [7, 7, 3] if self.accepted[-1] % 4 == 0 else []


def test_a_constraint() -> None:
    sampling = SamplingParams(temperature=0)
    decoder = FakeDecoder()
    engine = engine_of(decoder)
    free = engine.add(request([1, 2], 12, sampling=sampling))
    bound = engine.add(request([1, 2], 30, sampling=sampling, constraint=Grammar()))
    out, other = ids_of(bound), ids_of(free)
    assert other == expected([1, 2], 12)
    text, found = [1, 2], list[int]()
    while len(found) < 30:
        best = expected(text, 1)[0]
        id = best if best % 2 == 0 else 0
        found += [id, 7, 7, 3] if id % 4 == 0 else [id]
        text = [1, 2, *found]
    assert out == found[:30]
    assert {4} & {n for run in decoder.runs for n in run.values()}  # forced tokens run with the next one


class Noisy(FakeDecoder):
    """Many logits are equal."""

    def step(self, batch: Any, rows: Any) -> np.ndarray:
        logits = super().step(batch, rows)
        for row in logits:
            row += np.random.default_rng(int(row.argmax())).integers(0, 5, N_VOCAB).astype(np.float32) / 2
        return logits


@pytest.mark.parametrize("together", [False, True])
def test_some_answers_need_all_logits(together: bool) -> None:
    """Answers that need only these, answers that need all logits, and answers with a constraint, in the same steps."""
    kinds = [{"temperature": 0}, {}, {"top_k": 5, "temperature": 3.0}, {"repeat_penalty": 1.2}, {"logprobs": 2}]
    kinds += [{"top_k": 3, "temperature": 2.0, "typical_p": 0.8}, {"top_k": 41}]
    found = []
    with closing(Team(2)) as team:
        many = ManySampler(team, N_VOCAB)
        for n_top in (0, 40):
            decoder = Noisy(n_seq=6)
            decoder.n_top, asked = n_top, decoder.asked
            engine = engine_of(decoder, many=(lambda: many) if together else None)
            held = []
            for i, kind in enumerate(kinds * 3):
                sampling = SamplingParams(seed=i, **kind)  # type: ignore[arg-type]
                held.append(engine.add(request([i, 1], 12, sampling, constraint=Grammar() if i % 3 == 1 else None)))
            found.append([ids_of(sequence) for sequence in held])
            assert len({*asked}) == (8 if n_top else 0)
    assert found[0] == found[1]


def test_a_reply_is_made_for_each_request() -> None:
    made: list[Any] = []

    def make(request: Any) -> Any:
        made.append(request)
        return reply_of(request)

    engine = Engine(FakeDecoder(), make)  # type: ignore[arg-type]
    asked = request([1])
    assert isinstance(engine.add(asked).job.reply.sampler, Sampler)
    assert made == [asked]
