"""A file is replaced as a whole, or stays as it was."""

import os
import signal
import subprocess
import sys
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


WRITE = """
import sys, time
from pathlib import Path
from gguf_run.formats.atomic import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.mkdir() if sys.argv[2] == "folder" else None
    (temporary / "x" if sys.argv[2] == "folder" else temporary).write_text("half")
    print("begun", flush=True)
    time.sleep(60)
"""


def begin(path: Path, kind: str) -> "subprocess.Popen[bytes]":
    """A process that is in the middle of writing `path`."""
    process = subprocess.Popen([sys.executable, "-c", WRITE, path, kind], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    process.stdout.close()
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="needs locks of files")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_run_left_is_removed(tmp_path: Path, kind: str) -> None:
    """By the next run that writes the same file; what a live run writes, and other files, stay."""
    path, other = tmp_path / "a", tmp_path / "a.b"
    (tmp_path / "a.12345.partial").write_text("of an earlier version")
    mine = ["a.backup.partial", "a.partial", "b.123.partial"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    killed, live, of_another = begin(path, kind), begin(path, kind), begin(other, kind)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    of_another.send_signal(signal.SIGKILL)
    of_another.wait()
    assert len(names(tmp_path)) == len(mine) + 3
    with replacing(path) as temporary:
        temporary.write_text("new")
    left = [name for name in names(tmp_path) if name not in (*mine, "a")]
    assert [name.split(".")[1].isdigit() for name in left] == [True, False]  # the live run's, and a.b's
    live.kill()
    live.wait()
    for each in (path, other):
        with replacing(each) as temporary:
            temporary.write_text("newer")
    assert names(tmp_path) == ["a", "a.b", *mine]
    assert path.read_text() == "newer"


def test_two_threads_of_one_process_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with replacing(path) as one:
        one.write_text("1")
        with replacing(path) as two:
            two.write_text("2")
        assert path.read_text() == "2"
    assert path.read_text() == "1"
    assert names(tmp_path) == ["a"]


def test_a_device_or_pipe_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(OSError, match="is a device or pipe"), replacing(path):
            pass
    assert names(tmp_path) == ["pipe"]
