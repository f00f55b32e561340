"""Byte-level BPE (`tokenizer.ggml.model` = "gpt2"): words, each spelled in 256 stand-ins for bytes, merged by a list.

The `tokenizers` package cuts a text into words and spells them: it has the Unicode tables. Merging is done here, since
its BPE takes ten times as long to set up as these two dicts, and refuses vocabularies that lack a merge's result.
Reference: Radford et al., "Language models are unsupervised multitask learners", and its encoder.py.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers.normalizers import NFC

from gguf_run.formats.errors import FormatError
from gguf_run.runtime.tokenizers.merge import CACHED_CHARS, CACHED_WORDS, merge
from gguf_run.runtime.tokenizers.pretokenizers import PreTokenizer
from gguf_run.runtime.tokenizers.vocab import NORMAL, Vocab, read_bool, read_strings


def _byte_characters() -> dict[str, int]:
    """Bytes that print stand for themselves; the others, in order, for the characters from U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_CHARACTERS = _byte_characters()


class BpeEncoder:
    """Encodes text between special tokens."""

    prefix = ""
    drops_first_space = False

    def __init__(self, vocab: Vocab, metadata: Mapping[str, Any], pre: PreTokenizer) -> None:
        """FormatError if the merges are missing or malformed."""
        merges = read_strings(metadata, "merges")
        if "\n".join(merges).count(" ") != len(merges):
            for i, pair in enumerate(merges):
                if pair.count(" ") != 1:
                    raise FormatError(f'tokenizer.ggml.merges: entry {i} is {pair[:40]!r}, not "left right"')
        # From the end, so that of equal entries the first one stays.
        self._ranks = {merges[i]: i for i in range(len(merges) - 1, -1, -1)}
        self._vocab = vocab
        self._whole_words = pre.whole_words
        self._words = pre.build()
        self._composes = read_bool(metadata, "normalizer.nfc", False)
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens."""
        ids: list[int] = []
        if self._composes and not text.isascii():
            text = NFC().normalize_str(text)
        for word, _ in self._words.pre_tokenize_str(text):
            found = self._cache.get(word)
            if found is None:
                found = self._encode_word(word)
                if len(word) <= CACHED_CHARS and len(self._cache) < CACHED_WORDS:
                    self._cache[word] = found
            ids += found
        return ids

    def piece(self, id: int) -> bytes:
        """Return the bytes that a token which is not special stands for."""
        token = self._vocab.tokens[id]
        if self._vocab.types[id] != NORMAL:
            return b""
        try:
            return bytes([BYTE_CHARACTERS[character] for character in token])
        except KeyError:
            return token.encode()

    def _rank(self, left: str, right: str) -> float | None:
        return self._ranks.get(f"{left} {right}")

    def _encode_word(self, word: str) -> list[int]:
        ids = self._vocab.ids
        if self._whole_words and word in ids:
            return [ids[word]]
        out: list[int] = []
        # Bytes that a vocabulary lacks (control characters, of some) are lost before their neighbours are joined, as in
        # the tokenizers package; llama.cpp loses them behind that.
        for symbol in merge([character for character in word if character in ids], self._rank):
            if symbol in ids:
                out.append(ids[symbol])
            else:
                # As llama.cpp does: what a vocabulary lacks is spelled in ASCII as far as it goes, and else lost.
                out += [ids[character] for character in symbol if character.isascii() and character in ids]
        return out
