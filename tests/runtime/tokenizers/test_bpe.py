"""Byte-level BPE against a slow, literal version of it, and vocabularies with holes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinyvocab import bpe_metadata, slow_merge, spelled

from gguf_run.formats.errors import FormatError
from gguf_run.runtime.tokenizers.merge import CACHED_CHARS
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

PARTS = st.text("aéb", min_size=1, max_size=3).map(spelled)
MERGES = st.lists(st.tuples(PARTS, PARTS).map(" ".join), min_size=1, max_size=40)


@given(MERGES, st.text("aéb", min_size=1, max_size=30))
@settings(max_examples=300)
def test_as_the_slow_way(merges: list[str], word: str) -> None:
    metadata = bpe_metadata(merges)
    tokens = metadata["tokenizer.ggml.tokens"]

    def rank(left: str, right: str) -> float | None:
        pair = f"{left} {right}"
        return merges.index(pair) if pair in merges else None

    tokenizer = Tokenizer.from_metadata(metadata)
    assert [tokens[id] for id in tokenizer.encode(word)] == slow_merge(list(spelled(word)), rank)


def encode(text: str, merges: list[str], tokens: list[str] | None = None, pre: str = "gpt-2") -> list[str]:
    metadata = bpe_metadata(merges, pre=pre)
    if tokens is not None:
        metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * len(tokens)}
    tokens = metadata["tokenizer.ggml.tokens"]
    return [tokens[id] for id in Tokenizer.from_metadata(metadata).encode(text)]


def test_kimis_files_without_merges_join_the_smallest_id_first() -> None:
    with_merges = bpe_metadata(["b c", "a b", "a bc"], {"abca": 3}, pre="kimi-k2")
    without = {key: value for key, value in with_merges.items() if key != "tokenizer.ggml.merges"}
    for text in ("abc", "ab", "xabcbc", "abca"):  # the last would make a control token
        ids = Tokenizer.from_metadata(without).encode(text, parse_special=False)
        assert ids == Tokenizer.from_metadata(with_merges).encode(text, parse_special=False)
    with pytest.raises(FormatError, match="merges is missing"):
        Tokenizer.from_metadata(without | {"tokenizer.ggml.pre": "qwen2"})


def test_of_equal_merges_the_first_counts() -> None:
    assert encode("abc", ["a b", "b c", "a b"]) == ["ab", "c"]
    assert encode("abc", ["b c", "a b", "b c"]) == ["a", "bc"]


def test_a_whole_word_that_is_a_token() -> None:
    """llama-bpe takes it as it is; others only if merges lead there."""
    tokens = [*"abc", "abc", "bc"]
    assert encode("abc", ["b c"], tokens, pre="llama-bpe") == ["abc"]
    assert encode("abc", ["b c"], tokens) == ["a", "bc"]


def test_a_vocabulary_with_holes() -> None:
    """What merges make but the vocabulary lacks is spelled as far as it has ASCII; the rest is lost."""
    assert encode("abc", ["a b"], ["a", "b", "c"]) == ["a", "b", "c"]
    assert encode("abc d", ["a b", "ab c"], ["a", "c", "d"]) == ["a", "c", "d"]
    assert encode("é", ["a b"], ["a"]) == []


def test_long_words_are_not_kept() -> None:
    tokenizer = Tokenizer.from_metadata(bpe_metadata(["a a", "aa aa"]))
    word = "a" * (CACHED_CHARS + 1)
    assert tokenizer.encode(word) == tokenizer.encode(word)
    assert len(tokenizer.encode("a" * 100_000)) == 25_000
    assert tokenizer._encoder._word_ids == {}  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", [" a", "\n", "\0", "\u3000é", "😀"])
def test_bytes_round_trip(text: str) -> None:
    tokenizer = Tokenizer.from_metadata(bpe_metadata())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == len(text.encode())
