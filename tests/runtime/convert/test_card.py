"""What a card states, and what files are called."""

import json
import time
import warnings
from pathlib import Path

import pytest

from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.runtime.convert.card import file_name, general_metadata, size_label


def tensor(name: str, *ne: int) -> TensorInfo:
    return TensorInfo(name, ne, type_by_name("F16"))


def test_sizes() -> None:
    assert size_label([tensor("token_embd.weight", 1000, 960)]) == "960K"
    assert size_label([tensor("a.weight", 1000, 1000, 1_236)]) == "1.2B"
    assert size_label([tensor("a.weight", 1000, 10_000), tensor("blk.0.ffn_up_exps.weight", 1000, 5000, 8)]) == "8x15M"


@pytest.mark.parametrize("number", ["9" * 9000, "0x" + "f" * 9000, "1.0e+999", ".nan", str(1 << 60)])
def test_a_license_that_is_a_large_number(number: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: {number}\ntags: [{number}, a]\nlanguage: 3\n---\n")
    found = general_metadata(tmp_path, None, [])
    assert "general.license" not in found
    assert found.get("general.languages", Typed("array[string]", ["3"])).value == ["3"]


def test_file_names() -> None:
    assert file_name({"general.name": "A/b c"}, "Q4_K_M") == "A-b-c-Q4_K_M.gguf"
    assert file_name({"general.name": "../../x"}, "F16") == "-..-x-F16.gguf"
    assert file_name({}, "vocab") == "model-vocab.gguf"


@pytest.mark.parametrize("folder", ["Llama-3.2-1B", "models--meta-llama--Llama-3.2-1B/snapshots/0123abc"])
def test_the_name_is_that_of_the_folder(folder: str, tmp_path: Path) -> None:
    path = tmp_path / folder
    path.mkdir(parents=True)
    assert general_metadata(path, None, []) == {"general.name": "Llama-3.2-1B"}
    assert general_metadata(path, "mine", []) == {"general.name": "mine"}


def test_what_generation_config_says_beyond_sampling_is_told(tmp_path: Path) -> None:
    values = {"temperature": 0.6, "num_beams": 1, "typical_p": 1.0, "bad_words_ids": None, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        general_metadata(tmp_path, None, [])
    (tmp_path / "generation_config.json").write_text(json.dumps(values | {"num_beams": 4, "suppress_tokens": [7]}))
    with pytest.warns(
        UserWarning, match=r"generation_config\.json: suppress_tokens, num_beams: a GGUF file has no place"
    ):
        general_metadata(tmp_path, None, [])


@pytest.mark.parametrize("text", ["tags: " + "[" * 3000, "a: " + "{b: " * 3000, "- " * 3000])
def test_a_card_of_lists_in_lists_tells_nothing(text: str, tmp_path: Path) -> None:
    """YAML would take minutes for some."""
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
    start = time.process_time()
    assert set(general_metadata(tmp_path, None, [])) == {"general.name"}
    assert time.process_time() - start < 5
    (tmp_path / "README.md").write_text("---\ntags: [[a], b]\n---\n")
    assert general_metadata(tmp_path, None, [])["general.tags"].value == ["b"]
