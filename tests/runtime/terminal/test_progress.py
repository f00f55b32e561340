import pytest

from gguf_run.runtime.terminal.progress import Progress


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("loading") as progress:
        progress.set(5, 10)
    assert capsys.readouterr().err == ""


def test_progress_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("loading") as progress:
        progress.set(5_000_000, 10_000_000)
        progress.set(6_000_000, 10_000_000)  # too soon to draw again
    shown = capsys.readouterr().err
    bar = "loading [###############               ]  50 % of 10.0 MB"
    assert shown == f"\r{bar}\r{' ' * len(bar)}\r"


def test_messages_stand_on_lines_of_their_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("probing", "caches") as progress:
        progress.set(1, 2)
        progress.message("one\nline")
    *_, message = capsys.readouterr().err.split("\r")
    assert message == "one line\n"


@pytest.mark.parametrize("columns", [80, 40, 20, 5])
def test_progress_fits(columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    with Progress("loading") as progress:
        progress.set(5_000_000, 10_000_000)
        progress.show("a line of text that is longer than most terminals " * 3)
    drawn = capsys.readouterr().err.split("\r")
    assert max(map(len, drawn)) == columns - 1
    assert ("50 % of 10.0 MB" in drawn[1], "[#" in drawn[1]) == (columns > 20, columns >= 40)
