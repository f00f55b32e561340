"""A progress bar on one line of stderr. On anything but a terminal it stays silent."""

import sys
import time
from types import TracebackType

from gguf_run.runtime.terminal.text import message

BAR_WIDTH = 30
SECONDS_PER_DRAW = 0.05


class Progress:
    """Progress through bytes, or through what `unit` names (a plural), then with an estimate of the time left.
    Use as a context manager; the line is erased at the end."""

    def __init__(self, label: str, unit: str = "") -> None:
        self.label, self.unit = label, unit
        self._start = time.monotonic()
        self._visible = sys.stderr is not None and sys.stderr.isatty()
        self._next_draw = time.monotonic()
        self._drawn = 0

    def set(self, done: int, total: int) -> None:
        """`done` of `total` are done."""
        if self._visible and time.monotonic() >= self._next_draw:
            self._next_draw = time.monotonic() + SECONDS_PER_DRAW
            part = min(1.0, done / max(1, total))
            bar = "#" * int(part * BAR_WIDTH)
            whole = f"{total} {self.unit}{self._left(part)}" if self.unit else f"{total / 1e6:.0f} MB"
            self._draw(f"{self.label} [{bar:<{BAR_WIDTH}}] {part * 100:3.0f} % of {whole}")

    def _left(self, part: float) -> str:
        if not part:
            return ""
        minutes, seconds = divmod(round((time.monotonic() - self._start) * (1 - part) / part), 60)
        return f", {minutes}:{seconds:02d} left"

    def _draw(self, line: str) -> None:
        # Spaces clear what a longer line before left; no escape codes, they are not for every terminal.
        sys.stderr.write(f"\r{line:<{self._drawn}}")
        sys.stderr.flush()
        self._drawn = len(line)

    def clear(self) -> None:
        """Take the bar off the line, so that something else can be written."""
        if self._drawn:
            self._draw("")
            sys.stderr.write("\r")
            sys.stderr.flush()

    def message(self, text: str) -> None:
        """Print one line on stderr, in place of the bar."""
        self.clear()
        message(text)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()
