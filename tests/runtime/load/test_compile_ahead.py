import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tinymodel import Tiny, write_tiny

from gguf_run.models.backend import CacheType
from gguf_run.runtime import LoadOptions, Model
from gguf_run.runtime.load import compile_ahead, load_model

F16 = CacheType("f16", "f16")


@contextmanager
def compile_at_once(start: Callable[[], None]) -> Iterator[None]:
    start()
    yield


def test_the_second_process_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path / "m.gguf", Tiny(n_layer=1))
    ended: list[int] = []

    class Waiting(subprocess.Popen[bytes]):
        def kill(self) -> None:
            ended.append(self.wait())

    monkeypatch.setattr(subprocess, "Popen", Waiting)
    monkeypatch.setattr(load_model, "compile_notice", compile_at_once)
    with load_model._helper(tmp_path / "m.gguf", LoadOptions(), [F16], n_threads=2):
        pass
    assert ended == [0]


def test_missing_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels of the step where the folder is empty, none after loading; nothing is made."""
    write_tiny(tmp_path / "m.gguf", Tiny(n_layer=1))
    options = LoadOptions(n_threads=1)
    Model.load(tmp_path / "m.gguf", options).close()
    assert compile_ahead.missing_kernels(tmp_path / "m.gguf", options) == []
    monkeypatch.setattr(compile_ahead, "kernel_cache_dir", lambda: tmp_path / "empty")
    missing = compile_ahead.missing_kernels(tmp_path / "m.gguf", options)
    assert len(missing) == len(set(missing)) > 5
    assert not (tmp_path / "empty").exists()
    other = compile_ahead.missing_kernels(tmp_path / "m.gguf", LoadOptions(cache_type="q8_0"))
    assert 0 < len(set(other) - set(missing)) < len(missing)


def test_one_thread_has_no_help(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(subprocess, "Popen", never)
    with compile_ahead.helper(Path("m.gguf"), LoadOptions(), [F16], n_threads=1):
        pass
