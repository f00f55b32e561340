"""Text to token ids and back, as the metadata of a GGUF file says."""

import codecs
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, Protocol

from gguf_run.formats.errors import FormatError, GgufRunError, UnsupportedError
from gguf_run.runtime.tokenizers.special import Flags, SpecialTokens
from gguf_run.runtime.tokenizers.vocab import CONTROL, UNKNOWN, USER_DEFINED, Vocab, read_flags, read_string


class TwoBosWarning(UserWarning):
    """A text begins with BOS, and the tokenizer adds BOS: the model sees it twice, as it hardly did in training."""


class Encoder(Protocol):
    """A kind of tokenizer, for text between special tokens."""

    vocab: Vocab
    # Where a space is put before text. "": nowhere; "special": at the start and after special tokens; "first": at the
    # start, and "always": before each text between special tokens, both unless it begins with a space. "suffix": not
    # before, but behind each text between special tokens.
    prefix: str
    drops_first_space: bool  # decoding removes a space at the start
    normalize: Callable[[str], str] | None  # replaces characters of a text, before a space is put before it

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ...

    def piece(self, id: int) -> bytes:
        """Return the bytes of a token that is not special. A character may be spread over several tokens."""
        ...


class Tokenizer:
    """Makes token ids of text, and text of token ids."""

    def __init__(self, encoder: Encoder, flags: Flags) -> None:
        vocab = encoder.vocab
        self.n_vocab, self.tokens = len(vocab.tokens), vocab.tokens  # texts, by id
        self.bos, self.eos, self.eot = vocab.bos, vocab.eos, vocab.eot  # ids; None if the model has no such token
        self.stop_ids = vocab.stop_ids  # all tokens that end an answer
        self.never_ids = vocab.never_ids  # tokens that an answer must not have
        self.add_bos = vocab.add_bos and vocab.bos is not None  # encode begins with BOS
        self.add_eos = vocab.add_eos and vocab.eos is not None  # encode ends with EOS
        self._vocab, self._encoder, self._flags = vocab, encoder, flags

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Build the tokenizer that the keys `tokenizer.ggml.*` describe.

        FormatError: the keys are damaged or contradict each other. UnsupportedError: a kind of tokenizer that is not
        known. PreTokenizerWarning: text is cut into words by rules that may differ from the model's.
        """
        encoder = _encoder(metadata)
        return cls(encoder, read_flags(metadata, encoder.vocab))

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the ids of a text.

        add_special: put BOS and EOS around the text if the model wants them.
        parse_special: names of control tokens in the text ("<|im_start|>") become these tokens. User-defined tokens
        always do.
        Half of a surrogate pair counts as U+FFFD.

        TwoBosWarning if the text begins with BOS, and BOS is put before it.
        """
        ids = [*self._vocab.before] if add_special and self.add_bos else []
        first = after_special = True
        pieces = (self._all_special if parse_special else self._user_defined).split(_valid(text))
        for piece in SpecialTokens.strip(pieces, self._flags) if self._flags.left or self._flags.right else pieces:
            if isinstance(piece, int):
                ids.append(piece)
            elif piece := self._encoder.normalize(piece) if self._encoder.normalize else piece:
                ids += self._encoder.encode(self._prefixed(piece, first, after_special))
            first, after_special = False, isinstance(piece, int)
        n_before = len(self._vocab.before)
        if add_special and self.add_bos and ids[n_before : n_before + 1] == [self.bos]:
            name = self._vocab.tokens[ids[0]]
            what = (
                f"the text begins with {name}, and the tokenizer puts another one before it: leave it out of the text"
            )
            warnings.warn(what, TwoBosWarning, stacklevel=2)
        if add_special and self.add_eos and self.eos is not None:
            ids.append(self.eos)
        return ids

    def encode_chat(self, prompt: str) -> list[int]:
        """Return the ids of a prompt that a chat template has written.

        BOS stands there once, whether the template wrote it or not. EOS does not follow: the answer does.
        """
        ids = self.encode(prompt, add_special=False)
        return [*self._vocab.before, *ids] if self.add_bos and ids[:1] != [self.bos] else ids

    def encode_gap(self, start: str, end: str) -> list[int]:
        """Return the ids of a prompt whose answer fills the gap between two texts, as llama.cpp writes it.

        Names of control tokens in the texts are text. UnsupportedError if the vocabulary has no tokens for this.
        """
        if not self._vocab.fim:
            raise UnsupportedError("this model fills no gaps: its vocabulary lacks fim_pre, fim_suf or fim_mid")
        before_start, before_end, before_answer = self._vocab.fim
        texts = [self.encode(text, add_special=False, parse_special=False) for text in (start, end)]
        before = self._vocab.before if self.add_bos else ()
        return [*before, before_start, *texts[0], before_end, *texts[1], before_answer]

    def encode_inside(self, text: str) -> list[int]:
        """Return the ids of a text that goes on another one: nothing is put before it, and it has no control tokens."""
        parts = self._user_defined.split(text)
        return [id for part in parts for id in ([part] if isinstance(part, int) else self._encoder.encode(part))]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Return the text of ids, the reverse of encode. Bytes that are not UTF-8 become U+FFFD.

        skip_special: leave out control tokens. For the rest of a text use `stream`, which keeps a space at its start.
        """
        ids = list(ids)
        pieces = [self.piece(id, skip_special=skip_special) for id in ids]
        if self._encoder.drops_first_space:
            first = next((i for i, id in enumerate(ids) if not self._is_special(id)), None)
            if first is not None:
                pieces[first] = pieces[first].removeprefix(b" ")
        return b"".join(pieces).decode(errors="replace")

    def stream(self, *, skip_special: bool = True) -> "TokenStream":
        """Return a decoder for tokens that come one by one."""
        return TokenStream(self, skip_special)

    def piece(self, id: int, *, skip_special: bool = False) -> bytes:
        """Return the bytes of a token, maybe a part of a character. skip_special: none for a control token."""
        if not 0 <= id < self.n_vocab:
            raise GgufRunError(f"token id {id} is not in the vocabulary: 0 to {self.n_vocab - 1} are")
        if not self._is_special(id):
            return self._encoder.piece(id)
        if skip_special and self._vocab.types[id] != USER_DEFINED:
            return b""
        return self._vocab.tokens[id].encode()

    def token_text(self, id: int) -> str:
        """Return the text of a token for display; a byte that is no whole character is written as \\xe2."""
        return self.piece(id).decode(errors="backslashreplace")

    def _prefixed(self, text: str, first: bool, after_special: bool) -> str:
        prefix = self._encoder.prefix
        if prefix == "suffix":
            return f"{text} "
        if prefix == "special":
            return f" {text}" if after_special else text
        wanted = prefix == "always" or (prefix == "first" and first)
        return f" {text}" if wanted and not text.startswith((" ", "▁")) else text

    def _is_special(self, id: int) -> bool:
        return self._vocab.types[id] in (CONTROL, UNKNOWN, USER_DEFINED)

    @functools.cached_property
    def _all_special(self) -> SpecialTokens:
        ids = self._vocab.of_type(CONTROL, UNKNOWN, USER_DEFINED)
        return SpecialTokens(self._vocab.tokens, ids, self._flags.single_word)

    @functools.cached_property
    def _user_defined(self) -> SpecialTokens:
        return SpecialTokens(self._vocab.tokens, self._vocab.of_type(USER_DEFINED), self._flags.single_word)


class TokenStream:
    """Turns tokens into text, one by one; the text has whole characters only."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Return the text that this token completes, maybe "". Bytes that are not UTF-8 become U+FFFD."""
        return self._decoder.decode(self._tokenizer.piece(id, skip_special=self._skip_special))

    def flush(self) -> str:
        """Return the end of the text: U+FFFD if it breaks off inside a character, else ""."""
        return self._decoder.decode(b"", final=True)


# tokenizer.ggml.model -> a module of this folder, and the class in it.
_ENCODERS = {
    "gpt2": ("bpe", "BpeEncoder"),
    "llama": ("spm", "SpmEncoder"),
    "gemma4": ("spm", "MergesEncoder"),
    "t5": ("unigram", "UgmEncoder"),
    "bert": ("wordpiece", "WpmEncoder"),
}
# Names of pre-tokenizers, of vocabularies that spell a space "▁" as the model "gemma4" does.
_SPACED = ("gemma4", "granite-embed-multi-311m", "sarvam-moe")


def _encoder(metadata: Mapping[str, Any]) -> Encoder:
    """Return the encoder of the kind that the metadata names. A kind of tokenizer is imported when it is needed."""
    model = read_string(metadata, "model")
    if model is None:
        raise FormatError("tokenizer.ggml.model is missing: the file holds no tokenizer, convert the model again")
    if model not in _ENCODERS:
        raise UnsupportedError(f"tokenizer.ggml.model is {model[:40]!r}: {', '.join(_ENCODERS)} are supported")
    is_spaced = model == "gpt2" and read_string(metadata, "pre") in _SPACED
    module, name = _ENCODERS["gemma4" if is_spaced else model]
    encoder: Encoder = getattr(import_module(f"{__package__}.{module}"), name)(metadata)
    return encoder


def _valid(text: str) -> str:
    """Replace characters that UTF-8 cannot express: Python puts such for invalid bytes of the command line."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
