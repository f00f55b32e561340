"""SentencePiece's tokenizer.model, alone and beside a tokenizer.json: the ids that its library gives."""

import json
import warnings
from pathlib import Path
from typing import Any

import hftokenizers
import pytest
from hftokenizers import texts
from spmfile import PIECES, message, pieces_file
from tinyvocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

from gguf_run.runtime.convert.vocabulary.metadata import tokenizer_metadata
from gguf_run.runtime.convert.vocabulary.vocabulary import ConversionWarning
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

G = "tokenizer.ggml."
pytestmark = pytest.mark.filterwarnings("ignore::gguf_run.runtime.tokenizers.tokenizer.TwoBosWarning")


def test_sentencepiece(tmp_path: Path) -> None:
    normalizer = message((3, 0), (4, 0))
    data = pieces_file(PIECES, message((3, 2), (40, 0), (41, 1), (42, 2), (43, (1 << 64) - 1)), normalizer)
    (tmp_path / "tokenizer.model").write_bytes(data)
    (tmp_path / "added_tokens.json").write_text('{"<tool>": 8}')
    config = {"added_tokens_decoder": {"9": {"content": "<|x|>"}, "8": {"content": "<tool▁2>"}}, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    metadata = tokenizer_metadata(tmp_path, {"vocab_size": 11})
    assert metadata[f"{G}model"] == "llama"
    assert metadata[f"{G}tokens"] == [*PIECES, "<tool 2>", "<|x|>", "[PAD10]"]
    assert metadata[f"{G}token_type"].tolist() == [
        UNKNOWN, CONTROL, CONTROL, BYTE, NORMAL, NORMAL, USER_DEFINED, UNUSED, USER_DEFINED, CONTROL, UNUSED
    ]  # fmt: skip
    assert metadata[f"{G}scores"].tolist() == [0, 0, 0, 0, -1.5, -2, 0, -3, -1000, -1000, -10000]
    assert [metadata[f"{G}{role}_token_id"] for role in ("bos", "eos", "unknown")] == [1, 2, 0]
    assert f"{G}padding_token_id" not in metadata
    assert (metadata[f"{G}add_bos_token"], metadata[f"{G}add_space_prefix"]) == (True, False)


def test_added_tokens_without_a_row_of_the_embeddings_are_said(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(pieces_file(PIECES, message((3, 2), (40, 0)), message((4, 0))))
    (tmp_path / "added_tokens.json").write_text('{"<tool>": 8, "<far>": 9}')
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"10": {"content": "<x>"}}}')
    with pytest.warns(ConversionWarning, match="2 tokens such as '<far>' are left out: .* vocab_size 9"):
        metadata = tokenizer_metadata(tmp_path, {"vocab_size": 9})
    assert metadata[f"{G}tokens"] == [*PIECES, "<tool>"]
    metadata = tokenizer_metadata(tmp_path, {})  # no size: all are kept
    assert metadata[f"{G}tokens"] == [*PIECES, "<tool>", "<far>", "<x>"]
    assert metadata[f"{G}token_type"].tolist()[8:] == [USER_DEFINED] * 3


def test_sentencepiece_unigram(tmp_path: Path) -> None:
    data = pieces_file(PIECES, message((3, 1)), message((2, b"\0\1\2"), (4, 0)))
    (tmp_path / "spiece.model").write_bytes(data)
    metadata = tokenizer_metadata(tmp_path, {})
    assert metadata[f"{G}model"] == "t5"
    assert metadata[f"{G}precompiled_charsmap"].tolist() == [0, 1, 2]
    assert (metadata[f"{G}remove_extra_whitespaces"], metadata[f"{G}add_space_prefix"]) == (False, True)


def test_sentencepiece_gives_scores_to_a_tokenizer_json(tmp_path: Path) -> None:
    """Its own ids and scores; what tokenizer.json knows of prefixes and special tokens."""
    original = hftokenizers.write(tmp_path, "mistral-0.3")
    ranks = json.loads(hftokenizers.trained("mistral-0.3"))["model"]["merges"]
    scores: dict[str, float] = {}
    for i, (left, right) in enumerate(ranks):
        scores.setdefault(left + right, -float(i))
    by_id = sorted(original.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    tokens = {
        token: (scores.get(token, -9999.0), 2 if id == 0 else 3 if id < 3 else 6 if id < 259 else 1)
        for token, id in by_id
    }
    (tmp_path / "tokenizer.model").write_bytes(pieces_file(tokens, message((3, 2)), b""))
    metadata = tokenizer_metadata(tmp_path, {"vocab_size": original.get_vocab_size()})
    assert metadata[f"{G}metaspace"] == "first"
    converted = Tokenizer.from_metadata(metadata)
    for text in texts(100, seed=9, special=("<tool>", "<s>")):
        assert converted.encode(text) == original.encode(text).ids, text


def sentencepiece_metadata(directory: Path) -> dict[str, Any]:
    """The metadata; a warning says that llama.cpp does not do all that these models do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConversionWarning)
        return tokenizer_metadata(directory, {})


def test_what_only_tokenizer_json_knows(tmp_path: Path) -> None:
    """Tokens that are in no tokenizer.model: added ones, and ordinary ones. Scores follow from the merges then."""
    original = hftokenizers.write(tmp_path, "gemma")
    n = original.get_vocab_size()
    by_id = sorted(original.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    for n_known in (n - 1, n - 40):
        tokens = {token: (-float(id), 6 if 3 <= id < 259 else 3 if id < 3 else 1) for token, id in by_id[:n_known]}
        file = pieces_file(tokens, message((3, 2), (40, 0)), message((2, b"\0"), (4, 1)))
        (tmp_path / "tokenizer.model").write_bytes(file)
        metadata = tokenizer_metadata(tmp_path, {})
        assert metadata[f"{G}tokens"] == [original.id_to_token(id) for id in range(n)]
        assert f"{G}remove_extra_whitespaces" not in metadata  # tokenizer.json has no such step
        converted = Tokenizer.from_metadata(metadata)
        for text in texts(50, seed=9, special=("<tool>",)):
            assert converted.encode(text) == original.encode(text).ids, text


def test_with_the_sentencepiece_library(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join(" ".join(text.split()) for text in texts(800, seed=6)))
    for kind in ("bpe", "unigram"):
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=1800, model_type=kind,
            byte_fallback=kind == "bpe", character_coverage=0.98, minloglevel=2, normalization_rule_name="nmt_nfkc",
        )  # fmt: skip
        model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
        converted = Tokenizer.from_metadata(sentencepiece_metadata(tmp_path))
        for text in texts(200, seed=7):
            plain = text.replace("\0", "")
            assert converted.encode(plain, add_special=False, parse_special=False) == model.encode(plain), plain


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization_rule_name": "identity"},
        {"normalization_rule_name": "nfkc_cf", "remove_extra_whitespaces": False},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False},
        {"normalization_rule_name": "identity", "treat_whitespace_as_suffix": True},
        {"treat_whitespace_as_suffix": True, "remove_extra_whitespaces": False},
    ],
)
def test_options_of_sentencepiece(options: dict[str, Any], tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join(" ".join(text.split()) for text in texts(300, seed=6)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=1500, model_type="bpe",
        byte_fallback=True, character_coverage=0.98, minloglevel=2, **options,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    converted = Tokenizer.from_metadata(sentencepiece_metadata(tmp_path))
    for text in (*texts(100, seed=7), "ﬁ ＡＢＣ", "The   fox ", "  ", ""):
        plain = text.replace("\0", "")
        assert converted.encode(plain, add_special=False, parse_special=False) == model.encode(plain), plain
