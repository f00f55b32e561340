"""From prompt ids to text: prefill, then one token after the other, then whole characters and stop strings.

Session      ids that stand in the KV cache; a prompt that starts alike is not computed again
Generation   ids: prefill, sample, decode, until a reason to stop
text_pieces  text: no half characters, nothing of a stop string
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.runtime.sampling import Sampler

if TYPE_CHECKING:
    from gguf_run.models.decoder import Decoder
    from gguf_run.runtime.session_file import Part
    from gguf_run.runtime.tokenizer import TokenStream


class ContextError(GgufRunError):
    """A prompt does not fit into the context."""


class Session:
    """A decoder and the ids whose keys and values it holds."""

    def __init__(self, decoder: "Decoder") -> None:
        self.decoder = decoder
        self._ids: list[int] = []

    @property
    def n_free(self) -> int:
        """Positions left in the context."""
        return self.decoder.n_ctx - self.decoder.n_past

    def prefill(self, ids: Sequence[int]) -> tuple[NDArray[np.float32], int]:
        """Make `ids` the whole context; return the logits f32[n_vocab] after the last one and how many were reused.

        Only what differs from the ids already there is computed.
        """
        # The last token runs in any case: its logits are wanted.
        n_reused = self._rewind(min(_n_common(self._ids, ids), len(ids) - 1))
        return self._run(ids[n_reused:]), n_reused

    def append(self, id: int) -> NDArray[np.float32]:
        """Add one token; return the logits f32[n_vocab] after it."""
        return self._run([id])

    def logits(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Run ids from an empty context and yield all their logits in blocks, see Decoder.forward."""
        self._rewind(0)
        yield from self.decoder.forward(ids, len(ids))
        self._ids = list(ids)

    def save(self, write: "Callable[[list[int], Iterator[Part]], None]") -> None:
        """Give `write` the ids and the parts of their cache."""
        self._rewind(len(self._ids))
        write(self._ids, self.decoder.cache.export())

    def restore(self, ids: Sequence[int], parts: "Iterable[Part]") -> None:
        """Make ids the context, with the cache that `save` gave. GgufRunError if it does not fit: nothing is left."""
        self._rewind(0)
        self.decoder.cache.load(len(ids), parts)
        self._ids = list(ids)

    def _rewind(self, n_past: int) -> int:
        # Also after an interrupted run, when the decoder may stand further than the ids that are known.
        n_past = self.decoder.rewind(n_past)
        del self._ids[n_past:]
        return n_past

    def _run(self, ids: Sequence[int]) -> NDArray[np.float32]:
        (logits,) = (block[-1] for block in self.decoder.forward(ids, 1))
        self._ids.extend(ids)
        return logits


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Generation:
    """One answer: iterate over its ids; then read what it took.

    finish: "" while it runs, then "stop" (the model ended it, or a stop string), "length" (max_tokens) or "context"
    (no room left). prefill_s lasts until the first token is chosen; decode_s covers the n_decoded tokens after it.
    """

    def __init__(
        self, session: Session, ids: Sequence[int], sampler: Sampler, stop_ids: Iterable[int], max_tokens: int | None
    ) -> None:
        """Nothing runs yet. ContextError if ids do not fit, GgufRunError if there are none, OptionError."""
        if max_tokens is not None and max_tokens < 1:
            raise OptionError(f"max_tokens (--max-tokens) is {max_tokens}; allowed: at least 1")
        if not ids:
            raise GgufRunError("the prompt is empty: give at least one token of text")
        if len(ids) > (n_ctx := session.decoder.n_ctx):
            raise ContextError(
                f"the prompt has {len(ids)} tokens, the context holds {n_ctx}: shorten the prompt or choose a larger "
                "context (--ctx-size)"
            )
        self._session, self._ids, self._sampler = session, ids, sampler
        self._stop_ids, self._max_tokens = frozenset(stop_ids), max_tokens
        self.n_prompt, self.n_reused, self.n_decoded = len(ids), 0, 0
        self.prefill_s = self.decode_s = 0.0
        self.finish = ""
        self.seed = sampler.seed

    def __iter__(self) -> Iterator[int]:
        start = time.perf_counter()
        logits, self.n_reused = self._session.prefill(self._ids)
        self._sampler.accept(self._ids)
        id = self._sampler.sample(logits)
        self.prefill_s = time.perf_counter() - start
        while True:
            if id in self._stop_ids:
                self.finish = "stop"
                return
            yield id
            if self._max_tokens is not None and self.n_decoded + 1 >= self._max_tokens:
                self.finish = "length"
                return
            if self._session.n_free == 0:
                self.finish = "context"
                return
            start = time.perf_counter()
            logits = self._session.append(id)
            self._sampler.accept([id])
            id = self._sampler.sample(logits)
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
