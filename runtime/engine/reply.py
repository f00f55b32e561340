"""A request, and the answer to it: tokens become text until there is a reason to stop."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from gguf_run.formats.errors import check_names
from gguf_run.formats.frozen import frozen
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.sampling.sampler import Sampler

if TYPE_CHECKING:
    from gguf_run.runtime.engine.constraint import Constraint
    from gguf_run.runtime.engine.stop import StopStrings
    from gguf_run.runtime.sampling.choice import TokenLogprob
    from gguf_run.runtime.tokenizers.tokenizer import TokenStream

_DEFAULT = SamplingParams()


@frozen(eq=False)
class Request:
    """What the engine is asked for. Values are checked, see also keywords.ReplyOptions."""

    ids: Sequence[int]  # the prompt
    sampling: SamplingParams = _DEFAULT
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    context_shift: bool = False
    n_keep: int = 0
    priority: int = 0  # a greater one comes first
    adapters: Mapping[str, float] | None = None  # scales by name, see AdapterScales.set; None: as the model was loaded
    salt: str = ""  # requests of different salts share no pages of the cache
    constraint: "Constraint | None" = None  # what the answer may be
    skip_special: bool = True  # control tokens are no part of the text

    @property
    def root(self) -> Hashable:
        """What else than its ids the rows of the cache depend on: see kv_find.adopt."""
        adapters = self.adapters and tuple(sorted(self.adapters.items()))
        return (self.salt, adapters) if self.salt or adapters is not None else ()

    @classmethod
    def of(cls, ids: Sequence[int], options: Mapping[str, Any], without: Sequence[str] = ()) -> "Request":
        """OptionError for a name that is unknown or in `without`, and for a value that is not allowed."""
        own = {field.name for field in fields(cls)[2:]}
        check_names(options, ({field.name for field in fields(SamplingParams)} | own) - {*without})
        sampling = SamplingParams(**{name: value for name, value in options.items() if name not in own})
        return cls(ids, sampling, **{name: value for name, value in options.items() if name in own})


class Piece(str):
    """A piece of an answer: its text, and the tokens that it is made of."""

    ids: tuple[int, ...]  # the tokens since the piece before
    # What the model thought of them, if the option logprobs asks for it. The last piece has one more if a token that
    # is not text has ended the answer.
    logprobs: "tuple[TokenLogprob, ...]"
    finish_reason: str | None  # "stop", "length" or "context" in the last piece, see Reply; None: more will come


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


class Reply:
    """A text that grows by a token with each call of `take`, until `finish` names the reason to stop."""

    def __init__(
        self,
        ids: Sequence[int],
        sampler: Sampler,
        stream: "TokenStream",
        stop: "StopStrings | None",
        stop_ids: frozenset[int],
        max_tokens: int | None,
    ) -> None:
        """ids: the prompt. stop: None for none. stop_ids: the model ends with them. max_tokens: None for no limit."""
        self.ids, self.sampler, self.max_tokens = ids, sampler, max_tokens
        self.tokens: list[int] = []  # of the text
        # "" while the text goes on; "stop": the model ended it or a stop string came; "length": it has max_tokens;
        # "context": the context is full.
        self.finish = ""
        self._stream, self._stop, self._stop_ids = stream, stop, stop_ids
        self._texts: list[str] = []
        self._n_taken = self._n_taken_logprobs = 0  # tokens, and records of them, that `piece` has returned
        sampler.accept(ids)

    @property
    def stop_string(self) -> str:
        """The stop string that has ended the text, "" for none."""
        return "" if self._stop is None else self._stop.found

    def take(self, id: int, is_full: bool) -> str:
        """Take the next token, which the sampler has chosen; return the text that is complete with it, maybe "".

        is_full: the context has no room for the new token.
        The text has whole characters only and nothing of a stop string. When `finish` is set, it is the last piece.
        """
        self.sampler.accept((id,))
        if id in self._stop_ids:
            return self.end("stop")
        self.tokens.append(int(id))
        text = self._stream.push(id)
        if self._stop is not None:
            text = self._stop.push(text)
            if self._stop.found:
                return self.end("stop", text)
        if len(self.tokens) == self.max_tokens:
            return self.end("length", text)
        if is_full:
            return self.end("context", text)
        self._texts.append(text)
        return text

    def end(self, reason: str, text: str = "") -> str:
        """End the text here. Return `text` and what was held back: half a character, the start of a stop string."""
        self.finish = reason
        if self._stop is None:
            text += self._stream.flush()
        elif not self._stop.found:
            text += self._stop.push(self._stream.flush()) + self._stop.flush()
        self._texts.append(text)
        return text

    def piece(self, text: str) -> Piece:
        """Return text that `take` has given, with the tokens since the piece before."""
        piece, logprobs = Piece(text), self.sampler.logprobs
        piece.ids, piece.logprobs = tuple(self.tokens[self._n_taken :]), tuple(logprobs[self._n_taken_logprobs :])
        piece.finish_reason = self.finish or None
        self._n_taken, self._n_taken_logprobs = len(self.tokens), len(logprobs)
        return piece

    def answer(self) -> Answer:
        """Return the whole text and how it ended."""
        sampler = self.sampler
        text, ids, logprobs = "".join(self._texts), tuple(self.tokens), tuple(sampler.logprobs)
        return Answer(text, self.finish, len(self.ids), ids, sampler.seed, logprobs)
