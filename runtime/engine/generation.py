"""From prompt ids to text: prefill, then one token after the other, then whole characters and stop strings.

Session      ids that stand in the KV cache; a prompt that starts alike is not computed again
Generation   ids: prefill, sample, decode, until a reason to stop
text_pieces  text: no half characters, nothing of a stop string
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.models.kv_cache import GROUP
from gguf_run.runtime.sampling.filters import Candidates
from gguf_run.runtime.sampling.sampler import Sampler

if TYPE_CHECKING:
    from gguf_run.models.decoder import Decoder
    from gguf_run.runtime.engine.session_file import Part
    from gguf_run.runtime.tokenizers.tokenizer import TokenStream


class ContextError(GgufRunError):
    """A prompt does not fit into the context."""


class Closed:
    """Stands where a decoder was that has been freed: whoever still holds a model or an iterator is told."""

    def __getattr__(self, name: str) -> NoReturn:
        raise GgufRunError("the model is closed: load it again, or stay within its `with`")


_NOTHING: tuple[list[int], NDArray[np.float32]] = ([], np.empty(0, np.float32))


class Session:
    """A decoder and the ids whose keys and values its first sequence holds.

    When the context is full and is to go on (n_keep is not None), the half of what stands behind the first n_keep
    tokens is taken out, as llama.cpp does. The session remembers those tokens: a conversation that is given anew from
    its beginning is still known.
    """

    def __init__(self, decoder: "Decoder") -> None:
        self.decoder = decoder
        self._history: list[int] = []  # the tokens that came, of which those of `_cut` are no longer there
        self._cut = range(0)
        self.turn = 0  # how often the context has been given to somebody else
        self._asked = _NOTHING  # the last prompt, and the logits after it

    def close(self) -> None:
        """Let go of the decoder."""
        self.decoder = cast("Decoder", Closed())

    @property
    def n_free(self) -> int:
        """Positions left in the context."""
        return self.decoder.n_ctx - self.decoder.n_past

    @property
    def ids(self) -> list[int]:
        """What stands in the cache."""
        return self._history[: self._cut.start] + self._history[self._cut.stop :]

    def prefill(self, ids: Sequence[int], n_keep: int | None = None) -> tuple[NDArray[np.float32], int]:
        """Make `ids` the whole context; return the logits f32[n_vocab] after the last one and how many were reused.

        Only what differs from the ids already there is computed. n_keep: how many tokens stay when there is no room
        (None: GgufRunError).
        """
        self.turn += 1
        # The same again gets the very same logits: alone, the last token would run through other kernels.
        asked, logits = self._asked
        is_same = bool(ids) and asked == list(ids) and not self._cut
        if is_same and self._rewind(n_common(self._history, ids)) == len(ids):
            return logits, len(ids)
        # Else the last token runs in any case: its logits are wanted.
        n_reused = self._rewind(min(n_common(self._history, ids), len(ids) - 1))
        logits = self._run(ids[n_reused:], n_keep)
        self._asked = list(ids), logits.copy()
        return logits, n_reused

    def append(self, id: int, n_keep: int | None = None) -> NDArray[np.float32]:
        """Add one token; return the logits f32[n_vocab] after it."""
        return self._run([id], n_keep)

    def append_top(self, id: int, n_keep: int | None, n_top: int) -> NDArray[np.float32] | Candidates:
        """Add one token; return the n_top greatest logits after it: all if n_top is 0, or if the decoder has all."""
        if not n_top:
            return self._run([id], n_keep)
        if n_keep is not None and not self.n_free:
            self._make_room(n_keep)
        found = self.decoder.top([id], n_top)
        self._history.append(id)
        return found.values[0] if found.columns is None else Candidates(found.values[0], found.columns, True)

    def hold(self, ids: Sequence[int]) -> int:
        """Make `ids` the whole context, without logits; returns how many were reused."""
        self.turn, self._asked = self.turn + 1, _NOTHING
        n_reused = self._rewind(n_common(self._history, ids))
        for _ in self.decoder.forward(ids[n_reused:], 0):
            pass
        self._history.extend(ids[n_reused:])
        return n_reused

    def logits(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Run ids from an empty context and yield all their logits in blocks, see Decoder.forward."""
        self.forget()
        yield from self.decoder.forward(ids, len(ids))
        self._history = list(ids)

    def save(self, write: "Callable[[list[int], Iterator[Part]], None]") -> None:
        """Give `write` the ids and the parts of their cache."""
        self._rewind(len(self._history))
        write(self.ids, self.decoder.cache.export())

    def restore(self, ids: Sequence[int], parts: "Iterable[Part]") -> None:
        """Make ids the context, with the cache that `save` gave. GgufRunError if it does not fit: nothing is left."""
        self.forget()
        self.decoder.cache.load(len(ids), parts)
        self._history = list(ids)

    def forget(self) -> None:
        """Begin anew."""
        self.turn, self._asked = self.turn + 1, _NOTHING
        self._rewind(0)

    def _rewind(self, n: int) -> int:
        """Forget the tokens that came from number n on, or more, if they are not all there; returns how many are left.

        Also after an interrupted run, when the decoder may stand further than the ids that are known, or hold nothing.
        """
        if n < self._cut.stop:
            n = min(n, self._cut.start)
            self._cut = range(n, n)
        n_past = n - len(self._cut)
        if self.decoder.rewind(min(n_past, self.decoder.n_past)) < n_past:
            n = self.decoder.rewind(0)
            self._cut = range(0)
        del self._history[n:]
        return n

    def _run(self, ids: Sequence[int], n_keep: int | None) -> NDArray[np.float32]:
        while True:
            if n_keep is not None and not self.n_free:
                self._make_room(n_keep)
            part = ids if n_keep is None else ids[: self.n_free]
            (logits,) = (block[-1] for block in self.decoder.forward(part, 1))
            self._history.extend(part)
            ids = ids[len(part) :]
            if not ids:
                return logits

    def _make_room(self, n_keep: int) -> None:
        """Take out half of what stands behind the first n_keep tokens, or behind those kept the first time."""
        start = self._cut.start if self._cut else kept(n_keep)
        n_discard = max(GROUP, (self.decoder.n_past - start) // 2 // GROUP * GROUP)
        n_left = self.decoder.cache.shift(start, n_discard)
        self._cut = range(start, start + len(self._cut) + n_discard)
        if not n_left:  # layers with a window no longer had what now stands before the next token
            for _ in self.decoder.forward(self.ids, 0):
                pass


def kept(n_keep: int) -> int:
    """Tokens at the beginning that stay where n_keep shall: whole groups, at least one. Without its first tokens, on
    which much of the attention rests, a model breaks down (Xiao et al. 2023, StreamingLLM)."""
    return max(1, -(-n_keep // GROUP)) * GROUP


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def check_prompt(ids: Sequence[int], max_tokens: int | None, n_ctx: int | None, name: str = "the prompt") -> None:
    """ContextError if ids do not fit into n_ctx tokens, GgufRunError if there are none, OptionError for max_tokens."""
    if max_tokens is not None and max_tokens < 1:
        raise OptionError(f"max_tokens (--max-tokens) is {max_tokens}; allowed: at least 1")
    if not ids:
        raise GgufRunError(f"{name} is empty: give at least one token of text")
    if n_ctx is not None and len(ids) > n_ctx:
        raise ContextError(
            f"{name} has {len(ids)} tokens, the context holds {n_ctx}: shorten the prompt or choose a larger context "
            "(--ctx-size)"
        )


class Generation:
    """One answer: iterate over its ids; then read what it took.

    finish: "" while it runs, then "stop" (the model ended it, or a stop string), "length" (max_tokens) or "context"
    (no room left). prefill_s lasts until the first token is chosen; decode_s covers the n_decoded tokens after it.
    """

    def __init__(
        self,
        session: Session,
        ids: Sequence[int],
        sampler: Sampler,
        stop_ids: Iterable[int],
        max_tokens: int | None,
        n_keep: int | None = None,
    ) -> None:
        """Nothing runs yet. n_keep: None ends the answer when the context is full, else it goes on, see Session.
        ContextError if ids do not fit, GgufRunError if there are none, OptionError."""
        n_ctx = session.decoder.n_ctx
        if n_keep is not None and not (n_keep >= 0 and kept(n_keep) + 2 * GROUP <= n_ctx):
            raise OptionError(
                f"n_keep (--keep) is {n_keep} in a context of {n_ctx} tokens (--ctx-size); allowed: 0 to "
                f"{n_ctx - 2 * GROUP}, and contexts of {3 * GROUP} or more, so that they can be shifted"
            )
        check_prompt(ids, max_tokens, n_ctx if n_keep is None else None)
        self._session, self._ids, self.sampler = session, ids, sampler
        self._stop_ids, self._max_tokens, self._n_keep = frozenset(stop_ids), max_tokens, n_keep
        self.n_prompt, self.n_reused, self.n_decoded = len(ids), 0, 0
        self.prefill_s = self.decode_s = 0.0
        self.finish = ""
        self.seed = sampler.seed

    def __iter__(self) -> Iterator[int]:
        start = time.perf_counter()
        logits, self.n_reused = self._session.prefill(self._ids, self._n_keep)
        turn = self._session.turn
        self.sampler.accept(self._ids)
        id = self.sampler.sample(logits)
        self.prefill_s = time.perf_counter() - start
        while True:
            if id in self._stop_ids:
                self.finish = "stop"
                return
            yield id
            if self._max_tokens is not None and self.n_decoded + 1 >= self._max_tokens:
                self.finish = "length"
                return
            if self._n_keep is None and self._session.n_free == 0:
                self.finish = "context"
                return
            if self._session.turn != turn:
                raise GgufRunError(
                    "this answer cannot go on: a later generate, chat or logits has taken the context; read it to its "
                    "end first, or use generate_batch"
                )
            start = time.perf_counter()
            following = self._session.append_top(id, self._n_keep, self.sampler.n_top)
            self.sampler.accept([id])
            id = self.sampler.sample(following)
            self.n_decoded += 1
            self.decode_s += time.perf_counter() - start


def text_pieces(generation: Generation, stream: "TokenStream", stop: "StopStrings") -> Iterator[str]:
    """Yield the text of a generation as it comes, up to the first stop string (left out)."""
    for id in generation:
        if text := stop.push(stream.push(id)):
            yield text
        if stop.found:
            generation.finish = "stop"
            return
    # What was held back: an unfinished character, the beginning of a stop string that did not come.
    if text := stop.push(stream.flush()) + stop.flush():
        yield text


class StopStrings:
    """Passes text on up to the first of some strings; holds back what could be the beginning of one."""

    def __init__(self, strings: Sequence[str]) -> None:
        if isinstance(strings, str) or not all(strings):
            raise OptionError(f"stop is {strings!r}; allowed: a list of texts that are not empty")
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Return what can be shown now; after a stop string, set `found` and return only what stands before it."""
        if self.found:
            return ""
        text = self._held + text
        self._held = ""
        hits = [at for string in self._strings if (at := text.find(string)) >= 0]
        if hits:
            self.found = True
            return text[: min(hits)]
        n_hold = max((_n_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - n_hold :]
        return text[: len(text) - n_hold]

    def flush(self) -> str:
        """Return what is held back: no more text comes."""
        held, self._held = self._held, ""
        return held


def _n_overlap(text: str, string: str) -> int:
    """Length of the longest end of text with which string begins."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
