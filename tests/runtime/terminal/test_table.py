import pytest

from gguf_run.runtime.terminal.table import fold, table

HEAD, ROWS = ["name", "n"], [["a", "1"], ["bcdef", "23"]]


def test_table() -> None:
    assert [*table(HEAD, ROWS, "lr")] == ["name    n", "a       1", "bcdef  23"]


@pytest.mark.parametrize("width", [1000, 80, 40, 20, 9])
def test_a_table_fits_and_is_whole(width: int) -> None:
    rows = [["blk.0.attn_q.weight", "x" * 70, "1.25"], ["short", "", "100"]]
    lines = [*table(["tensor", "value", "bits"], rows, "llr", width)]
    assert max(map(len, lines)) <= width
    assert "".join("".join(lines).split()) == "tensorvaluebits" + "".join(map("".join, rows))


def test_a_table_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "8")
    assert [*table(HEAD, ROWS, "lr")] == ["name   n", "a      1", "bcdef", "  23"]


def test_fold() -> None:
    assert [*fold(["| ab", "| cdef", "| g"], " ", 8)] == ["| ab", "  | cdef", "  | g"]
