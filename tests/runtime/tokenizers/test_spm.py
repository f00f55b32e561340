"""SentencePiece BPE against a slow, literal version of it."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinyvocab import BYTE, CONTROL, NORMAL, USER_DEFINED, slow_merge, spm_metadata

from gguf_run.formats.errors import FormatError
from gguf_run.runtime.tokenizers import spm as tokenizer_spm
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

ALPHABET = "ab▁>é"
TEXTS = st.text("ab >éx\n", max_size=40)
# Few different scores, so that ties are common.
SCORES = st.dictionaries(
    st.text(ALPHABET, min_size=1, max_size=5), st.sampled_from([0.0, -1.0, -2.0, -2.5]), min_size=1, max_size=40
)


def encode(metadata: dict[str, Any], text: str, **options: bool) -> list[int]:
    return Tokenizer.from_metadata(metadata).encode(text, add_special=False, **options)


def slow_encode(scores: dict[str, float], text: str) -> list[str]:
    def cost(left: str, right: str) -> float | None:
        score = scores.get(left + right)
        return None if score is None else -score

    symbols = slow_merge(list(text.replace(" ", "▁")), cost)
    return [part for s in symbols for part in ([s] if s in scores else [f"<0x{b:02X}>" for b in s.encode()])]


@pytest.mark.parametrize("few_chars", [0, 10**9])
@given(scores=SCORES, text=TEXTS)
@settings(max_examples=300)
def test_as_the_slow_way(few_chars: int, scores: dict[str, float], text: str) -> None:
    """Whole texts and texts cut into words must give the same, also where tokens hold a space inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_spm, "FEW_CHARS", few_chars)
        metadata = spm_metadata(scores, add_space_prefix=False)
        tokens = metadata["tokenizer.ggml.tokens"]
        assert [tokens[id] for id in encode(metadata, text)] == slow_encode(scores, text)


PAIRS = st.tuples(*[st.text(ALPHABET + "\n", min_size=1, max_size=3)] * 2)


@pytest.mark.parametrize("few_chars", [0, 10**9])
@given(pairs=st.lists(PAIRS, min_size=1, max_size=30), text=TEXTS)
@settings(max_examples=300)
def test_merges_as_the_slow_way(few_chars: int, pairs: list[tuple[str, str]], text: str) -> None:
    """Line by line. Line ends in a row are one token if there is such a one, whatever the merges say."""
    merges = list(dict.fromkeys(map(" ".join, pairs)))
    vocab = dict.fromkeys([*ALPHABET, "\n\n", *(left + right for left, right in pairs)], 0.0)
    metadata = spm_metadata(vocab, model="gemma4", merges=merges)
    tokens = metadata["tokenizer.ggml.tokens"]
    expected = []
    for line in re.findall(r"\n+|[^\n]+", text.replace(" ", "▁")):
        rank = {merge: i for i, merge in enumerate(merges)}
        whole = line in vocab and not line.strip("\n")
        symbols = [line] if whole else slow_merge(list(line), lambda a, b, rank=rank: rank.get(f"{a} {b}"))
        expected += [part for s in symbols for part in ([s] if s in vocab else [f"<0x{b:02X}>" for b in s.encode()])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_spm, "FEW_CHARS", few_chars)
        assert [tokens[id] for id in encode(metadata, text)] == expected
    assert Tokenizer.from_metadata(metadata).decode(encode(metadata, text)) == text


def test_words_are_looked_up_again() -> None:
    scores = {"ab": -1.0, "▁ab": -2.0, "a▁b": -0.5, "\0▁": -0.1}
    text = "ab ab aa bb\0 a b é" * 600
    tokenizer = Tokenizer.from_metadata(spm_metadata(scores, add_space_prefix=False))
    once, again = (tokenizer.encode(text, add_special=False) for _ in range(2))
    assert once == again
    assert [tokenizer._vocab.tokens[id] for id in once] == slow_encode(scores, "ab ab aa bb\0 a b é") * 600


def test_ties_go_to_the_left() -> None:
    scores = {"a": 0.0, "aa": -1.0, "aaa": -1.0}
    metadata = spm_metadata(scores, add_space_prefix=False)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert [tokens[id] for id in encode(metadata, "aaaaa")] == ["aaa", "aa"]


@pytest.mark.parametrize(
    ("text", "parse_special", "expected"),
    [
        ("a", True, ["▁a"]),
        (" a", True, ["▁", "▁a"]),
        ("<x>a<x>", True, ["<x>", "▁a", "<x>"]),
        ("a<u>a", True, ["▁a", "<u>", "▁a"]),
        ("a<u>a", False, ["▁a", "<u>", "▁a"]),
        ("<x>", False, ["▁", "<0x3C>", "<0x78>", "<0x3E>"]),
        ("", True, []),
    ],
)
def test_space_prefix_follows_special_tokens(text: str, parse_special: bool, expected: list[str]) -> None:
    metadata = spm_metadata({"▁": -3.0, "a": -2.0, "▁a": -1.0}, {"<x>": CONTROL, "<u>": USER_DEFINED})
    tokens = metadata["tokenizer.ggml.tokens"]
    assert [tokens[id] for id in encode(metadata, text, parse_special=parse_special)] == expected


@pytest.mark.parametrize(
    ("text", "more", "expected"),
    [
        ("  a   a ", {"remove_extra_whitespaces": True}, "▁a ▁a"),
        ("   ", {"remove_extra_whitespaces": True}, ""),
        ("a a", {"treat_whitespace_as_suffix": True}, "a ▁a ▁"),
        ("a a", {"treat_whitespace_as_suffix": True, "add_space_prefix": False}, "a ▁a"),
        ("a▁a", {"escape_whitespaces": False, "add_space_prefix": False}, "a ▁a"),
        ("a a", {"escape_whitespaces": False, "add_space_prefix": False}, "a <0x20> a"),
        ("ａ", {"normalizer.nfkc": True}, "▁a"),
        ("A", {"normalizer.json": '[{"type": "Lowercase"}]'}, "▁a"),
        ("aa", {"pre_tokenizer.json": '[{"type": "Split", "pattern": {"String": "a"}, "behavior": "Isolated", '
                                      '"invert": false}]'}, "▁ a a"),
    ],
)  # fmt: skip
def test_options_of_spaces_and_steps(text: str, more: dict[str, Any], expected: str) -> None:
    metadata = spm_metadata({"a": -2.0, "▁a": -1.0, "a▁": -1.0, "▁": -3.0, "aa": -0.5} if "aa" in text else
                            {"a": -2.0, "▁a": -1.0, "a▁": -1.5, "▁": -3.0}, **more)  # fmt: skip
    tokens = metadata["tokenizer.ggml.tokens"]
    assert " ".join(tokens[id] for id in encode(metadata, text)) == expected


def test_what_is_behind_a_text_is_kept_when_decoding() -> None:
    metadata = spm_metadata({"a": -2.0, "a▁": -1.0, "▁": -3.0}, treat_whitespace_as_suffix=True)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.decode(tokenizer.encode(" a", add_special=False)) == " a "


def test_without_byte_tokens_text_is_unknown() -> None:
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "a"],
        "tokenizer.ggml.scores": [0, -1],
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert encode(metadata, "aé") == [1, 0, 0]
    metadata["tokenizer.ggml.unknown_token_id"] = -1
    with pytest.raises(FormatError, match="has no token for 'é', its bytes, or unknown text"):
        encode(metadata, "aé")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "tokenizer.ggml.scores is missing"),
        ({"scores": [0.0] * 5}, "tokenizer.ggml.scores has 5 entries for 260 tokens"),
        ({"scores": [0.0] * 259 + [float("nan")]}, "tokenizer.ggml.scores: entry 259 is not a number"),
        ({"scores": ["x"] * 260}, "tokenizer.ggml.scores is no array of numbers"),
        ({"add_space_prefix": "no"}, "add_space_prefix must be true or false, but is str 'no'"),
    ],
)
def test_bad_metadata(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Tokenizer.from_metadata(
            spm_metadata({"a": -1.0}) | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        )


def test_a_byte_token_must_be_spelled_as_one() -> None:
    tokenizer = Tokenizer.from_metadata(spm_metadata({"a": -1.0}, {"<0xZZ>": BYTE, "b": NORMAL}))
    with pytest.raises(FormatError, match="'<0xZZ>' has the type of a byte"):
        tokenizer.decode([260])
    assert tokenizer.decode([3 + 0xE2, 3 + 0x82, 3 + 0xAC]) == "€"


def test_integer_scores() -> None:
    metadata = spm_metadata({"a": -1.0, "b": 0.0, "ab": -2.0}, add_space_prefix=False)
    metadata["tokenizer.ggml.scores"] = metadata["tokenizer.ggml.scores"].astype(np.int32)
    assert encode(metadata, "ab") == [261]
