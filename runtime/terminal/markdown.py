"""Markdown on a terminal, with the package rich (the extra `chat`): a block is shown when it is whole."""

import io
import re
import sys
from collections.abc import Iterable, Iterator

from gguf_run.runtime.terminal.reasoning import DIM, PLAIN
from gguf_run.runtime.terminal.text import n_columns
from gguf_run.runtime.terminal.wrap import FENCES, Line

_BEGINS = re.compile(r"#{1,6} |[-*+] |\d{1,9}[.)] |```|~~~")  # a line that ends the block before it


def rendered(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the text of pieces with its Markdown rendered. What a model thinks, between DIM and PLAIN, stays as it is.

    A paragraph, a table, a heading, code and an item of a list with all below it are a block each.
    """
    block, thought = _Block(), Line(lambda: n_columns(sys.stdout))
    is_thought = False
    for piece in pieces:
        for part in re.split(f"({re.escape(DIM)}|{re.escape(PLAIN)})", piece):
            if part in (DIM, PLAIN):
                is_thought = part == DIM
                yield block.end() + thought.word() + part
            elif is_thought:
                yield thought.push(part)
            else:
                yield from block.push(part)
    yield block.end() + thought.word()


class _Block:
    """The part of a text that is not shown yet."""

    def __init__(self) -> None:
        self._lines, self._rest = "", ""  # whole lines, and the beginning of the next one
        self._is_code = False

    def push(self, text: str) -> Iterator[str]:
        """Take text; yield blocks that are whole."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if not self._is_code and _BEGINS.match(line):
                yield self._render()
            self._lines += f"{line}\n"
            if is_fence := line.lstrip().startswith(FENCES):
                self._is_code = not self._is_code
            if not self._is_code and (is_fence or not line.strip()):
                yield self._render()

    def end(self) -> str:
        """Return the last block, whole or not."""
        self._lines, self._rest, self._is_code = self._lines + self._rest, "", False
        return self._render()

    def _render(self) -> str:
        """Return the block for the terminal. The blank lines behind it stay as they are."""
        from rich.console import Console
        from rich.markdown import Markdown

        source, self._lines = self._lines, ""
        text = source.rstrip("\n")
        if not text.strip():
            return source
        console = Console(file=io.StringIO(), force_terminal=True, width=n_columns(sys.stdout), legacy_windows=False)
        with console.capture() as capture:
            console.print(Markdown(text, hyperlinks=False))
        lines = [line.rstrip() for line in capture.get().strip("\n").split("\n")]
        return "\n".join(lines) + source[len(text) :]
