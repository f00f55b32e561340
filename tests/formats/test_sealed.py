"""Files that only this program writes: their kind, their version and the checksum of their metadata."""

from pathlib import Path

import numpy as np
import pytest

from gguf_run.formats.errors import FormatError
from gguf_run.formats.safetensors import writing_safetensors
from gguf_run.formats.sealed import FileKind

KIND = FileKind("shopping list", b"OLDLIST!", "write it again")


def write(path: Path, metadata: dict[str, str]) -> Path:
    with writing_safetensors(path, {"prices": ("F32", (2,))}, metadata) as append:
        append("prices", np.array([1, 2], np.float32))
    return path


def test_round_trip(tmp_path: Path) -> None:
    file = KIND.open(write(tmp_path / "a", KIND.seal({"shop": "é"})))
    assert file.metadata["shop"] == "é"
    assert file.arrays["prices"].array().tolist() == [1, 2]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "/a: is not a shopping list: write it again"),
        (FileKind("song", b"", "").seal({}), "/a: is not a shopping list: write it again"),
        (KIND.seal({}) | {"version": "1"}, "/a: is a shopping list of version 1, this program reads 2: write it again"),
        (KIND.seal({"shop": "x"}) | {"shop": "y"}, "/a: the shopping list is damaged: the checksum of its header"),
        (KIND.seal({}) | {"more": "y"}, "the checksum of its header differs: write it again"),
    ],
)
def test_other_metadata(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        KIND.open(write(tmp_path / "a", metadata))


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for data, message in (
        (b"OLDLIST!" + bytes(9), "/a: is a shopping list of an earlier version of this program: write it again"),
        (b"some text, not an array", r"/a: is not a shopping list, or it is damaged \(.*\): write it again"),
        (b"", r"/a: is not a shopping list, or it is damaged \(is empty.*\): write it again"),
    ):
        path.write_bytes(data)
        with pytest.raises(FormatError, match=message):
            KIND.open(path)
    with pytest.raises(FileNotFoundError):
        KIND.open(tmp_path / "none")
