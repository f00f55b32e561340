"""The answer to one prompt, token by token: choose a token, turn it into text, find the reason to stop."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from gguf_run.formats.errors import OptionError, check_names
from gguf_run.formats.frozen import frozen
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.sampling.sampler import Sampler

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

    from gguf_run.runtime.sampling.candidates import Candidates
    from gguf_run.runtime.sampling.choice import TokenLogprob
    from gguf_run.runtime.tokenizers.tokenizer import TokenStream


@frozen
class ReplyParams:
    """The options of one answer, checked, with their defaults: see keywords.ReplyOptions."""

    sampling: SamplingParams
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    context_shift: bool = False
    n_keep: int = 0

    @classmethod
    def of(cls, options: Mapping[str, Any], without: Sequence[str] = ()) -> "ReplyParams":
        """OptionError for a name that is unknown or in `without`, and for a value that is not allowed."""
        own = {field.name for field in fields(cls)[1:]}
        check_names(options, ({field.name for field in fields(SamplingParams)} | own) - {*without})
        sampling = SamplingParams(**{name: value for name, value in options.items() if name not in own})
        return cls(sampling, **{name: value for name, value in options.items() if name in own})


class Piece(str):
    """A piece of an answer: its text, and the tokens that it is made of."""

    ids: tuple[int, ...]  # the tokens since the piece before
    # What the model thought of them, if the option logprobs asks for it. The last piece has one more if a token that
    # is not text has ended the answer.
    logprobs: "tuple[TokenLogprob, ...]"
    finish_reason: str | None  # "stop", "length" or "context" in the last piece, see Reply; None: more will come

    def __new__(
        cls,
        text: str = "",
        ids: Sequence[int] = (),
        logprobs: "Sequence[TokenLogprob]" = (),
        finish_reason: str | None = None,
    ) -> "Piece":
        piece = super().__new__(cls, text)
        piece.ids, piece.logprobs, piece.finish_reason = tuple(ids), tuple(logprobs), finish_reason
        return piece


@frozen
class Answer:
    """The whole text that a prompt got, and how it ended."""

    text: str
    finish: str  # "stop", "length" or "context", see Reply; "": it was not read to its end
    n_prompt: int  # tokens of the prompt
    ids: tuple[int, ...]  # tokens of the text
    seed: int  # gives the same text again
    logprobs: "tuple[TokenLogprob, ...]" = ()  # of the tokens, if the option logprobs asks for them: see Piece

    @property
    def n_decoded(self) -> int:
        """Tokens of the text."""
        return len(self.ids)


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
        self.tokens: list[int] = []  # of the text
        # "" while the text goes on; "stop": the model ended it or a stop string came; "length": it has max_tokens;
        # "context": the context is full.
        self.finish = ""
        self._stream, self._stop, self._stop_ids = stream, stop, stop_ids
        self._texts: list[str] = []
        self._n_taken = self._n_taken_logprobs = 0  # tokens, and records of them, that `piece` has returned
        sampler.accept(ids)

    def advance(self, logits: "NDArray[float32] | Candidates", is_full: bool) -> str:
        """Choose the next token; return the text that is complete with it, maybe "".

        logits: f32[n_vocab] after the last token, or its greatest ones, see Sampler.sample.
        is_full: the context has no room for the new token.
        The text has whole characters only and nothing of a stop string. When `finish` is set, it is the last piece.
        """
        id = self.sampler.sample(logits)
        self.sampler.accept([id])
        if id in self._stop_ids:
            self.finish, text = "stop", ""
        else:
            self.tokens.append(int(id))
            text = self._stop.push(self._stream.push(id))
            self.finish = self._reason(is_full)
        if self.finish and not self._stop.found:  # an unfinished character, a start of a stop string
            text += self._stop.push(self._stream.flush()) + self._stop.flush()
        self._texts.append(text)
        return text

    def piece(self, text: str) -> Piece:
        """Return text that `advance` has given, with the tokens since the piece before."""
        logprobs = self.sampler.logprobs
        piece = Piece(text, self.tokens[self._n_taken :], logprobs[self._n_taken_logprobs :], self.finish or None)
        self._n_taken, self._n_taken_logprobs = len(self.tokens), len(logprobs)
        return piece

    def answer(self) -> Answer:
        """Return the whole text and how it ended."""
        sampler = self.sampler
        text, ids, logprobs = "".join(self._texts), tuple(self.tokens), tuple(sampler.logprobs)
        return Answer(text, self.finish, len(self.ids), ids, sampler.seed, logprobs)

    def _reason(self, is_full: bool) -> str:
        if self._stop.found:
            return "stop"
        if len(self.tokens) == self.max_tokens:
            return "length"
        return "context" if is_full else ""
