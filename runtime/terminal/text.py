"""Text for people at a terminal: one line that is safe to show, sizes; and text files that they give."""

import os
import shutil
import sys
from typing import TextIO

import click

from gguf_run.formats.errors import GgufRunError, plain


def one_line(text: str) -> str:
    """Return text on one line that is safe to show: names from a file may hold escape codes or line breaks."""
    return plain(" ".join(text.split()))


def decode_text(data: bytes, name: str) -> str:
    """Decode UTF-8, without its byte order mark. GgufRunError names `name` and the first invalid byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)  # utf-8-sig does not count the mark
        what = f"byte 0x{data[offset]:02x} at offset {offset} is not valid UTF-8: convert the text to UTF-8"
        raise GgufRunError(f"{name}: {what}") from None


def message(text: str) -> None:
    """Print one line on stderr. On a terminal, words wrap whole."""
    line = one_line(text)
    if sys.stderr is not None and sys.stderr.isatty():
        from gguf_run.runtime.terminal.wrap import wrapped

        line = "".join(wrapped([line], lambda: n_columns(sys.stderr)))
    click.echo(line, err=True)


def size_text(nbytes: float, digits: int = 2) -> str:
    """Return bytes for people: "1.23 GB". digits: their number after the point."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next((f"{nbytes / scale:.{digits}f} {unit}" for unit, scale in units if nbytes >= scale), f"{nbytes:.0f} B")


def on_terminal() -> bool:
    """Whether a user sits at stdin and stdout."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty()


def n_columns(stream: TextIO) -> int:
    """Return how many columns a stream's terminal has; sys.maxsize for a stream that is none."""
    return shutil.get_terminal_size().columns if stream.isatty() else sys.maxsize


def has_colours() -> bool:
    """Whether stdout may get escape codes: it is a terminal, and NO_COLOR is not set (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
