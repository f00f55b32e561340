"""From text to token ids and back, as the metadata of a GGUF file says."""

import codecs
import functools
import importlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

from gguf_run.formats.errors import FormatError, GgufRunError, UnsupportedError
from gguf_run.runtime.tokenizers.bpe import BpeEncoder
from gguf_run.runtime.tokenizers.pretokenizers import pre_tokenizer
from gguf_run.runtime.tokenizers.special import SpecialTokens
from gguf_run.runtime.tokenizers.vocab import CONTROL, UNKNOWN, USER_DEFINED, Defaults, Vocab, read_vocab, strip_ids


class Encoder(Protocol):
    """One kind of tokenizer, for text between special tokens.

    prefix: where a space is put before text: "" nowhere; "special" at the start and after special tokens; "first" at
    the start and "always" anywhere, unless the text begins with one. drops_first_space: decoding takes it away.
    """

    prefix: str
    drops_first_space: bool

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ...

    def piece(self, id: int) -> bytes:
        """Return what a token that is not special stands for; a character may be spread over several tokens."""
        ...


# tokenizer.ggml.model -> the module beside this one, loaded when it is needed, and its Encoder.
_KINDS = MappingProxyType({
    "llama": ("spm", "SpmEncoder"),
    "t5": ("unigram", "UgmEncoder"),
    "bert": ("wordpiece", "WpmEncoder"),
})  # fmt: skip


class Tokenizer:
    """n_vocab: tokens; bos, eos, eot: ids, None if the model has none; stop_ids: all ids that end an answer;
    add_bos, add_eos: what encode adds."""

    def __init__(self, vocab: Vocab, encoder: Encoder, strips: tuple[frozenset[int], frozenset[int]]) -> None:
        self._vocab = vocab
        self._encoder = encoder
        self.n_vocab = len(vocab.tokens)
        self.bos, self.eos, self.eot = vocab.bos, vocab.eos, vocab.eot
        self.stop_ids = vocab.stop_ids
        self.add_bos = vocab.add_bos and vocab.bos is not None
        self.add_eos = vocab.add_eos and vocab.eos is not None
        self._strips = strips

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Build the tokenizer that the keys `tokenizer.ggml.*` describe.

        FormatError: they contradict each other or are damaged. UnsupportedError: a kind of tokenizer that is not
        known. PreTokenizerWarning: text is cut by rules that may differ from the model's.
        """
        model = _string(metadata, "tokenizer.ggml.model")
        if model == "gpt2":
            pre = pre_tokenizer(_string(metadata, "tokenizer.ggml.pre"))
            vocab = read_vocab(metadata, Defaults(add_bos=pre.add_bos))
            return cls(vocab, BpeEncoder(vocab, metadata, pre), strip_ids(metadata, vocab))
        if model is None:
            raise FormatError("tokenizer.ggml.model is missing: the file holds no tokenizer, convert the model again")
        if model not in _KINDS:
            known = ", ".join(("gpt2", *_KINDS))
            raise UnsupportedError(f"tokenizer.ggml.model is {model[:40]!r}: {known} are supported")
        module_name, kind = _KINDS[model]
        module = importlib.import_module(f"{__package__}.{module_name}")
        vocab = read_vocab(metadata, module.DEFAULTS)
        return cls(vocab, getattr(module, kind)(vocab, metadata), strip_ids(metadata, vocab))

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the ids of a text.

        add_special: put BOS and EOS around it where the model wants them. parse_special: the names of control tokens
        in the text ("<|im_start|>") mean these tokens. User-defined tokens are always found. Half a surrogate pair
        becomes U+FFFD.
        """
        ids = [self.bos] if add_special and self.add_bos and self.bos is not None else []
        first = after_special = True
        pieces = (self._all_special if parse_special else self._user_defined).split(_valid(text))
        for piece in SpecialTokens.strip(pieces, *self._strips) if any(self._strips) else pieces:
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._encoder.encode(self._prefixed(piece, first, after_special))
            first, after_special = False, isinstance(piece, int)
        if add_special and self.add_eos and self.eos is not None:
            ids.append(self.eos)
        return ids

    def encode_chat(self, prompt: str) -> list[int]:
        """Return the ids of a prompt that a chat template has written: with BOS once, whether or not the template wrote
        it, and without EOS, since the answer follows."""
        ids = self.encode(prompt, add_special=False)
        return [self.bos, *ids] if self.add_bos and self.bos is not None and ids[:1] != [self.bos] else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Return the text of ids: the reverse of encode. skip_special: leave out control tokens. Bytes that are not
        UTF-8 become U+FFFD. For the rest of a text that has begun use `stream`, which keeps a leading space."""
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
        """Return the bytes of one token, which need not be whole characters."""
        if not 0 <= id < self.n_vocab:
            raise GgufRunError(f"token id {id} is not in the vocabulary: 0 to {self.n_vocab - 1} are")
        if not self._is_special(id):
            return self._encoder.piece(id)
        if skip_special and self._vocab.types[id] != USER_DEFINED:
            return b""
        return self._vocab.tokens[id].encode()

    def token_text(self, id: int) -> str:
        """Return a token for display; bytes that are no whole character look like \\xe2."""
        return self.piece(id).decode(errors="backslashreplace")

    def _prefixed(self, text: str, first: bool, after_special: bool) -> str:
        prefix = self._encoder.prefix
        if prefix == "special":
            return f" {text}" if after_special else text
        wanted = prefix == "always" or (prefix == "first" and first)
        return f" {text}" if wanted and not text.startswith((" ", "▁")) else text

    def _is_special(self, id: int) -> bool:
        return self._vocab.types[id] in (CONTROL, UNKNOWN, USER_DEFINED)

    @functools.cached_property
    def _all_special(self) -> SpecialTokens:
        return SpecialTokens(self._vocab.tokens, self._vocab.of_type(CONTROL, UNKNOWN, USER_DEFINED))

    @functools.cached_property
    def _user_defined(self) -> SpecialTokens:
        return SpecialTokens(self._vocab.tokens, self._vocab.of_type(USER_DEFINED))


class TokenStream:
    """Turns tokens into text one by one and never gives out half a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Return the text that is complete with this token, maybe "". Bytes that are not UTF-8 become U+FFFD."""
        return self._decoder.decode(self._tokenizer.piece(id, skip_special=self._skip_special))

    def flush(self) -> str:
        """End the text: return U+FFFD if it breaks off inside a character, else ""."""
        return self._decoder.decode(b"", final=True)


def _valid(text: str) -> str:
    """Replace what UTF-8 cannot express, such as the stand-ins that Python puts for invalid bytes in arguments."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _string(metadata: Mapping[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, str):
        raise FormatError(f"{key} must be a string, but is {type(value).__name__}")
    return value
