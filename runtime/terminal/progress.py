"""A progress bar on one line of stderr. It is silent where stderr is no terminal."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from gguf_run.runtime.terminal.text import message, n_columns, size_text

BAR_WIDTH, LEAST_BAR_WIDTH = 30, 5
SECONDS_PER_DRAW = 0.05


class Progress:
    """A bar that shows the bytes that are done. With `unit`, a plural noun, it shows their number and the time left.

    It is a context manager, which erases the line at the end.
    """

    def __init__(self, label: str, unit: str = "") -> None:
        self.label, self.unit = label, unit
        self._start = self._next_draw = time.monotonic()
        self._visible = sys.stderr is not None and sys.stderr.isatty()
        self._drawn = 0

    def set(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        now = time.monotonic()
        if self._visible and now >= self._next_draw:
            self._next_draw = now + SECONDS_PER_DRAW
            part = min(1.0, done / max(1, total))
            whole = f"{total} {self.unit}{self._left(part)}" if self.unit else size_text(total, 1)
            figures = f"{part * 100:3.0f} % of {whole}"
            # What a narrow terminal has no room for is the bar.
            width = min(BAR_WIDTH, self._room() - len(self.label) - len(figures) - 4)
            bar = f"[{'#' * int(part * width):<{width}}] " if width >= LEAST_BAR_WIDTH else ""
            self._draw(f"{self.label} {bar}{figures}")

    def _left(self, part: float) -> str:
        if not part:
            return ""
        minutes, seconds = divmod(round((time.monotonic() - self._start) * (1 - part) / part), 60)
        return f", {minutes}:{seconds:02d} left"

    def _room(self) -> int:
        return n_columns(sys.stderr) - 1  # a full line would scroll

    def _draw(self, line: str) -> None:
        line = line[: self._room()]
        # Spaces clear the rest of a longer line; not every terminal knows escape codes.
        sys.stderr.write(f"\r{line:<{min(self._drawn, self._room())}}")
        sys.stderr.flush()
        self._drawn = len(line)

    def show(self, line: str) -> None:
        """Show a line of text in place of the bar."""
        if self._visible:
            self._draw(line)

    def clear(self) -> None:
        """Erase the bar, so that something else can be written on its line."""
        if self._drawn:
            self._draw("")
            sys.stderr.write("\r")
            sys.stderr.flush()

    def message(self, text: str) -> None:
        """Print one line on stderr, in place of the bar."""
        self.clear()
        message(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()


@contextmanager
def progress(label: str, unit: str = "") -> Iterator[Progress]:
    """Show a progress bar, and one line when kernels must be compiled. label, unit: see Progress."""
    from gguf_run.formats.compiler.jit import compile_notice

    note = f"compiling kernels for {label}; this takes some seconds, once"
    with Progress(label, unit) as bar, compile_notice(lambda: bar.message(note)):
        yield bar
