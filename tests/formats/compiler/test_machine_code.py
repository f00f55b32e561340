"""Compiled functions as object files: arguments, results and errors as numba has them, a cache that may be damaged."""

import functools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tinymodel import write_tiny

from gguf_run.formats.compiler import jit
from gguf_run.formats.compiler.jit import njit
from gguf_run.runtime import Model


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
from gguf_run.formats.compiler.jit import njit
@njit
def twice(x):
    return 2 * x
print(twice(21), "numba" in sys.modules)
"""


def test_damaged_cache(tmp_path: Path) -> None:
    """A file that is empty, cut or changed is made again; without one that is whole, numba is loaded."""
    script = tmp_path / "script.py"
    script.write_text(CODE)

    def run() -> list[str]:
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert run() == ["42", "True"]
    assert run() == ["42", "False"]
    (code,) = tmp_path.glob("gguf-run/kernels-*/twice-*.o")
    whole = code.read_bytes()
    for damaged in (whole[:-1], whole[:-9] + bytes(9), b"\xff" * 99):
        code.write_bytes(damaged)
        assert run() == ["42", "True"]
        assert code.read_bytes() == whole
    assert [path.suffix for path in code.parent.iterdir()] == [".o"]


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


def test_threads_that_ask_at_once_share_one_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second store would be freed with the machine code that a thread still calls."""
    monkeypatch.setattr(jit, "_only_store", functools.cache(lambda: time.sleep(0.05) or object()))
    with ThreadPoolExecutor(4) as pool:
        stores = [*pool.map(lambda _: jit._store(), range(4))]
    assert len(set(map(id, stores))) == 1
