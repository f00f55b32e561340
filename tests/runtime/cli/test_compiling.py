"""The lines about kernels that are compiled, without compiling any."""

import time
from pathlib import Path

import pytest

from gguf_run.runtime.cli import compiling
from gguf_run.runtime.load.options import LoadOptions
from gguf_run.runtime.terminal.progress import Progress


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_for_and_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_terminal: bool
) -> None:
    model, files = tmp_path / "m.gguf", [tmp_path / f"{i}.o" for i in range(3)]
    model.touch()
    monkeypatch.setattr(compiling, "missing_kernels", lambda *_: files)
    monkeypatch.setattr(compiling, "_SECONDS_PER_LOOK", 0.01)
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    with Progress("loading") as bar, compiling.Compiling(str(model), LoadOptions(), bar) as shown:
        for file in files:
            assert not shown.is_over
            time.sleep(0.1)
            file.touch()
        shown._thread.join(60)
        assert shown.is_over
    line, *counts = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert line == "compiling kernels for m.gguf (3 are missing); this takes some seconds, once"
    drawn = [count.strip() for count in counts if count.strip()]
    assert drawn == ([f"compiled {i} of 3 kernels" for i in range(4)] if is_terminal else [])


def test_a_model_that_cannot_be_read_is_left_to_the_loader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with Progress("loading") as bar, compiling.Compiling(str(tmp_path / "m.gguf"), LoadOptions(), bar):
        pass
    assert capsys.readouterr().err == "compiling kernels for m.gguf; this takes some seconds, once\n"
