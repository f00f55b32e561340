"""Unigram (`tokenizer.ggml.model` = "t5"): of all ways to cut a text into tokens, the most probable one.

The tokenizers package finds it. Here a text is prepared for it as SentencePiece does: characters are replaced by the
model's table, spaces are joined, and "▁" is put before words.
Reference: Kudo, "Subword regularization" (2018).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers.models import Unigram
from tokenizers.normalizers import NFC, NFKC, Normalizer, Precompiled, Sequence

from gguf_run.formats.errors import FormatError
from gguf_run.runtime.tokenizers.special import WHITE_SPACE
from gguf_run.runtime.tokenizers.spm import SpmPieces
from gguf_run.runtime.tokenizers.vocab import BYTE, NORMAL, USER_DEFINED, Defaults, read_bool, read_numbers

DEFAULTS = Defaults(add_eos=True, eos=1, unknown=2)

_SPACE = "▁"
_SPACES = re.compile(f"[{WHITE_SPACE}]+")
_WORDS = re.compile(f"{_SPACE}[^{_SPACE}]*|[^{_SPACE}]+")


class UgmEncoder(SpmPieces):
    """Encodes text between special tokens, see tokenizer.Encoder."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        """FormatError if the vocabulary, the scores or the table of characters are missing or damaged."""
        super().__init__(metadata, DEFAULTS)
        tokens = self.vocab.tokens
        scores = read_numbers(metadata, "scores", len(tokens))
        if scores is None or not np.isfinite(scores).all():
            raise FormatError("tokenizer.ggml.scores must have a finite number for each token, convert the model again")
        types = np.frombuffer(self.vocab.types, np.uint8)
        in_texts = np.isin(types, (NORMAL, BYTE, USER_DEFINED))
        least = float(scores[np.isin(types, (NORMAL, BYTE))].min(initial=0.0))
        scores = np.where(types == USER_DEFINED, 0.0, np.where(in_texts, scores.astype(np.float64), least))
        # Names with U+FFFF hide control tokens: encode removes this character from texts.
        names = [token if ok else f"\uffff{id}" for id, (token, ok) in enumerate(zip(tokens, in_texts, strict=True))]
        pairs = list(zip(names, scores.tolist(), strict=True))
        self._model = Unigram(pairs, self.vocab.needed_unknown(), bool((types == BYTE).any()))
        self._normalizer = _normalizer(metadata)
        self._joins_spaces = read_bool(metadata, "remove_extra_whitespaces", True)
        self._adds_space = read_bool(metadata, "add_space_prefix", True)
        self._by_word = metadata.get("tokenizer.ggml.metaspace") is not None

    def encode(self, text: str) -> list[int]:
        text = self._normalizer.normalize_str(text.replace("\uffff", "\ufffd"))
        if self._joins_spaces:
            words = _SPACES.split(text) if self._by_word else text.split(" ")
            text = "".join(_SPACE + word for word in words if word)
        else:
            text = text.replace(" ", _SPACE)
            if self._adds_space and text and not (self._by_word and text.startswith(_SPACE)):
                text = _SPACE + text
        parts = _WORDS.findall(text) if self._by_word else [text]
        return [token.id for part in parts for token in self._model.tokenize(part)]


def _normalizer(metadata: Mapping[str, Any]) -> Normalizer:
    """Return the replacements of characters: those of Unicode and those of the model's table."""
    steps: list[Normalizer] = [step() for name, step in (("nfc", NFC), ("nfkc", NFKC))
                               if read_bool(metadata, f"normalizer.{name}", False)]  # fmt: skip
    key = "tokenizer.ggml.precompiled_charsmap"
    value = metadata.get(key)
    if value is not None:
        data = np.asarray(value)
        if data.ndim != 1 or data.dtype.kind not in "iu" or data.dtype.itemsize != 1:
            raise FormatError(f"{key} must be an array of bytes")
        table = _checked(data.tobytes(), key)
        try:
            steps.append(Precompiled(table))
        except Exception as error:  # the package raises Exception itself
            raise FormatError(f"{key} is damaged: {error}") from None
    return Sequence(steps)


def _checked(data: bytes, key: str) -> bytes:
    """Check a table of replacements and return it: a u32 size, a trie of u32 units, then texts that end with NUL.

    Every unit must lead to another one inside of the trie.

        bit 31 = 1    the unit holds the place of a text (bits 0-30)
        bit 31 = 0    10-30 base | 9 base is multiplied by 256 | 8 a text ends here | 0-7 byte
    """
    size = int.from_bytes(data[:4], "little")
    if len(data) < 8 or size % 4 or not 0 < size < len(data) - 4 or data[-1]:
        raise FormatError(f"{key} is damaged: it says {size} bytes of table, and has {len(data)}")
    units = np.frombuffer(data, "<u4", size // 4, 4)
    is_inner = units >> 31 == 0
    is_inner[0] = True  # each search begins there and reads a base, whatever bit 31 says
    inner = np.flatnonzero(is_inner)
    base = (units[inner] >> 10).astype(np.int64) << ((units[inner] & 512) >> 6)
    if ((inner ^ base) | 255).max(initial=0) >= len(units):
        raise FormatError(f"{key} is damaged: a unit leads out of the table of {len(units)}")
    ends = (inner ^ base)[(units[inner] & 256) != 0]
    places = units[ends] & 0x7FFFFFFF
    texts = np.frombuffer(data, np.uint8, offset=4 + size)
    if places.max(initial=0) >= len(texts) or (texts[places] & 0xC0 == 0x80).any():
        raise FormatError(f"{key} is damaged: a replacement does not begin in the texts, or inside of a character")
    return data
