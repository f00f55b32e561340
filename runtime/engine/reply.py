"""The answer to one prompt, token by token: choose a token, turn it into text, find the reason to stop."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gguf_run.formats.errors import OptionError
from gguf_run.runtime.sampling.sampler import Sampler, TokenLogprob

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

    from gguf_run.runtime.sampling.filters import Candidates
    from gguf_run.runtime.tokenizers.tokenizer import TokenStream


@dataclass(frozen=True)
class Answer:
    """The text that one prompt of a batch got, and how it ended."""

    text: str
    finish: str  # "stop", "length" or "context", see Reply
    n_prompt: int  # tokens of the prompt
    n_decoded: int  # tokens of the text
    seed: int  # gives the same text again
    logprobs: tuple[TokenLogprob, ...] = ()  # one for each token, if they were asked for


class StopStrings:
    """Passes text on up to the first stop string. The end of a text waits if a stop string may begin there."""

    def __init__(self, strings: Sequence[str]) -> None:
        """OptionError for a single string instead of a list, and for an empty stop string."""
        if isinstance(strings, str) or not all(strings):
            raise OptionError(f"stop is {strings!r}; allowed: a list of texts that are not empty")
        self.found = False  # whether a stop string has come
        self._strings = tuple(strings)
        self._held = ""

    def push(self, text: str) -> str:
        """Take more text. Return the text that can be shown now: "" once a stop string was found."""
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
        """Return what was held back: no more text comes."""
        held, self._held = self._held, ""
        return held


def _n_overlap(text: str, string: str) -> int:
    """Return the length of the longest end of `text` that is a start of `string`."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)


class Reply:
    """A text that grows by a token with each call of `advance`, until `finish` names the reason to stop."""

    def __init__(
        self,
        ids: Sequence[int],
        sampler: Sampler,
        stream: "TokenStream",
        stop: StopStrings,
        stop_ids: frozenset[int],
        max_tokens: int | None,
    ) -> None:
        """ids: the prompt. stop_ids: tokens with which the model ends an answer. max_tokens: None for no limit."""
        self.ids, self.sampler, self.max_tokens = ids, sampler, max_tokens
        self.next = -1  # the last token of the text: the one to run next
        self.n_tokens = 0  # tokens of the text
        # "" while the text goes on; "stop": the model ended it or a stop string came; "length": it has max_tokens;
        # "context": the context is full.
        self.finish = ""
        self._stream, self._stop, self._stop_ids = stream, stop, stop_ids
        self._pieces: list[str] = []
        sampler.accept(ids)

    def advance(self, logits: "NDArray[float32] | Candidates", is_full: bool) -> str:
        """Choose the next token; return the text that is complete with it, maybe "".

        logits: f32[n_vocab] after the last token, or its greatest ones, see Sampler.sample.
        is_full: the context has no room for the new token.
        The text has whole characters only and nothing of a stop string. When `finish` is set, it is the last piece.
        """
        id = self.sampler.sample(logits)
        if id in self._stop_ids:
            self.finish, text = "stop", ""
        else:
            self.next = id
            self.n_tokens += 1
            self.sampler.accept([id])
            text = self._stop.push(self._stream.push(id))
            self.finish = self._reason(is_full)
        if self.finish and not self._stop.found:  # an unfinished character, a start of a stop string
            text += self._stop.push(self._stream.flush()) + self._stop.flush()
        self._pieces.append(text)
        return text

    def answer(self) -> Answer:
        """Return the whole text and how it ended."""
        logprobs = tuple(self.sampler.logprobs)
        text = "".join(self._pieces)
        return Answer(text, self.finish, len(self.ids), self.n_tokens, self.sampler.seed, logprobs)

    def _reason(self, is_full: bool) -> str:
        if self._stop.found:
            return "stop"
        if self.n_tokens == self.max_tokens:
            return "length"
        return "context" if is_full else ""
