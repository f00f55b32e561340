"""Reads an answer that comes piece by piece. Its methods are generators: they pause where the text does not suffice."""

import re
from collections.abc import Callable, Generator

from gguf_run.runtime.chat.answer_parts import Part

Steps = Generator[None, None, None]
Give = Callable[[str], None]
_STRUCTURE = re.compile(r'\\.|["{}\[\]]', re.DOTALL)  # what tells where a JSON value ends


class Reader:
    """A splitter whose method `answer` reads the text from its beginning to its end, as if it were all there."""

    def __init__(self) -> None:
        self.text = ""  # what is not read yet
        self.is_ended = False
        self.is_plain = False  # the rest is text
        self._parts: list[Part] = []
        self._steps = self.answer()

    def push(self, text: str, /) -> list[Part]:
        """See Splitter."""
        if self.is_plain:
            return [Part("text", text)] if text else []
        self.text += text
        next(self._steps, None)
        parts, self._parts = self._parts, []
        return parts

    def end(self) -> list[Part]:
        """See Splitter."""
        self.is_ended = True
        return self.push("")

    def answer(self) -> Steps:
        """Read the answer."""
        raise NotImplementedError

    def give(self, kind: str, text: str) -> None:
        """Add a piece to the parts that push returns."""
        if text and kind != "call" and self._parts and self._parts[-1].kind == kind:
            text = self._parts.pop().text + text
        if text:
            self._parts.append(Part(kind, text))

    def drop(self, n: int) -> str:
        """Return the next n characters; they are read."""
        text, self.text = self.text[:n], self.text[n:]
        return text

    def until(self, marks: tuple[str, ...], give: Give, trim: bool = True) -> Generator[None, None, str]:
        """Give the text up to the first of some marks, and return the mark; "" if the answer ends before.

        The mark is not read. trim: nor is white space before it.
        """
        starts = {mark[0] for mark in marks}
        while True:
            at, mark = len(self.text), ""
            if not starts.isdisjoint(self.text):
                at, mark = min(((self.text.find(one), one) for one in marks if one in self.text), default=(at, ""))
                begun = (n for one in marks for n in range(1, len(one)) if self.text.endswith(one[:n]))
                at -= 0 if mark or self.is_ended else max(begun, default=0)
            is_last = self.is_ended and not mark
            give(self.drop(len(self.text[:at].rstrip()) if trim and marks and not is_last else at))
            if mark or is_last:
                return mark
            yield

    def one_of(self, marks: tuple[str, ...]) -> Generator[None, None, str]:
        """Return the mark that comes next, behind white space; both are read. Return "" if none does."""
        while True:
            text = self.text.lstrip()
            mark = next((mark for mark in marks if text.startswith(mark)), "")
            if mark or self.is_ended or (text and not any(mark.startswith(text) for mark in marks)):
                self.drop(len(self.text) - len(text) + len(mark) if mark else 0)
                return mark
            yield

    def skip_space(self) -> Steps:
        """Drop white space, up to the next word."""
        yield from self.one_of(())
        self.text = self.text.lstrip()

    def match(self, pattern: re.Pattern[str]) -> Generator[None, None, re.Match[str] | None]:
        """Return what the text matches, None if it does not. pattern: of a Form. Nothing is read."""
        while True:
            found = pattern.match(self.text)
            is_whole = found is not None and found["done"] is not None
            if found is None or is_whole or self.is_ended:
                return found if is_whole else None
            yield

    def balanced(self, give: Give, depth: int = 0) -> Steps:
        """Give the text up to the bracket that closes the first one, or to the end of the answer.

        depth: brackets that are open already. Brackets in strings of JSON do not count.
        """
        is_quoted = False
        while True:
            end = n_seen = 0
            for found in _STRUCTURE.finditer(self.text):
                n_seen = found.end()
                if found[0] == '"':
                    is_quoted = not is_quoted
                elif not is_quoted and found[0][0] != "\\":
                    depth += 1 if found[0] in "{[" else -1
                    if depth == 0:
                        end = n_seen
                        break
            n_held = self.text.endswith("\\") and n_seen < len(self.text) and not self.is_ended
            give(self.drop(end or len(self.text) - n_held))
            if end or self.is_ended:
                return
            yield
