"""A progress bar on one line of stderr. On anything but a terminal it stays silent."""

import sys
import time
from types import TracebackType

BAR_WIDTH = 30
SECONDS_PER_DRAW = 0.05


class Progress:
    """Progress through `total` bytes (0: unknown). Use as a context manager; the line is erased at the end."""

    def __init__(self, label: str, total: int) -> None:
        self.label = label
        self.total = total
        self._done = 0
        self._visible = sys.stderr is not None and sys.stderr.isatty()
        self._next_draw = time.monotonic()
        self._drawn = 0

    def add(self, n_bytes: int) -> None:
        """n_bytes more are done."""
        self.set(self._done + n_bytes)

    def set(self, n_bytes: int) -> None:
        """n_bytes are done in all."""
        self._done = n_bytes
        if self._visible and time.monotonic() >= self._next_draw:
            self._next_draw = time.monotonic() + SECONDS_PER_DRAW
            self._draw(self._line())

    def _line(self) -> str:
        if not self.total:
            return f"{self.label} {self._done / 1e6:.0f} MB"
        part = min(1.0, self._done / self.total)
        bar = "#" * int(part * BAR_WIDTH)
        return f"{self.label} [{bar:<{BAR_WIDTH}}] {part * 100:3.0f} % of {self.total / 1e6:.0f} MB"

    def _draw(self, line: str) -> None:
        # Spaces clear what a longer line before left; no escape codes, they are not for every terminal.
        sys.stderr.write(f"\r{line:<{self._drawn}}")
        sys.stderr.flush()
        self._drawn = len(line)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn:
            self._draw("")
            sys.stderr.write("\r")
            sys.stderr.flush()
