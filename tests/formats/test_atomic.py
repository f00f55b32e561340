"""A file is replaced as a whole, or stays as it was."""

from pathlib import Path

import pytest

from gguf_run.formats.atomic import replacing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_a_folder_is_made(tmp_path: Path) -> None:
    for there in (False, True):
        path = tmp_path / f"folder{there}"
        if there:
            path.mkdir()
        with replacing(path) as temporary:
            temporary.mkdir()
            (temporary / "file").write_text("x")
        assert names(path) == ["file"]


def test_a_folder_with_files_stays(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "mine").write_text("x")
    with pytest.raises(OSError, match="not empty"), replacing(path) as temporary:
        temporary.mkdir()
    assert names(tmp_path) == ["folder"]
    assert names(path) == ["mine"]


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]
