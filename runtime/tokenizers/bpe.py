"""Byte-level BPE (`tokenizer.ggml.model` = "gpt2"): the bytes of a word are joined, pair by pair, by a list of merges.

A character stands for each byte. The `tokenizers` package, which has the Unicode tables, cuts a text into words and
spells them in these characters. Merging is done here: the package takes ten times as long to set up as these two
dicts, and refuses vocabularies that lack the result of a merge.
Reference: Radford et al., "Language models are unsupervised multitask learners", and its encoder.
"""

from collections.abc import Callable, Mapping
from typing import Any

from gguf_run.formats.errors import FormatError
from gguf_run.runtime.tokenizers.merge import BYTE_CHARACTERS, WordIds, by_merges, merge
from gguf_run.runtime.tokenizers.pretokenizers import pre_tokenizer
from gguf_run.runtime.tokenizers.vocab import NORMAL, STEPS, Defaults, read_bool, read_string, read_strings, read_vocab


class BpeEncoder:
    """Encodes text between special tokens, see tokenizer.Encoder."""

    prefix = ""
    drops_first_space = False

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        """FormatError if the vocabulary or the merges are missing or malformed."""
        name = read_string(metadata, "pre")
        # A file of Kimi's without merges means, as tiktoken does, that the token with the smallest id is joined first.
        by_ids = name == "kimi-k2" and "tokenizer.ggml.merges" not in metadata
        merges = [] if by_ids else read_strings(metadata, "merges")
        pre = pre_tokenizer(name, merges)
        self.vocab = read_vocab(metadata, Defaults(add_bos=pre.add_bos))
        if "\n".join(merges).count(" ") != len(merges):
            for i, pair in enumerate(merges):
                if pair.count(" ") != 1:
                    raise FormatError(f'tokenizer.ggml.merges: entry {i} is {pair[:40]!r}, not "left right"')
        self._whole_words = read_bool(metadata, "ignore_merges", pre.whole_words)
        self._rank = self._rank_by_id if by_ids else by_merges(merges)
        self._words = pre.build()
        self._cut: Callable[[str], list[str]] | None = None
        self.normalize: Callable[[str], str] | None = None
        if any(f"tokenizer.ggml.{key}" in metadata for key in STEPS):
            from gguf_run.runtime.tokenizers.steps import read_cutter, read_normalizer

            self.normalize = read_normalizer(metadata)
            self._cut = read_cutter(metadata)
        self._word_ids = WordIds(self._encode_word)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in self._cut(text) if self._cut else [word for word, _ in self._words.pre_tokenize_str(text)]:
            ids += self._word_ids[word]
        return ids

    def piece(self, id: int) -> bytes:
        token = self.vocab.tokens[id]
        if self.vocab.types[id] != NORMAL:
            return b""
        try:
            return bytes([BYTE_CHARACTERS[character] for character in token])
        except KeyError:
            return token.encode()

    def _rank_by_id(self, left: str, right: str) -> float | None:
        id = self.vocab.ids.get(left + right)
        return id if id is not None and self.vocab.types[id] == NORMAL else None

    def _encode_word(self, word: str) -> list[int]:
        ids = self.vocab.ids
        if self._whole_words and word in ids:
            return [ids[word]]
        out: list[int] = []
        # Bytes that the vocabulary lacks (some lack control characters) are dropped before the merges, as in the
        # tokenizers package; llama.cpp drops them after the merges.
        for symbol in merge([character for character in word if character in ids], self._rank):
            if symbol in ids:
                out.append(ids[symbol])
            else:
                # As in llama.cpp: of a symbol that the vocabulary lacks, the ASCII characters that it has are kept.
                out += [ids[character] for character in symbol if character.isascii() and character in ids]
        return out
