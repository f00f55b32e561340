"""Text for people at a terminal: one line that is safe to show, tables, sizes; and text files that they give."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from gguf_run.formats.errors import GgufRunError


def one_line(text: str) -> str:
    """Return text on one line that is safe to show: names from a file may hold escape codes or line breaks."""
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)


def message(text: str) -> None:
    """Print one line on stderr."""
    click.echo(one_line(text), err=True)


def read_text(path: Path) -> str:
    """Read a UTF-8 text file. Errors name the file and the place of the first invalid byte."""
    return decode_text(path.read_bytes(), str(path))


def decode_text(data: bytes, name: str) -> str:
    """Decode UTF-8, without its byte order mark. GgufRunError names `name` and the first invalid byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # utf-8-sig does not count the mark.
        offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        raise GgufRunError(
            f"{name}: byte 0x{data[offset]:02x} at offset {offset} is not valid UTF-8: convert the text to UTF-8"
        ) from None


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> Iterator[str]:
    """Yield the lines of a table. align: "l" or "r" for each column."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, *rows]:
        cells = [
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, align, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def size_text(nbytes: float, digits: int = 2) -> str:
    """Bytes for people: "1.23 GB". digits: how many follow the point."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.{digits}f} {unit}"
    return f"{nbytes:.0f} B"
