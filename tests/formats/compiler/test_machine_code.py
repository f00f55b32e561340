"""Compiled functions as object files: arguments, results and errors as numba has them, a cache that may be damaged."""

import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tinymodel import write_tiny

from gguf_run.formats.compiler import jit
from gguf_run.formats.compiler.jit import njit
from gguf_run.formats.compiler.machine_code import Code
from gguf_run.runtime import Model

POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes and files")


@njit
def half(x):
    return x / 2


@njit
def is_more(x, y):
    return x > y


@njit
def column_sums(x, out):
    """Uses memory of its own."""
    sums = np.zeros(x.shape[1])
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            sums[j] += half(x[i, j])
    for j in range(len(out)):
        out[j] = sums[j]


@njit
def both(x):
    return x, -x


@njit
def checked(x):
    if x < 0:
        raise ValueError("negative")
    return x + 1


def test_numbers() -> None:
    assert half(3) == half(3.0) == half(np.int64(3)) == 1.5
    assert is_more(2, 1) is True
    assert is_more(-1.5, 1) is False
    assert both(2) == (2, -2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8, np.uint16])
def test_arrays(dtype: type) -> None:
    x = np.arange(12).reshape(4, 3).astype(dtype)
    for array in (x, np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2]):
        out = np.zeros(3)
        column_sums(array, out)
        np.testing.assert_array_equal(out, x.sum(axis=0) / 2)


def test_a_file_is_enough_for_most() -> None:
    """Not for a result that is no number, or where numba calls its own runtime."""
    kinds: tuple[jit.Kind, ...] = ("<f4", 2), ("<f8", 1)
    assert column_sums.entry(kinds) is not None
    assert both.entry(("i8",)) is None


def test_errors_are_raised() -> None:
    assert checked(1) == 2
    with pytest.raises(ValueError, match="negative"):
        checked(-1)
    assert checked(2) == 3


def test_only_plain_values_in_closures() -> None:
    """The cache could not tell two kernels apart that differ in an object."""
    secret = object()
    with pytest.raises(AssertionError, match="plain values"):
        njit(lambda x: x if secret is None else -x)(1)


CODE = """
import sys
import numpy as np
from gguf_run.formats.compiler.jit import njit
@njit
def twice(x):
    return 2 * x
@njit
def thrice(x):
    memory = np.full(3, x)
    return memory.sum()
print(twice(21) + thrice(0), "numba" in sys.modules)
"""
MADE, LOADED = ["42", "True"], ["42", "False"]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(CODE)
    return path


def run(script: Path, cache: Path, problem: str = "") -> list[str]:
    """Run the script with its kernels in a cache. problem: what it must say on stderr."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, script]
    umask = -1 if os.name == "nt" else 0o002  # as many systems have it
    done = subprocess.run(
        command, env=environment, umask=umask, capture_output=True, text=True, check=True, timeout=120
    )
    assert problem in done.stderr
    assert done.stderr.count("Warning") == bool(problem)
    return done.stdout.split()


@pytest.fixture(scope="module")
def filled(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the script's kernels."""
    cache = tmp_path_factory.mktemp("cache")
    assert run(script, cache) == MADE
    assert run(script, cache) == LOADED
    return cache


@pytest.fixture
def cache(filled: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(filled, tmp_path / "cache")


def code_of(cache: Path, name: str) -> Path:
    (path,) = cache.glob(f"gguf-run/kernels-*/{name}-*.o")
    return path


def key_of(path: Path) -> str:
    return "/".join(path.parts[-2:])


def test_code_is_whole_and_of_this_kernel() -> None:
    """Every cut and every changed byte is found, another key too: not one of them is loaded."""
    code = Code("i8", bytes(range(256)))
    data = code.sealed("kernels-1/f-2.o")
    assert Code.unsealed(data, "kernels-1/f-2.o") == code
    cut = [data[:end] for end in range(len(data))]
    changed = [data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] for at in range(len(data)) for bit in range(8)]
    for other in (*cut, *changed, data + b"\0", b"\xff" * 99, Code("f9", b"").sealed("kernels-1/f-2.o")):
        with pytest.raises(ValueError, match=r"not the code|codec"):
            Code.unsealed(other, "kernels-1/f-2.o")
    for key in ("kernels-2/f-2.o", "kernels-1/g-2.o", ""):
        with pytest.raises(ValueError, match="not the code"):
            Code.unsealed(data, key)


def _swapped(path: Path) -> None:
    shutil.copy(code_of(path.parents[2], "thrice"), path)


def _of_other_sources(path: Path) -> None:
    code = Code.unsealed(path.read_bytes(), key_of(path))
    path.write_bytes(code.sealed(f"kernels-0123456789abcdef/{path.name}"))


def _of_an_earlier_version(path: Path) -> None:
    code = Code.unsealed(path.read_bytes(), key_of(path)).object
    path.write_bytes(b"i8 %d\n" % zlib.crc32(code) + code)


def _for_all_to_write(path: Path) -> None:
    path.chmod(0o606)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link_to_a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _unreadable(path: Path) -> None:
    path.chmod(0)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        _swapped,
        _of_other_sources,
        _of_an_earlier_version,
        *(pytest.param(harm, marks=POSIX) for harm in (_for_all_to_write, _pipe, _link_to_a_device, _unreadable)),
    ],
)
def test_bad_files_are_made_again(script: Path, cache: Path, harm: Callable[[Path], None]) -> None:
    path = code_of(cache, "twice")
    whole = path.read_bytes()
    harm(path)
    assert run(script, cache) == (LOADED if harm is _unreadable and os.geteuid() == 0 else MADE)
    assert path.read_bytes() == whole
    assert run(script, cache) == LOADED


def test_code_that_needs_what_is_not_here_is_made_again(script: Path, cache: Path) -> None:
    path = code_of(cache, "thrice")
    code = Code.unsealed(path.read_bytes(), key_of(path))
    assert b"malloc\0" in code.object
    path.write_bytes(Code(code.result, code.object.replace(b"malloc\0", b"mallox\0")).sealed(key_of(path)))
    assert run(script, cache) == MADE
    assert run(script, cache) == LOADED


def test_a_folder_in_the_place_of_a_file(script: Path, cache: Path) -> None:
    path = code_of(cache, "twice")
    path.unlink()
    path.mkdir()
    (path / "file").touch()
    assert run(script, cache) == MADE
    assert sorted(name.suffix for name in path.parent.iterdir()) == [".o", ".o"]


@POSIX
def test_modes(filled: Path) -> None:
    """Though the umask would let the group write."""
    path = code_of(filled, "twice")
    assert [oct(name.stat().st_mode & 0o777) for name in (path.parent, path)] == ["0o700", "0o600"]


@POSIX
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o702])
def test_a_folder_that_others_may_write_is_not_used(script: Path, cache: Path, mode: int) -> None:
    folder = code_of(cache, "twice").parent
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    folder.chmod(mode)
    assert run(script, cache, f"{folder} can be written by others (mode {mode:o}): kernels are compiled anew") == MADE
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    folder.chmod(0o755)  # as earlier versions made it
    assert run(script, cache) == LOADED


@POSIX
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a folder away")
def test_what_belongs_to_somebody_else_is_not_used(script: Path, cache: Path) -> None:
    path = code_of(cache, "twice")
    os.chown(path, 4321, -1)
    assert run(script, cache) == MADE
    assert path.stat().st_uid == 0
    os.chown(path.parent, 4321, -1)
    assert run(script, cache, f"{path.parent} belongs to user 4321, this is user 0") == MADE


def test_old_versions_are_removed(tmp_path: Path) -> None:
    """All but the newest, and none that was used today."""
    days = 86400
    for i in range(30):
        (tmp_path / f"kernels-{i}").mkdir()
        (tmp_path / f"kernels-{i}/f.o").touch()
        used = time.time() - (i - 20) * days if i > 20 else time.time() - i
        os.utime(tmp_path / f"kernels-{i}", (used, used))
    (tmp_path / "models").mkdir()
    jit._remove_old(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"models", *(f"kernels-{i}" for i in range(21))}


def test_a_second_start_needs_no_numba(tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    write_tiny(model)
    code = (
        "import sys; from gguf_run.runtime import Model\n"
        f"with Model.load({str(model)!r}, n_threads=2) as model:\n"
        "    print(model.logits([1, 2]).shape[0], 'numba' in sys.modules)\n"
    )
    with Model.load(model, n_threads=2) as loaded:
        loaded.logits([1, 2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]


def test_threads_that_ask_at_once_share_one_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second loader would be freed with the machine code that a thread still calls."""
    made = []

    class SlowLoader(jit.Loader):
        def __init__(self) -> None:
            made.append(self)
            time.sleep(0.05)
            super().__init__()

    monkeypatch.setattr(jit, "Loader", SlowLoader)
    monkeypatch.setattr(jit, "_STORE", jit._Store())
    kernels = [njit(half._function) for _ in range(4)]  # each of them is loaded anew
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(lambda kernel: kernel(3), kernels)] == [1.5] * 4
    assert len(made) == 1
