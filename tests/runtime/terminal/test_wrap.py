"""Words that wrap whole."""

import pytest

from gguf_run.runtime.terminal.reasoning import DIM, PLAIN
from gguf_run.runtime.terminal.wrap import Line, without_controls, wrapped

TEXT = "The quick brown fox jumps over the lazy dog.\n\n  - and then it\tsleeps, \u65e5\u672c\u8a9e well.\n"


def at_width(text: str, width: int) -> str:
    line = Line(lambda: width)
    return "".join(map(line.push, text)) + line.word()


@pytest.mark.parametrize("width", [9, 20, 40, 80])
def test_lines_fit_and_words_are_whole(width: int) -> None:
    shown = at_width(TEXT, width)
    assert max(len(line) + sum(ord(c) > 0x3000 for c in line) for line in shown.splitlines()) <= width
    assert shown.split("\u65e5")[0].split() == TEXT.split("\u65e5")[0].split()
    assert "".join(shown.split()) == "".join(TEXT.split())
    assert shown == TEXT or width < 80


def test_a_line_that_is_full_is_left_alone() -> None:
    assert at_width("abc def ghi", 7) == "abc def\nghi"
    assert at_width("abcdefghij klm no", 7) == "abcdefghij klm\nno"  # the terminal breaks what no line can hold
    assert at_width("ab c\N{NO-BREAK SPACE}def", 7) == "ab\nc\N{NO-BREAK SPACE}def"


def test_styles_take_no_room() -> None:
    assert at_width(f"{DIM}abc{PLAIN} def ghi", 7) == f"{DIM}abc{PLAIN} def\nghi"


def test_code_stays_as_it_is() -> None:
    assert at_width("a b\n```c\nx = 1 + 2\n```\nc d", 2) == "a\nb\n```c\nx = 1 + 2\n```\nc\nd"


def test_pieces_come_as_early_as_they_can() -> None:
    assert [*wrapped(["Hel", "lo wor", "ld, ", "so"], lambda: 80)] == ["Hello", " world,", " so"]


def test_an_answer_cannot_steer_the_terminal() -> None:
    text = "a\n\t\u200f\u05d0é漢🙂\r\n"
    assert without_controls(text) == text
    assert without_controls("a\x1b]52;c;x\x07\x9b2J\x00\x08") == "a\\x1b]52;c;x\\x07\\x9b2J\\x00\\x08"
