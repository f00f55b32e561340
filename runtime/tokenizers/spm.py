"""SentencePiece BPE: the adjacent pair that makes the token of the best score is joined (`tokenizer.ggml.model` =
"llama"), or the pair that stands first in a list of merges ("gemma4"). Of equal ones the leftmost is, as in llama.cpp.

Reference: Kudo and Richardson, "SentencePiece".
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from gguf_run.formats.errors import FormatError
from gguf_run.runtime.tokenizers.merge import WordIds, by_merges, merge
from gguf_run.runtime.tokenizers.vocab import (
    BYTE,
    NORMAL,
    STEPS,
    Defaults,
    read_bool,
    read_numbers,
    read_string,
    read_strings,
    read_vocab,
)

DEFAULTS = Defaults(add_bos=True, bos=1, eos=2, unknown=0)

SPACE = "▁"  # how a space is spelled in tokens

_LINE = re.compile(r"\n+|[^\n]+")

# Texts of up to this many characters in all are encoded whole: that is faster than to find out where the vocabulary
# lets them be cut.
FEW_CHARS = 4096


class SpmPieces:
    """The bytes of tokens in vocabularies that write a space as "▁"."""

    prefix = ""
    drops_first_space = True
    normalize: Callable[[str], str] | None = None

    def __init__(self, metadata: Mapping[str, Any], defaults: Defaults) -> None:
        self.vocab = read_vocab(metadata, defaults)

    def piece(self, id: int) -> bytes:
        token, type = self.vocab.tokens[id], self.vocab.types[id]
        if type == NORMAL:
            return token.replace(SPACE, " ").encode()
        if type == BYTE:
            return bytes([_byte_value(token)])
        return b""


class SpmEncoder(SpmPieces):
    """Encodes text between special tokens, see tokenizer.Encoder."""

    def __init__(
        self, metadata: Mapping[str, Any], defaults: Defaults = DEFAULTS, add_space_prefix: bool = True
    ) -> None:
        """FormatError if the vocabulary is damaged, or scores are missing, of a wrong number, or not numbers.

        defaults, add_space_prefix: for keys that the metadata lacks.
        """
        super().__init__(metadata, defaults)
        self._rank = self._ranks(metadata)
        self.drops_first_space = read_bool(metadata, "add_space_prefix", add_space_prefix)
        scheme = metadata.get("tokenizer.ggml.metaspace", "special")
        if scheme not in ("special", "first", "always"):
            raise FormatError(f'tokenizer.ggml.metaspace is {str(scheme)[:40]!r}: "first" and "always" are allowed')
        self.prefix = scheme if self.drops_first_space else ""
        if read_bool(metadata, "treat_whitespace_as_suffix", False):
            self.prefix, self.drops_first_space = "suffix" if self.prefix else "", False
        self._escapes_spaces = read_bool(metadata, "escape_whitespaces", True)
        self._cut: Callable[[str], list[str]] | None = None
        if any(f"tokenizer.ggml.{key}" in metadata for key in (*STEPS, "remove_extra_whitespaces")):
            from gguf_run.runtime.tokenizers.steps import read_cutter, read_normalizer

            joins_spaces = read_bool(metadata, "remove_extra_whitespaces", False)
            self.normalize = read_normalizer(metadata, joins_spaces=joins_spaces)
            self._cut = read_cutter(metadata)
        self._word_ids = WordIds(self._encode_word)
        self._n_encoded = 0

    def _ranks(self, metadata: Mapping[str, Any]) -> Callable[[str, str], float | None]:
        """Return a function that says how early two symbols are joined, None: never."""
        scores = read_numbers(metadata, "scores", len(self.vocab.tokens))
        if scores is None:
            raise FormatError(
                "tokenizer.ggml.scores is missing: this kind of tokenizer needs it, convert the model again"
            )
        if np.isnan(scores).any():
            raise FormatError(f"tokenizer.ggml.scores: entry {int(np.isnan(scores).argmax())} is not a number")
        costs: list[float] = (-scores.astype(np.float64)).tolist()
        ids = self.vocab.ids
        return lambda left, right: None if (id := ids.get(left + right)) is None else costs[id]

    def _joined(self) -> Iterable[str]:
        """Return all that symbols can be joined to."""
        return self.vocab.tokens

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        text = text.replace(" ", SPACE) if self._escapes_spaces else text
        self._n_encoded += len(text)
        for word in self._words(text):
            ids += self._word_ids[word]
        return ids

    def _words(self, text: str) -> list[str]:
        if self._cut:
            return self._cut(text)
        return self._word.findall(text) if self._n_encoded > FEW_CHARS and self._escapes_spaces else [text]

    @functools.cached_property
    def _word(self) -> re.Pattern[str]:
        """A pattern that matches the parts of a text that can be encoded alone: no token reaches from one to the next.

        A part begins with the spaces before a word, since tokens have their spaces at the start. Some vocabularies have
        a few tokens with a space behind another character: no part ends behind such a character.
        """
        tokens = list(self._joined())
        joined = "\0".join(tokens)
        inner = {before[-1] for before in joined.split(SPACE)[:-1] if before}
        if joined.count("\0") < len(tokens):
            inner.discard("\0")  # no token holds it: it only stands between tokens here
        goes_on = f"(?:(?<=[{re.escape(''.join(sorted(inner)))}]){SPACE}+[^{SPACE}]*)*" if inner else ""
        return re.compile(f"{SPACE}*[^{SPACE}]+{goes_on}|{SPACE}+")

    def _encode_word(self, word: str) -> list[int]:
        ids = self.vocab.ids
        out: list[int] = []
        for symbol in merge(list(word), self._rank):
            id = ids.get(symbol)
            out += self._bytes(symbol) if id is None else (id,)
        return out

    def _bytes(self, symbol: str) -> list[int]:
        """Return tokens for a character that has no token: one for each byte, or the unknown token."""
        spelled = [self.vocab.ids.get(f"<0x{byte:02X}>", self.vocab.unknown) for byte in symbol.encode()]
        ids = [id for id in spelled if id is not None]
        if len(ids) < len(spelled):
            raise FormatError(f"the vocabulary has no token for {symbol!r}, its bytes, or unknown text")
        return ids


class MergesEncoder(SpmEncoder):
    """Encodes text between special tokens by a list of merges, line by line."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        """FormatError if the vocabulary or the merges are missing or malformed."""
        super().__init__(metadata, Defaults(add_bos=read_string(metadata, "model") == "gemma4"), add_space_prefix=False)

    def _ranks(self, metadata: Mapping[str, Any]) -> Callable[[str, str], float | None]:
        self._merges = read_strings(metadata, "merges")
        return by_merges(self._merges)

    def _joined(self) -> Iterable[str]:
        return (pair.replace(" ", "", 1) for pair in self._merges)

    def _words(self, text: str) -> list[str]:
        lines = [text] if self._cut else _LINE.findall(text)
        return [word for line in lines for word in super(MergesEncoder, self)._words(line)]

    def _encode_word(self, word: str) -> list[int]:
        is_lines = not word.strip("\n") and word in self.vocab.ids
        return [self.vocab.ids[word]] if is_lines else super()._encode_word(word)


def _byte_value(token: str) -> int:
    match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    if match is None:
        raise FormatError(
            f"tokenizer.ggml.tokens: {token!r} has the type of a byte, but is not spelled <0x00> to <0xFF>"
        )
    return int(match[1], 16)
