"""Names, numbers and labels of file types, and the line that describes a model."""

from pathlib import Path
from typing import Any

import pytest
from ggufbuild import T, write

from gguf_run.formats.errors import OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.quantizers.quantizer import QUANTIZERS
from gguf_run.runtime.quantize.file_types import WRITABLE, _size_label, file_type, model_type, writable_type


def test_writable_types_are_those_of_the_codecs() -> None:
    assert set(QUANTIZERS) == set(WRITABLE)


def test_names_of_file_types() -> None:
    assert [file_type(text).name for text in ("q4_k", "15", "Q4_K_M")] == ["Q4_K_M"] * 3
    assert [file_type(text).name for text in ("mxfp4", "38", "copy", "0")] == ["MXFP4_MOE", "MXFP4_MOE", "COPY", "F32"]
    for text in ("Q4_K_X", "99", "", "-1"):
        with pytest.raises(OptionError, match="allowed are F32, F16"):
            file_type(text)
    with pytest.raises(OptionError, match=r"--output-tensor-type.*IQ2_XXS.*allowed are F32"):
        writable_type("IQ2_XXS", "--output-tensor-type")


@pytest.mark.parametrize(
    ("metadata", "type", "expected"),
    [
        ({"general.size_label": "8B", "general.file_type": 15}, "F32", "llama 8B Q4_K - Medium"),
        ({"general.file_type": 2}, "F32", "llama 0M Q4_0"),
        ({"general.file_type": 999}, "Q8_0", "llama 0M Q8_0"),
        ({"general.size_label": "a\nb", "general.file_type": "x"}, "F16", "llama 0M F16"),
    ],
)
def test_model_type(metadata: dict[str, Any], type: str, expected: str, tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.gguf", {"general.architecture": "llama"} | metadata, [T("a", (256, 4), type), T("b", (9,))]
    )
    with GGUFFile.open(path) as file:
        assert model_type(file) == expected


def test_model_type_of_a_file_without_tensors(tmp_path: Path) -> None:
    with GGUFFile.open(write(tmp_path / "m.gguf", {"general.architecture": "llama"})) as file:
        assert model_type(file) == "llama 0M no weights"


@pytest.mark.parametrize(
    ("n_params", "label"),
    [
        (134_515_008, "135M"), (999_600_000, "1B"), (1_235_814_400, "1.2B"), (8_030_261_248, "8B"),
        (9_960_000_000, "10B"), (70_553_706_496, "71B"),
    ],
)  # fmt: skip
def test_size_label(n_params: int, label: str) -> None:
    assert _size_label(n_params) == label
