"""Unigram and WordPiece at run time: what decoding gives, and damaged metadata."""

import random
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from tinyvocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

from gguf_run.formats.errors import FormatError
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

G = "tokenizer.ggml."


def unigram(**more: Any) -> dict[str, Any]:
    tokens = {
        "<pad>": (CONTROL, 0), "</s>": (CONTROL, 0), "<unk>": (UNKNOWN, 0), "▁a": (NORMAL, -1), "b": (NORMAL, -2),
        "▁": (NORMAL, -3), "ab": (NORMAL, -2), "a": (NORMAL, -3), "<x>": (USER_DEFINED, 0), "[PAD9]": (UNUSED, 0),
    }  # fmt: skip
    keys = {
        "model": "t5",
        "tokens": list(tokens),
        "token_type": np.array([type for type, _ in tokens.values()], np.int32),
        "scores": np.array([score for _, score in tokens.values()], np.float32),
    }
    return {G + key: value for key, value in (keys | more).items()}


def wordpiece(**more: Any) -> dict[str, Any]:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁hello", "▁wor", "ld", "▁!", "▁é"]
    keys = {"model": "bert", "tokens": tokens, "token_type": [3, 3, 3, 3, 1, 1, 1, 1, 1], "bos_token_id": 2,
            "eos_token_id": 3, "unknown_token_id": 1}  # fmt: skip
    return {G + key: value for key, value in (keys | more).items()}


def names(metadata: dict[str, Any], text: str, **options: bool) -> str:
    tokens = metadata[f"{G}tokens"]
    return " ".join(tokens[id] for id in Tokenizer.from_metadata(metadata).encode(text, **options))


@pytest.mark.parametrize(
    ("text", "more", "expected"),
    [
        ("ab", {}, "▁a b </s>"),
        (" a  b ", {}, "▁a ▁ b </s>"),
        (" a  b ", {"remove_extra_whitespaces": False}, "▁ ▁a ▁ ▁ b ▁ </s>"),
        ("a", {"remove_extra_whitespaces": False, "add_space_prefix": False}, "a </s>"),
        (" a", {"remove_extra_whitespaces": False, "metaspace": "always"}, "▁a </s>"),
        ("a??b", {}, "▁a <unk> b </s>"),
        ("a<x>a", {}, "▁a <x> ▁a </s>"),
        ("a</s>", {"add_eos_token": False}, "▁a </s>"),
        ("", {}, "</s>"),
    ],
)
def test_unigram(text: str, more: dict[str, Any], expected: str) -> None:
    assert names(unigram(**more), text) == expected


def test_text_never_becomes_a_control_token() -> None:
    metadata = unigram(add_eos_token=False)
    assert names(metadata, "</s>\uffff1 [PAD9]", parse_special=False) == "▁ <unk> ▁ <unk>"


def test_wordpiece() -> None:
    assert names(wordpiece(), "Hello world!") == "[CLS] ▁hello ▁wor ld ▁! [SEP]"
    assert names(wordpiece(), "words é" + " " + "ld" * 60) == "[CLS] [UNK] [UNK] [UNK] [SEP]"  # é loses its accent
    assert names({**wordpiece(), f"{G}normalizer.strip_accents": False}, "é") == "[CLS] ▁é [SEP]"
    assert names({**wordpiece(), f"{G}normalizer.lowercase": False}, "Hello") == "[CLS] [UNK] [SEP]"


def test_decode() -> None:
    for metadata, text in ((unigram(), "ab a"), (wordpiece(), "hello world !")):
        tokenizer = Tokenizer.from_metadata(metadata)
        assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == text


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (unigram(scores=None), "tokenizer.ggml.scores must have a finite number"),
        (unigram(scores=[0.0] * 9 + [float("inf")]), "tokenizer.ggml.scores must have a finite number"),
        (unigram(unknown_token_id=-1), "unknown_token_id is missing"),
        (unigram(tokens=["a" * 2000, *map(str, range(9))]), "tokens: one has 2000 characters: at most 1024"),
        (unigram(precompiled_charsmap="x"), "precompiled_charsmap must be an array of bytes"),
        (unigram(precompiled_charsmap=np.zeros(3, np.uint8)), "precompiled_charsmap is damaged: it says 0 bytes"),
        (unigram(metaspace=3, model="llama"), "tokenizer.ggml.metaspace is '3'"),
        (wordpiece(unknown_token_id=-1), "unknown_token_id is missing"),
    ],
)
def test_bad_metadata(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Tokenizer.from_metadata(metadata)


def charsmap() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A table that makes "a" of "Q": from unit 0 (base 256) by Q (81) to unit 256 ^ 81, from there to unit 512."""
    units = np.zeros(768, "<u4")
    units[0] = 256 << 10
    at = 256 ^ ord("Q")
    units[at] = (512 ^ at) << 10 | 256 | ord("Q")
    units[512] = 1 << 31 | 2
    data = len(units.tobytes()).to_bytes(4, "little") + units.tobytes() + b"?\0a\0"
    return np.frombuffer(data, np.uint8)


def test_a_space_that_is_not_escaped() -> None:
    more = {"remove_extra_whitespaces": False, "escape_whitespaces": False, "add_eos_token": False}
    assert names(unigram(**more), "a▁a") == "<unk> a ▁a"


def test_table_of_characters() -> None:
    assert names(unigram(precompiled_charsmap=charsmap()), "Qb Q") == "▁a b ▁a </s>"


def test_a_damaged_table_of_characters() -> None:
    """Whatever is wrong in it, it is refused, or encoding works: the library would end the program."""
    chance = random.Random(0)
    whole = charsmap()
    used = [i for i in range(len(whole)) if whole[i]]
    for _ in range(400):
        damaged = whole.copy()
        for _ in range(chance.randint(1, 3)):
            damaged[chance.choice((chance.choice(used), chance.randrange(len(whole))))] = chance.randrange(256)
        with suppress(FormatError):
            tokenizer = Tokenizer.from_metadata(unigram(precompiled_charsmap=damaged))
            tokenizer.encode("".join(map(chr, range(1, 200))) + "QQ Qé\u3000")


def test_a_table_whose_first_unit_holds_a_text() -> None:
    """Each search reads the base of the first unit, even if that holds the place of a text."""
    damaged = charsmap().copy()
    damaged[7] |= 0x80
    with pytest.raises(FormatError, match="a unit leads out of the table of 768"):
        Tokenizer.from_metadata(unigram(precompiled_charsmap=damaged))


def test_bytes_of_unknown_characters() -> None:
    metadata = unigram()
    tokens = metadata[f"{G}tokens"] + [f"<0x{byte:02X}>" for byte in range(256)]
    metadata |= {
        f"{G}tokens": tokens,
        f"{G}token_type": np.append(metadata[f"{G}token_type"], [BYTE] * 256).astype(np.int32),
        f"{G}scores": np.append(metadata[f"{G}scores"], [-9.0] * 256).astype(np.float32),
    }
    assert names(metadata, "aé") == "▁a <0xC3> <0xA9> </s>"
