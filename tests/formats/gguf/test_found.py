"""What is said of a file or folder that is no GGUF model."""

import os
from pathlib import Path

import pytest
from ggufbuild import T, build, write, write_split

from gguf_run.formats.errors import FormatError, GgufRunError, UnsupportedError
from gguf_run.formats.gguf.found import check_model
from gguf_run.formats.gguf.imatrix import Imatrix
from gguf_run.formats.gguf.mapped import read_bytes
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.safetensors import read_safetensors, writing_safetensors

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"


def test_pointers_of_git_lfs(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(LFS)
    for read in (GGUFFile.open, Imatrix.open, read_safetensors, lambda path: read_bytes(path, 1000)):
        with pytest.raises(FormatError, match=r"file: is a Git LFS pointer, not the file itself: fetch it with `git"):
            read(path)


def test_a_safetensors_file(tmp_path: Path) -> None:
    with writing_safetensors(tmp_path / "model.safetensors", {"a": ("F32", (0,))}):
        pass
    with pytest.raises(FormatError, match=rf"is not a GGUF file but a safetensors file: name its folder, {tmp_path}$"):
        GGUFFile.open(tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="is a GGUF file, no safetensors file"):
        read_safetensors(write(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("m.gguf.part1of2", "m.gguf.part2of2"), ("m.gguf-split-a", "m.gguf-split-b"), ("m.gguf.001", "m.gguf.002"),
        ("m.gguf.part-1", "m.gguf.part-2"), ("m.gguf.part-aa", "m.gguf.part-ab"),
    ],
)  # fmt: skip
def test_pieces(tmp_path: Path, first: str, second: str) -> None:
    data = build({"a": "b"}, [T("t", (64,))])
    (tmp_path / first).write_bytes(data[:200])
    (tmp_path / second).write_bytes(data[200:])
    for name in (first, second):
        with pytest.raises(FormatError) as caught:
            GGUFFile.open(tmp_path / name)
        assert str(caught.value).startswith(
            f"{tmp_path / name}: is a piece of m.gguf, which was cut: get all pieces and join them with "
            f"`cat {first} {second} > m.gguf` ("
        )
    (tmp_path / first).write_bytes(data)  # whatever its name is, a whole file is read
    GGUFFile.open(tmp_path / first).close()


@pytest.mark.parametrize("name", ["m.gguf.part", "m.gguf.crdownload", "abc.incomplete"])
def test_unfinished_downloads(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(build({"a": "b"}, [T("t", (64,))])[:-100])
    with pytest.raises(FormatError, match=rf"{name}: is an unfinished download: get the whole file \(.*truncated"):
        GGUFFile.open(tmp_path / name)


def test_a_folder_with_one_model(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    model = write(tmp_path / "one" / "m.gguf", {"a": 1})
    write(tmp_path / "one" / "mmproj-m-f16.gguf", {"a": 2})
    (tmp_path / "split").mkdir()
    first = write_split(tmp_path / "split")
    for path in (model, first):
        with pytest.warns(UserWarning, match=rf"^{path} is opened, the one model in the folder$"):
            file = GGUFFile.open(path.parent)
        assert file.path == path
    write(tmp_path / "one" / "other.gguf")
    with pytest.raises(
        GgufRunError, match=r'one: is a directory with 2 GGUF models: name one of them: "m\.gguf", "oth'
    ):
        GGUFFile.open(tmp_path / "one")


@pytest.mark.parametrize(
    ("metadata", "n_tensors", "words"),
    [
        ({"general.type": "adapter", "general.architecture": "llama"}, 9, "an adapter (LoRA), which changes another"),
        ({"general.type": "imatrix"}, 9, "an importance matrix: it is for `gguf-quantize --imatrix`"),
        ({"general.type": "mmproj"}, 9, "a projector for images or sound: name the language model's file"),
        ({"general.architecture": "clip"}, 9, "a projector for images or sound"),
        ({"general.architecture": "llama"}, 0, "a vocabulary without weights"),
        ({"general.type": "new"}, 9, 'a file of the type "new"'),
    ],
)
def test_files_that_are_no_models(metadata: dict[str, str], n_tensors: int, words: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_model(Path("m.gguf"), metadata, n_tensors)
    assert str(caught.value).startswith(f"m.gguf: is not a model but {words}")


def test_models_are_models() -> None:
    for metadata in ({}, {"general.type": "model", "general.architecture": "llama"}):
        check_model(Path("m.gguf"), metadata, 1)


def test_read_bytes(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"x" * 1000)
    assert read_bytes(path, 1000) == b"x" * 1000
    with pytest.raises(GgufRunError, match="text: is larger than 999 bytes"):
        read_bytes(path, 999)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(GgufRunError, match="is a device or pipe, not a file"):
            read_bytes(other, 1000)
    with pytest.raises(GgufRunError, match="is a directory, not a file"):
        read_bytes(tmp_path, 1000)
    reader, writer = os.pipe()  # as a shell makes it of `-f <(command)`
    os.write(writer, b"text")
    os.close(writer)
    assert read_bytes(f"/dev/fd/{reader}", 1000) == b"text"
    os.close(reader)
