"""Lines of a terminal that break between words, while the text arrives piece by piece."""

import re
from collections.abc import Callable, Iterable, Iterator
from unicodedata import east_asian_width

_STYLE = re.compile(r"\x1b\[\d*m")  # takes no column
FENCES = ("```", "~~~")  # begin and end code, whose lines stay as they are


def wrapped(pieces: Iterable[str], columns: Callable[[], int]) -> Iterator[str]:
    """Yield the text of pieces, with a line end in place of the space before a word that the line has no room for.

    columns: see Line.
    """
    line = Line(columns)
    for piece in pieces:
        if text := line.push(piece):
            yield text
    if text := line.word():
        yield text


def without_controls(text: str) -> str:
    """Return text of several lines without what a terminal obeys: a model may write escape codes. The rest stays."""
    return re.sub(r"[^\n\t\r\x20-\x7e\xa0-\U0010ffff]", lambda match: repr(match[0])[1:-1], text)


class Line:
    """The line of text at which the cursor stands.

    A word is held back until it is whole. One that is longer than a line, and characters of scripts without spaces, are
    not.
    """

    def __init__(self, columns: Callable[[], int]) -> None:
        """columns: how many a line has, asked for each word: a user may resize the terminal."""
        self._columns = columns
        self._at = 0  # columns that are written
        self._space, self._word = "", ""  # what is held back
        self._breaks = False  # the line may end here, although there is no space
        self._is_code = False

    def push(self, text: str) -> str:
        """Take text; return what can be written now."""
        return "".join(map(self._push, text))

    def _push(self, char: str) -> str:
        if char == "\n":
            text = self.word()
            self._at, self._space = 0, ""
            return text + char
        if char.isspace() and char != "\N{NO-BREAK SPACE}":
            text = self.word()
            self._space += char
            return text
        is_wide = east_asian_width(char) in "WF"
        text = self.word() if is_wide else ""
        self._word += char
        return text + self.word(breaks=True) if is_wide or _width(self._word) > self._columns() else text

    def word(self, breaks: bool = False) -> str:
        """Return the word that is held back, behind its space or on a new line: no more of it comes.

        breaks: the line may end before and behind the word, although there is no space.
        """
        space, word, width, columns = self._space, self._word, _width(self._word), self._columns()
        if not word:
            return ""
        can_break = bool(space) or breaks or self._breaks
        self._space, self._word, self._breaks = "", "", breaks and width <= columns
        if not self._at and word.startswith(FENCES):
            self._is_code = not self._is_code
        if self._at and not self._is_code and can_break and self._at + len(space) + width > columns:
            self._at = width
            return "\n" + word
        self._at += len(space) + width
        if self._at > columns:  # the terminal has begun another line
            self._at %= columns
        return space + word


def _width(word: str) -> int:
    return sum(1 + (east_asian_width(char) in "WF") for char in _STYLE.sub("", word))
