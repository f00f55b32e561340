"""WordPiece (`tokenizer.ggml.model` = "bert"): a word is cut into tokens from the left, the longest first.

A word of which a part is no token is unknown. In the vocabulary, tokens that begin a word have "▁" before them. The
tokenizers package cuts a text into words, as BERT does if the metadata does not say otherwise.
Reference: Schuster and Nakajima, "Japanese and Korean voice search" (2012).
"""

from collections.abc import Mapping
from typing import Any

from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from gguf_run.runtime.tokenizers.spm import SPACE, SpmPieces
from gguf_run.runtime.tokenizers.steps import read_cutter, read_normalizer, words_by
from gguf_run.runtime.tokenizers.vocab import Defaults, read_bool

DEFAULTS = Defaults(add_bos=True, add_eos=True, bos=101, unknown=100, eos=102)

_MAX_CHARS = 100  # longer words are unknown, as in BERT


class WpmEncoder(SpmPieces):
    """Encodes text between special tokens, see tokenizer.Encoder."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        """FormatError if the vocabulary is damaged, or there is no token for unknown words."""
        super().__init__(metadata, DEFAULTS)
        self._unknown = self.vocab.needed_unknown()
        lowercase = read_bool(metadata, "normalizer.lowercase", True)
        accents = read_bool(metadata, "normalizer.strip_accents", lowercase)
        self.normalize = read_normalizer(metadata, [BertNormalizer(lowercase=lowercase, strip_accents=accents)])
        self._cut = read_cutter(metadata) or words_by(BertPreTokenizer())
        self._longest = max(map(len, self.vocab.tokens))

    def encode(self, text: str) -> list[int]:
        return [id for word in self._cut(text) for id in self._encode_word(word)]

    def _encode_word(self, word: str) -> list[int]:
        if len(word) > _MAX_CHARS:
            return [self._unknown]
        ids: list[int] = []
        rest = SPACE + word
        while rest:
            lengths = range(min(len(rest), self._longest), 0, -1)
            part = next((rest[:n] for n in lengths if rest[:n] in self.vocab.ids), None)
            if part is None:
                return [self._unknown]
            ids.append(self.vocab.ids[part])
            rest = rest.removeprefix(part)
        return ids
