"""After converting, test texts are compared: what the converter missed is said with an example, and nothing else is."""

import json
from pathlib import Path
from typing import Any

import hftokenizers
import pytest
from hftokenizers import KINDS

from gguf_run.runtime.convert.vocabulary import probe
from gguf_run.runtime.convert.vocabulary.metadata import tokenizer_metadata
from gguf_run.runtime.convert.vocabulary.vocabulary import ConversionWarning

G = "tokenizer.ggml."


def both(kind: str, directory: Path) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Return the object in tokenizer.json, the metadata made of it, and the path."""
    hftokenizers.write(directory, kind)
    path = directory / "tokenizer.json"
    return json.loads(path.read_text()), tokenizer_metadata(directory, {}), path


@pytest.mark.parametrize(
    ("kind", "wrong", "shown"),
    [
        ("qwen-2", {"normalizer.nfc": False}, "'e\u0301"),
        ("llama-3", {"pre": "smollm"}, "'"),
        ("llama-2", {"add_space_prefix": False}, "'Hello world!"),
        ("gemma", {"add_space_prefix": True}, "'Hello world!"),
        ("t5", {"normalizer.nfkc": False}, "'1 12 123"),
        ("bert", {"normalizer.lowercase": False, "normalizer.strip_accents": False}, "'Hello world!"),
        ("phi-3", {"rstrip_token_ids": []}, r"'a <\|user\|> b'"),
    ],
)
def test_a_difference_is_said_once(kind: str, wrong: dict[str, Any], shown: str, tmp_path: Path) -> None:
    data, metadata, path = both(kind, tmp_path)
    metadata |= {G + key: value for key, value in wrong.items()}
    message = rf"\d+ of \d+ test texts get other tokens: {shown}.* by the tokenizers package, \[.* by this program"
    with pytest.warns(ConversionWarning, match=message) as said:
        probe.compare_tokens(data, metadata, path)
    assert len(said) == 1


def test_a_file_that_the_package_refuses(tmp_path: Path) -> None:
    data, metadata, path = both("gpt-2", tmp_path)
    data["normalizer"] = {"type": "Unheard"}
    with pytest.warns(ConversionWarning, match="the tokenizers package refuses it .* no test text could be compared"):
        probe.compare_tokens(data, metadata, path)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_said_where_nothing_differs(kind: str, tmp_path: Path) -> None:
    probe.compare_tokens(*both(kind, tmp_path))  # a warning would be an error
