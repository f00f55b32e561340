"""Unigram (`tokenizer.ggml.model` = "t5"): of all ways to cut a text into tokens, the most probable one.

The tokenizers package finds it. Here a text is prepared for it as SentencePiece does: spaces are joined, and "▁" is put
before words.
Reference: Kudo, "Subword regularization" (2018).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers.models import Unigram

from gguf_run.formats.errors import FormatError
from gguf_run.runtime.tokenizers.special import WHITE_SPACE
from gguf_run.runtime.tokenizers.spm import SPACE, SpmPieces
from gguf_run.runtime.tokenizers.steps import read_cutter, read_normalizer
from gguf_run.runtime.tokenizers.vocab import BYTE, NORMAL, USER_DEFINED, Defaults, read_bool, read_numbers

DEFAULTS = Defaults(add_eos=True, eos=1, unknown=2)

_MAX_CHARS = 1024  # of a token: the tokenizers package crashes if one is very long
_SPACES = re.compile(f"[{WHITE_SPACE}]+")
_WORDS = re.compile(f"{SPACE}[^{SPACE}]*|[^{SPACE}]+")


class UgmEncoder(SpmPieces):
    """Encodes text between special tokens, see tokenizer.Encoder."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        """FormatError if the vocabulary, the scores or the table of characters are missing or damaged."""
        super().__init__(metadata, DEFAULTS)
        tokens = self.vocab.tokens
        scores = read_numbers(metadata, "scores", len(tokens))
        if scores is None or not np.isfinite(scores).all():
            raise FormatError("tokenizer.ggml.scores must have a finite number for each token, convert the model again")
        if (longest := max(map(len, tokens))) > _MAX_CHARS:
            raise FormatError(f"tokenizer.ggml.tokens: one has {longest} characters: at most {_MAX_CHARS} are allowed")
        types = np.frombuffer(self.vocab.types, np.uint8)
        in_texts = np.isin(types, (NORMAL, BYTE, USER_DEFINED))
        least = float(scores[np.isin(types, (NORMAL, BYTE))].min(initial=0.0))
        scores = np.where(types == USER_DEFINED, 0.0, np.where(in_texts, scores.astype(np.float64), least))
        # Names with U+FFFF hide control tokens: encode removes this character from texts.
        names = [token if ok else f"\uffff{id}" for id, (token, ok) in enumerate(zip(tokens, in_texts, strict=True))]
        pairs = list(zip(names, scores.tolist(), strict=True))
        self._model = Unigram(pairs, self.vocab.needed_unknown(), bool((types == BYTE).any()))
        self.normalize = read_normalizer(metadata)
        self._cut = read_cutter(metadata)
        self._joins_spaces = read_bool(metadata, "remove_extra_whitespaces", True)
        self._adds_space = read_bool(metadata, "add_space_prefix", True)
        self._escapes_spaces = read_bool(metadata, "escape_whitespaces", True)
        self._by_word = metadata.get("tokenizer.ggml.metaspace") is not None

    def encode(self, text: str) -> list[int]:
        text = text.replace("\uffff", "\ufffd")
        if self._joins_spaces:
            words = _SPACES.split(text) if self._by_word else text.split(" ")
            text = "".join(f" {word}" for word in words if word)
        elif self._adds_space and text and not (self._by_word and text.startswith((" ", SPACE))):
            text = f" {text}"
        text = text.replace(" ", SPACE) if self._escapes_spaces else text
        parts = _WORDS.findall(text) if self._by_word else [text]
        if self._cut:
            parts = [word for part in parts for word in self._cut(part)]
        return [token.id for part in parts for token in self._model.tokenize(part)]
