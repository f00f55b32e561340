"""SentencePiece BPE (`tokenizer.ggml.model` = "llama"): the adjacent pair that makes the token of the best score is
joined; of equal scores the leftmost, as in llama.cpp.

Reference: Kudo and Richardson, "SentencePiece".
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gguf_run.formats.errors import FormatError
from gguf_run.runtime.tokenizers.merge import WordIds, merge
from gguf_run.runtime.tokenizers.vocab import BYTE, NORMAL, STEPS, Defaults, read_bool, read_numbers, read_vocab

DEFAULTS = Defaults(add_bos=True, bos=1, eos=2, unknown=0)

_SPACE = "▁"  # how a space is spelled in tokens

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
            return token.replace(_SPACE, " ").encode()
        if type == BYTE:
            return bytes([_byte_value(token)])
        return b""


class SpmEncoder(SpmPieces):
    """Encodes text between special tokens, see tokenizer.Encoder."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        """FormatError if the vocabulary is damaged, or scores are missing, of a wrong number, or not numbers."""
        super().__init__(metadata, DEFAULTS)
        scores = read_numbers(metadata, "scores", len(self.vocab.tokens))
        if scores is None:
            raise FormatError(
                "tokenizer.ggml.scores is missing: this kind of tokenizer needs it, convert the model again"
            )
        if np.isnan(scores).any():
            raise FormatError(f"tokenizer.ggml.scores: entry {int(np.isnan(scores).argmax())} is not a number")
        self.drops_first_space = read_bool(metadata, "add_space_prefix", True)
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
        self._costs: list[float] = (-scores.astype(np.float64)).tolist()
        self._word_ids = WordIds(self._encode_word)
        self._n_encoded = 0

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        text = text.replace(" ", _SPACE) if self._escapes_spaces else text
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
        joined = "\0".join(self.vocab.tokens)
        inner = {before[-1] for before in joined.split(_SPACE)[:-1] if before}
        if joined.count("\0") < len(self.vocab.tokens):
            inner.discard("\0")  # no token holds it: it only stands between tokens here
        goes_on = f"(?:(?<=[{re.escape(''.join(sorted(inner)))}]){_SPACE}+[^{_SPACE}]*)*" if inner else ""
        return re.compile(f"{_SPACE}*[^{_SPACE}]+{goes_on}|{_SPACE}+")

    def _encode_word(self, word: str) -> list[int]:
        ids, costs = self.vocab.ids, self._costs

        def rank(left: str, right: str) -> float | None:
            id = ids.get(left + right)
            return None if id is None else costs[id]

        out: list[int] = []
        for symbol in merge(list(word), rank):
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


def _byte_value(token: str) -> int:
    match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    if match is None:
        raise FormatError(
            f"tokenizer.ggml.tokens: {token!r} has the type of a byte, but is not spelled <0x00> to <0xFF>"
        )
    return int(match[1], 16)
