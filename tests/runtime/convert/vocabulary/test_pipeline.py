"""Steps of a tokenizer.json beyond the usual ones: each kind of tokenizer gives the ids of the original."""

import json
import warnings
from pathlib import Path
from typing import Any

import hftokenizers
import pytest
from hftokenizers import texts
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors

from gguf_run.formats.errors import FormatError
from gguf_run.runtime.convert.back.tokenizer import tokenizer_files
from gguf_run.runtime.convert.vocabulary.metadata import tokenizer_metadata
from gguf_run.runtime.convert.vocabulary.vocabulary import ConversionWarning
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer as Own

N, P = normalizers, pre_tokenizers
G = "tokenizer.ggml."
pytestmark = pytest.mark.filterwarnings("ignore::gguf_run.runtime.tokenizers.tokenizer.TwoBosWarning")


def converted(tokenizer: Tokenizer, directory: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the metadata and what is said."""
    tokenizer.save(str(directory / "tokenizer.json"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        metadata = tokenizer_metadata(directory, {})
    return metadata, [str(warning.message) for warning in said]


def check(tokenizer: Tokenizer, metadata: dict[str, Any], special: tuple[str, ...] = ()) -> None:
    own = Own.from_metadata(metadata)
    for text in (*texts(60, seed=4, special=special), "ﬁ ＡＢＣ", "(really)  2024"):
        assert own.encode(text) == tokenizer.encode(text).ids, text


# kind, steps before those that it has, pre-tokenizers before those that it has
STEPS: list[tuple[str, list[Any], list[Any]]] = [
    ("llama-2", [N.NFKC()], []),
    ("llama-2", [N.NFKC(), N.Lowercase()], []),
    ("llama-2", [N.Replace("(", "( ")], []),
    ("llama-2", [N.Strip()], []),
    ("llama-2", [N.NFD(), N.StripAccents()], []),
    ("llama-2", [], [P.Digits(individual_digits=True)]),
    ("llama-2", [], [P.Punctuation()]),
    ("llama-2", [], [P.Split(Regex("[aeiou]"), "isolated")]),
    ("gemma", [N.Replace(Regex("[0-9]"), "0")], [P.Digits(individual_digits=False)]),
    ("mistral-0.3", [N.Lowercase()], []),
    ("t5", [N.Lowercase()], []),
    ("t5", [N.NFKC(), N.StripAccents()], []),
    ("unigram-spaces", [N.Replace("a", "o")], []),
    ("gpt-2", [N.NFKC()], []),
    ("gpt-2", [N.NFC(), N.Lowercase()], []),
    ("gpt-2", [], [P.Split(Regex("[A-Z]"), "isolated")]),
    ("bert", [N.NFD(), N.StripAccents()], []),
]


@pytest.mark.parametrize(("kind", "before", "cuts"), STEPS)
def test_steps_are_done(kind: str, before: list[Any], cuts: list[Any], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(hftokenizers.trained(kind))
    if before:
        tokenizer.normalizer = N.Sequence([*before, *([tokenizer.normalizer] if tokenizer.normalizer else [])])
    if cuts:
        tokenizer.pre_tokenizer = P.Sequence([*cuts, *([tokenizer.pre_tokenizer] if tokenizer.pre_tokenizer else [])])
    metadata, _ = converted(tokenizer, tmp_path)
    check(tokenizer, metadata)
    own = Own.from_metadata(metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = Tokenizer.from_str(json.dumps(tokenizer_files(metadata)["tokenizer.json"]))
    for text in texts(30, seed=5):
        assert back.encode(text).ids == own.encode(text), text


def test_other_steps_in_place_of_berts(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(hftokenizers.trained("bert-cased"))
    for normalizer, cut in (
        (N.Sequence([N.NFD(), N.Lowercase(), N.StripAccents()]), P.Whitespace()),
        (N.BertNormalizer(lowercase=False, handle_chinese_chars=False), P.BertPreTokenizer()),
        (N.Sequence([]), P.WhitespaceSplit()),
    ):
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, cut
        metadata, said = converted(tokenizer, tmp_path)
        assert "is kept for gguf-run alone" in said[0]
        check(tokenizer, metadata)


@pytest.mark.parametrize("kind", ["gpt-2", "llama-2"])
def test_words_that_must_stand_alone(kind: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(hftokenizers.trained(kind))
    tokenizer.add_tokens([AddedToken("token", special=False, normalized=False, single_word=True)])
    metadata, said = converted(tokenizer, tmp_path)
    assert said == []
    assert metadata[f"{G}single_word_token_ids"] == [tokenizer.token_to_id("token")]
    check(tokenizer, metadata, ("token", " token ", "token"))


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_spaces_that_begin_words(scheme: str, tmp_path: Path) -> None:
    """Metaspace cuts before each space, so tokens of several spaces are never made."""
    data = json.loads(hftokenizers.trained("metaspace"))
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    last = max(vocab, key=vocab.__getitem__)
    vocab["▁▁"] = vocab.pop(last)
    data["model"]["merges"] = [["▁", "▁"], *(pair for pair in merges if last not in (*pair, "".join(pair)))]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    for split in (True, False):
        tokenizer.pre_tokenizer = P.Metaspace(prepend_scheme=scheme, split=split)
        check(tokenizer, converted(tokenizer, tmp_path)[0])


def test_a_space_before_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(hftokenizers.trained("gpt-2"))
    tokenizer.pre_tokenizer = P.ByteLevel(add_prefix_space=True)
    metadata, said = converted(tokenizer, tmp_path)
    assert "pre_tokenizer (ByteLevel) is kept for gguf-run alone" in said[0]
    check(tokenizer, metadata)


@pytest.mark.parametrize("kind", ["gpt-2", "llama-3", "llama-2", "t5", "bert"])
@pytest.mark.parametrize("around", [None, "$A", "<1> $A", "$A <2>", "<1> <2> $A"])
def test_what_stands_around_a_text(kind: str, around: str | None, tmp_path: Path) -> None:
    data = json.loads(hftokenizers.trained(kind))
    data["post_processor"] = None
    tokenizer = Tokenizer.from_str(json.dumps(data))
    names = hftokenizers.special_names(tokenizer)
    if around is not None:
        template = around.replace("<1>", names[1]).replace("<2>", names[2])
        used = [(name, tokenizer.token_to_id(name)) for name in names[1:3] if name in template]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    metadata, said = converted(tokenizer, tmp_path)
    assert [isinstance(metadata[f"{G}add_{role}_token"], bool) for role in ("bos", "eos")] == [True, True]
    assert Own.from_metadata(metadata).encode("the fox") == tokenizer.encode("the fox").ids
    assert bool(said) == (around == "<1> <2> $A")


def test_several_tokens_behind_a_text_are_said(tmp_path: Path) -> None:
    tokenizer = hftokenizers.around(Tokenizer.from_str(hftokenizers.trained("gpt-2")), "$A <|im_start|> <|im_end|>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.warns(ConversionWarning, match=r"it puts <\|im_start\|> <\|im_end\|> around a text: a GGUF file"):
        tokenizer_metadata(tmp_path, {})


def test_a_step_that_no_file_can_hold_is_said(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(hftokenizers.trained("llama-2"))
    tokenizer.pre_tokenizer = P.FixedLength(5)
    _, said = converted(tokenizer, tmp_path)
    assert "its pre_tokenizer FixedLength has no place in a GGUF file" in said[0]
    assert "test texts get other tokens" in said[1]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("normalizer.json", "{}", "normalizer.json must be a list of steps of the types BertNormalizer"),
        ("normalizer.json", "[", "must be a list of steps"),
        ("normalizer.json", "[" * 9999, "must be a list of steps"),
        ("normalizer.json", '[{"type": "Precompiled"}]', "must be a list of steps"),
        ("normalizer.json", '[{"type": "Replace"}]', "normalizer .* is not understood"),
        ("normalizer.json", " " * 40000, "has 40000 characters: at most 32768"),
        ("pre_tokenizer.json", '[{"type": "Split", "pattern": {"Regex": "("}}]', "pre_tokenizer .* is not understood"),
        ("normalizer.json", 3, "must be a string"),
    ],
)
def test_bad_steps(key: str, value: Any, message: str, tmp_path: Path) -> None:
    hftokenizers.write(tmp_path, "gpt-2")
    with pytest.raises(FormatError, match=message):
        Own.from_metadata(tokenizer_metadata(tmp_path, {}) | {G + key: value})


def test_steps_that_do_harm(tmp_path: Path) -> None:
    hftokenizers.write(tmp_path, "gpt-2")
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    slow = {"type": "Split", "pattern": {"Regex": "( +)+x"}, "behavior": "Isolated", "invert": False}
    metadata = tokenizer_metadata(tmp_path, {})
    with pytest.raises(FormatError, match="makes 1000000 characters of a text"):
        Own.from_metadata(metadata | {f"{G}normalizer.json": json.dumps([grow] * 5)}).encode("a" * 1000)
    with pytest.raises(FormatError, match="fails for a text of"):
        Own.from_metadata(metadata | {f"{G}pre_tokenizer.json": json.dumps([slow])}).encode("x" + " " * 700 + "y")
