"""Sessions, generations and text pieces, with a decoder and a tokenizer of a few lines."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.models.backend import Results
from gguf_run.runtime.engine.generation import ContextError, Generation, Session, StopStrings, text_pieces
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


def next_id(ids: Sequence[int]) -> int:
    return sum((at + 3) * id for at, id in enumerate(ids)) % N_VOCAB


def expected(ids: Sequence[int], n: int) -> list[int]:
    out = list(ids)
    for _ in range(n):
        out.append(next_id(out))
    return out[len(ids) :]


def generate(session: Session, ids: Sequence[int], stop_ids: Sequence[int] = (), max_tokens: int | None = 5) -> Any:
    generation = Generation(session, ids, Sampler(GREEDY), stop_ids, max_tokens)
    return list(generation), generation


def test_prefill_then_one_token_at_a_time() -> None:
    decoder = FakeDecoder()
    out, generation = generate(Session(decoder), [7, 8, 9])
    assert out == expected([7, 8, 9], 5)
    assert decoder.runs == [(0, [7, 8, 9])] + [(3 + i, [id]) for i, id in enumerate(out[:-1])]
    assert (generation.finish, generation.n_prompt, generation.n_decoded, generation.n_reused) == ("length", 3, 4, 0)
    assert generation.prefill_s > 0
    assert generation.decode_s > 0


def test_common_start_is_not_computed_again() -> None:
    """A chat sends its whole history each time."""
    decoder = FakeDecoder()
    session = Session(decoder)
    first, _ = generate(session, [5, 6, 7])
    decoder.runs.clear()
    prompt = [5, 6, 7, *first, 50, 51]
    out, generation = generate(session, prompt)
    assert out == expected(prompt, 5)
    # The last answered token was never run: it is new too.
    assert decoder.runs[0] == (7, [first[-1], 50, 51])
    assert generation.n_reused == 7


@pytest.mark.parametrize(("prompt", "n_reused"), [([5, 6, 7], 3), ([5, 6], 1), ([5, 9, 7], 1), ([4], 0)])
def test_context_goes_back(prompt: list[int], n_reused: int) -> None:
    """To the same prompt, to a shorter one (its last token runs again, for its logits), to another one."""
    decoder = FakeDecoder()
    session = Session(decoder)
    generate(session, [5, 6, 7])
    out, generation = generate(session, prompt)
    assert out == expected(prompt, 5)
    assert generation.n_reused == n_reused
    again, _ = generate(session, [5, 6, 7, 8])
    assert again == expected([5, 6, 7, 8], 5)


def test_an_interrupted_run_leaves_a_session_that_works() -> None:
    decoder = FakeDecoder()
    session = Session(decoder)
    generate(session, [5, 6, 7], max_tokens=1)
    decoder.fails = True
    with pytest.raises(KeyboardInterrupt):
        generate(session, [5, 6, 7, 20, 21, 22])
    decoder.fails = False
    out, generation = generate(session, [5, 6, 7, 30, 31])
    assert out == expected([5, 6, 7, 30, 31], 5)
    assert generation.n_reused == 3


def test_abandoned_iterator() -> None:
    session = Session(FakeDecoder())
    generation = iter(Generation(session, [5, 6], Sampler(GREEDY), (), None))
    next(generation)
    next(generation)
    out, _ = generate(session, [9, 9])
    assert out == expected([9, 9], 5)


def test_stop_id_is_not_given_out() -> None:
    third = expected([1, 2], 3)[2]
    out, generation = generate(Session(FakeDecoder()), [1, 2], stop_ids=[third], max_tokens=None)
    assert out == expected([1, 2], 2)
    assert (generation.finish, generation.n_decoded) == ("stop", 2)


@pytest.mark.parametrize("n_prompt", [1, 9, 10])
def test_ends_when_the_context_is_full(n_prompt: int) -> None:
    """Each token that is run takes a position; the last one chosen is not run any more."""
    session = Session(FakeDecoder(n_ctx=10))
    out, generation = generate(session, range(n_prompt), max_tokens=None)
    assert len(out) == 10 - n_prompt + 1
    assert generation.finish == "context"
    assert session.n_free == 0


def test_prompt_longer_than_the_context() -> None:
    decoder = FakeDecoder(n_ctx=10)
    with pytest.raises(ContextError, match=r"11 tokens.* holds 10: .*--ctx-size"):
        Generation(Session(decoder), range(11), Sampler(GREEDY), (), None)
    assert decoder.runs == []


def test_empty_prompt() -> None:
    with pytest.raises(GgufRunError, match="empty"):
        Generation(Session(FakeDecoder()), [], Sampler(GREEDY), (), None)


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_max_tokens_not_allowed(max_tokens: int) -> None:
    with pytest.raises(OptionError, match="max_tokens"):
        Generation(Session(FakeDecoder()), [1], Sampler(GREEDY), (), max_tokens)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=5, temperature=3.0), SamplingParams(seed=5, top_k=65)])
def test_the_greatest_logits_are_enough(params: SamplingParams) -> None:
    """The same ids, whether the decoder gives all logits or finds the greatest itself; when the context shifts, too."""
    answers = []
    for n_top in (0, 64):
        session = Session(FakeDecoder(128, n_top))
        answers.append([*Generation(session, [1, 2, 3], Sampler(params), (), 200, 0)])
        assert session.ids[-1] == answers[-1][-2]
    assert answers[0] == answers[1]


def test_repeat_penalty_sees_prompt_and_answer() -> None:
    session = Session(FakeDecoder())
    sampler = Sampler(SamplingParams(temperature=0, repeat_penalty=2))
    out = list(Generation(session, [4, 5], sampler, (), 2))
    assert list(sampler._recent) == [4, 5, out[0]]


def test_logits_of_all_tokens() -> None:
    decoder = FakeDecoder()
    session = Session(decoder)
    generate(session, [5, 6, 7])
    logits = np.concatenate([block.copy() for block in session.logits([5, 6, 40])])
    assert logits.argmax(axis=1).tolist() == [next_id([5]), next_id([5, 6]), next_id([5, 6, 40])]
    assert decoder.runs[-1] == (0, [5, 6, 40])
    _, generation = generate(session, [5, 6, 40, 41])
    assert generation.n_reused == 3


class ByteStream:
    """Ids are bytes; gives out whole characters only, as the real stream does."""

    def __init__(self) -> None:
        self._bytes = b""

    def push(self, id: int) -> str:
        self._bytes += bytes([id % 256])
        try:
            text = self._bytes.decode()
        except UnicodeDecodeError:
            return ""
        self._bytes = b""
        return text

    def flush(self) -> str:
        return self._bytes.decode(errors="replace")


class Replay(Generation):
    """Gives out known ids."""

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(Session(FakeDecoder()), [1], Sampler(GREEDY), (), None)
        self._replayed = ids

    def __iter__(self) -> Iterator[int]:
        yield from self._replayed
        self.finish = "length"


def pieces(data: bytes, stop: Sequence[str] = ()) -> tuple[list[str], str]:
    generation = Replay(list(data))
    return list(text_pieces(generation, ByteStream(), StopStrings(stop))), generation.finish


def test_characters_are_whole() -> None:
    assert pieces("aé€😀".encode()) == (["a", "é", "€", "😀"], "length")


def test_unfinished_character_at_the_end() -> None:
    assert pieces("a€".encode()[:-1]) == (["a", "�"], "length")


@pytest.mark.parametrize(
    ("text", "stop", "shown", "finish"),
    [
        ("one two", ["tw"], "one ", "stop"),
        ("one two", ["two", "one"], "", "stop"),
        ("ababac", ["abac"], "ab", "stop"),
        ("one tw", ["two"], "one tw", "length"),
        ("one", ["x"], "one", "length"),
    ],
)
def test_stop_strings(text: str, stop: list[str], shown: str, finish: str) -> None:
    found, reason = pieces(text.encode(), stop)
    assert ("".join(found), reason) == (shown, finish)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_in_any_pieces(text: str, stop: list[str], data: st.DataObject) -> None:
    """However the text is cut: all before the first stop string comes out, and nothing is held back without need."""
    matcher = StopStrings(stop)
    shown, rest = "", text
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        shown += matcher.push(rest[:n])
        rest = rest[n:]
        pushed = text[: len(text) - len(rest)]
        if not matcher.found:
            held = pushed.removeprefix(shown)
            assert shown + held == pushed
            assert held == "" or any(string.startswith(held) for string in stop)
    ends = [text.find(string) for string in stop if string in text]
    # A string found earlier in time may begin later than one found in the same push: never more is shown than before
    # the first that was complete.
    assert matcher.found == bool(ends)
    if not matcher.found:
        assert shown + matcher.flush() == text
    else:
        assert text.startswith(shown)
        assert not any(string in shown for string in stop)


@pytest.mark.parametrize("stop", [[""], ["a", ""], "text"])
def test_stop_not_allowed(stop: Any) -> None:
    with pytest.raises(OptionError, match="stop is"):
        StopStrings(stop)


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
    session, prompt = Session(decoder), [7 * i % 256 for i in range(n_prompt)]
    generation = Generation(session, prompt, Sampler(GREEDY), (), 500, n_keep)
    n_kept = max(32, -(-n_keep // 32) * 32)
    out, held = with_shifts(prompt, 500, 192, n_kept)
    assert list(generation) == out
    assert session.ids == held == decoder.held[: len(held)]
    assert generation.finish == "length"
    # A conversation is given anew from its beginning each time: what is gone is known too.
    prompt += [*out, 3, 4]
    again = Generation(session, prompt, Sampler(GREEDY), (), 1, n_keep)
    assert list(again) == with_shifts(prompt, 1, 192, n_kept)[0]
    assert again.n_reused == len(prompt) - 3
    # Another one shares what was kept.
    other = Generation(session, [*prompt[:40], 9, 9], Sampler(GREEDY), (), 1)
    assert list(other) == expected([*prompt[:40], 9, 9], 1)
    assert other.n_reused == min(40, n_kept)


@pytest.mark.parametrize(("n_ctx", "n_keep"), [(64, 0), (95, 0), (128, 65), (128, -1)])
def test_contexts_that_cannot_be_shifted(n_ctx: int, n_keep: int) -> None:
    with pytest.raises(OptionError, match=r"n_keep \(--keep\) is .* in a context of"):
        Generation(Session(FakeDecoder(n_ctx)), [1], Sampler(GREEDY), (), 5, n_keep)
