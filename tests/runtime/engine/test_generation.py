"""Contexts and generations, with a decoder and a tokenizer of a few lines."""

from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.models import kv_moves
from gguf_run.models.backend import Results
from gguf_run.runtime.engine.context import Context, ContextError
from gguf_run.runtime.engine.generation import Generation
from gguf_run.runtime.engine.reply import Reply, StopStrings
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.sampling.sampler import Sampler

N_VOCAB = 300
GREEDY = SamplingParams(temperature=0)


class FakeDecoder:
    """The next token is a number made of all tokens in the cache, so that a wrong one shows. Remembers what it ran."""

    def __init__(self, n_ctx: int = 32, n_top: int = 0) -> None:
        self.n_ctx, self.n_past, self.n_top = n_ctx, 0, n_top
        self.held = [0] * n_ctx
        self.cache = SimpleNamespace(shift=self.shift)
        self.can_shift = True
        self.config = SimpleNamespace(n_vocab=N_VOCAB)
        self.runs: list[tuple[int, list[int]]] = []
        self.fails = False

    def forward(self, ids: Sequence[int], n_outputs: int = 1) -> Iterator[np.ndarray]:
        self.runs.append((self.n_past, list(ids)))
        assert self.n_past + len(ids) <= self.n_ctx
        block = np.zeros((1, N_VOCAB), np.float32)  # overwritten, as the program's memory is
        for i, id in enumerate(ids):
            self.held[self.n_past] = id
            self.n_past += 1
            if self.fails and i:
                raise KeyboardInterrupt
            if i >= len(ids) - n_outputs:
                block[:] = 0
                block[0, next_id(self.held[: self.n_past])] = 1
                yield block

    def top(self, ids: Sequence[int], n_top: int) -> Results:
        """The greatest logits, as of a device that finds them itself, if it finds so many."""
        (logits,) = (block.copy() for block in self.forward(ids))
        if n_top > self.n_top:
            return Results(logits)
        found = np.argsort(-logits[0], kind="stable")[:n_top]
        return Results(logits[:, found], found)

    def rewind(self, n_past: int) -> int:
        assert 0 <= n_past <= self.n_past
        self.n_past = n_past
        return n_past

    def shift(self, n_keep: int, n_discard: int) -> int:
        assert 0 < n_discard <= self.n_past - n_keep
        self.held[n_keep : n_keep + n_discard] = []
        self.held += [0] * n_discard
        self.n_past = self.n_past - n_discard if self.can_shift else 0
        return self.n_past


@pytest.fixture(autouse=True)
def shifts_of_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_moves, "shift", lambda cache, *numbers: cache.shift(*numbers))


def next_id(ids: Sequence[int]) -> int:
    return sum((at + 3) * id for at, id in enumerate(ids)) % N_VOCAB


def expected(ids: Sequence[int], n: int) -> list[int]:
    out = list(ids)
    for _ in range(n):
        out.append(next_id(out))
    return out[len(ids) :]


class IdStream:
    """Each token is one character, of which `ids` makes the token again."""

    def push(self, id: int) -> str:
        return chr(0x4E00 + id)

    def flush(self) -> str:
        return ""


def ids_of(pieces: Iterable[str]) -> list[int]:
    return [ord(character) - 0x4E00 for piece in pieces for character in piece]


def start(
    context: Context,
    ids: Sequence[int],
    sampler: Sampler | None = None,
    stop_ids: Sequence[int] = (),
    max_tokens: int | None = None,
    n_keep: int | None = None,
) -> Generation:
    sampler = sampler or Sampler(GREEDY)
    reply = Reply(ids, sampler, IdStream(), StopStrings(()), frozenset(stop_ids), max_tokens)  # type: ignore[arg-type]
    return Generation(context, reply, n_keep)


def generate(context: Context, ids: Sequence[int], stop_ids: Sequence[int] = (), max_tokens: int | None = 5) -> Any:
    generation = start(context, ids, None, stop_ids, max_tokens)
    return ids_of(generation), generation


def test_prefill_then_one_token_at_a_time() -> None:
    decoder = FakeDecoder()
    out, generation = generate(Context(decoder), [7, 8, 9])
    assert out == expected([7, 8, 9], 5)
    assert decoder.runs == [(0, [7, 8, 9])] + [(3 + i, [id]) for i, id in enumerate(out[:-1])]
    assert (generation.finish, generation.n_prompt, generation.n_decoded, generation.n_reused) == ("length", 3, 4, 0)
    assert generation.prefill_s > 0
    assert generation.decode_s > 0


def test_common_start_is_not_computed_again() -> None:
    """A chat sends its whole history each time."""
    decoder = FakeDecoder()
    context = Context(decoder)
    first, _ = generate(context, [5, 6, 7])
    decoder.runs.clear()
    prompt = [5, 6, 7, *first, 50, 51]
    out, generation = generate(context, prompt)
    assert out == expected(prompt, 5)
    # The last answered token was never run: it is new too.
    assert decoder.runs[0] == (7, [first[-1], 50, 51])
    assert generation.n_reused == 7


@pytest.mark.parametrize(("prompt", "n_reused"), [([5, 6, 7], 3), ([5, 6], 1), ([5, 9, 7], 1), ([4], 0)])
def test_context_goes_back(prompt: list[int], n_reused: int) -> None:
    """To the same prompt, to a shorter one (its last token runs again, for its logits), to another one."""
    decoder = FakeDecoder()
    context = Context(decoder)
    generate(context, [5, 6, 7])
    out, generation = generate(context, prompt)
    assert out == expected(prompt, 5)
    assert generation.n_reused == n_reused
    again, _ = generate(context, [5, 6, 7, 8])
    assert again == expected([5, 6, 7, 8], 5)


def test_an_interrupted_run_leaves_a_context_that_works() -> None:
    decoder = FakeDecoder()
    context = Context(decoder)
    generate(context, [5, 6, 7], max_tokens=1)
    decoder.fails = True
    with pytest.raises(KeyboardInterrupt):
        generate(context, [5, 6, 7, 20, 21, 22])
    decoder.fails = False
    out, generation = generate(context, [5, 6, 7, 30, 31])
    assert out == expected([5, 6, 7, 30, 31], 5)
    assert generation.n_reused == 3


def test_abandoned_iterator() -> None:
    context = Context(FakeDecoder())
    generation = iter(start(context, [5, 6]))
    next(generation)
    next(generation)
    out, _ = generate(context, [9, 9])
    assert out == expected([9, 9], 5)


def test_stop_id_is_not_given_out() -> None:
    third = expected([1, 2], 3)[2]
    out, generation = generate(Context(FakeDecoder()), [1, 2], stop_ids=[third], max_tokens=None)
    assert out == expected([1, 2], 2)
    assert (generation.finish, generation.n_decoded) == ("stop", 2)


@pytest.mark.parametrize("n_prompt", [1, 9, 10])
def test_ends_when_the_context_is_full(n_prompt: int) -> None:
    """Each token that is run takes a position; the last one chosen is not run any more."""
    context = Context(FakeDecoder(n_ctx=10))
    out, generation = generate(context, range(n_prompt), max_tokens=None)
    assert len(out) == 10 - n_prompt + 1
    assert generation.finish == "context"
    assert context.n_free == 0


def test_prompt_longer_than_the_context() -> None:
    decoder = FakeDecoder(n_ctx=10)
    with pytest.raises(ContextError, match=r"11 tokens.* holds 10: .*--ctx-size"):
        start(Context(decoder), range(11))
    assert decoder.runs == []


def test_empty_prompt() -> None:
    with pytest.raises(GgufRunError, match="empty"):
        start(Context(FakeDecoder()), [])


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_max_tokens_not_allowed(max_tokens: int) -> None:
    with pytest.raises(OptionError, match="max_tokens"):
        start(Context(FakeDecoder()), [1], max_tokens=max_tokens)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=5, temperature=3.0), SamplingParams(seed=5, top_k=65)])
def test_the_greatest_logits_are_enough(params: SamplingParams) -> None:
    """The same ids, whether the decoder gives all logits or finds the greatest itself; when the context shifts, too."""
    answers = []
    for n_top in (0, 64):
        context = Context(FakeDecoder(128, n_top))
        answers.append(ids_of(start(context, [1, 2, 3], Sampler(params), (), 200, 0)))
        assert context.ids[-1] == answers[-1][-2]
    assert answers[0] == answers[1]


def test_repeat_penalty_sees_prompt_and_answer() -> None:
    context = Context(FakeDecoder())
    sampler = Sampler(SamplingParams(temperature=0, repeat_penalty=2))
    out = ids_of(start(context, [4, 5], sampler, (), 2))
    assert list(sampler.state.recent) == [4, 5, *out]


def test_logits_of_all_tokens() -> None:
    decoder = FakeDecoder()
    context = Context(decoder)
    generate(context, [5, 6, 7])
    logits = np.concatenate([block.copy() for block in context.logits([5, 6, 40])])
    assert logits.argmax(axis=1).tolist() == [next_id([5]), next_id([5, 6]), next_id([5, 6, 40])]
    assert decoder.runs[-1] == (0, [5, 6, 40])
    _, generation = generate(context, [5, 6, 40, 41])
    assert generation.n_reused == 3


def with_shifts(ids: Sequence[int], n: int, n_ctx: int, n_keep: int) -> tuple[list[int], list[int]]:
    """The next n tokens, and what stands in a context of n_ctx at the end: half behind n_keep goes when it is full."""
    held: list[int] = []
    out: list[int] = []
    for id in ids:
        if len(held) == n_ctx:
            del held[n_keep : n_keep + (n_ctx - n_keep) // 2 // 32 * 32]
        held.append(id)
    while len(out) < n:
        out.append(next_id(held))
        if len(out) < n:
            if len(held) == n_ctx:
                del held[n_keep : n_keep + (n_ctx - n_keep) // 2 // 32 * 32]
            held.append(out[-1])
    return out, held


@pytest.mark.parametrize("can_shift", [True, False])
@pytest.mark.parametrize(("n_prompt", "n_keep"), [(100, 0), (200, 1), (900, 33), (192, 64), (191, 96)])
def test_a_full_context_goes_on(n_prompt: int, n_keep: int, can_shift: bool) -> None:
    """can_shift: layers with a window may not hold what is needed: then what stays runs again."""
    decoder = FakeDecoder(n_ctx=192)
    decoder.can_shift = can_shift
    context, prompt = Context(decoder), [7 * i % 256 for i in range(n_prompt)]
    generation = start(context, prompt, None, (), 500, n_keep)
    n_kept = max(32, -(-n_keep // 32) * 32)
    out, held = with_shifts(prompt, 500, 192, n_kept)
    assert ids_of(generation) == out
    assert context.ids == held == decoder.held[: len(held)]
    assert generation.finish == "length"
    # A conversation is given anew from its beginning each time: what is gone is known too.
    prompt += [*out, 3, 4]
    again = start(context, prompt, None, (), 1, n_keep)
    assert ids_of(again) == with_shifts(prompt, 1, 192, n_kept)[0]
    assert again.n_reused == len(prompt) - 3
    # Another one shares what was kept.
    other = start(context, [*prompt[:40], 9, 9], None, (), 1)
    assert ids_of(other) == expected([*prompt[:40], 9, 9], 1)
    assert other.n_reused == min(40, n_kept)


@pytest.mark.parametrize(("n_ctx", "n_keep"), [(64, 0), (95, 0), (128, 65), (128, -1)])
def test_contexts_that_cannot_be_shifted(n_ctx: int, n_keep: int) -> None:
    with pytest.raises(OptionError, match=r"n_keep \(--keep\) is .* in a context of"):
        start(Context(FakeDecoder(n_ctx)), [1], None, (), 5, n_keep)
