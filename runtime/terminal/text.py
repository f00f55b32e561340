"""Text for people at a terminal: one line that is safe to show, sizes, colours; and text files that they give.

Colours: what a model thinks before it answers is dimmed. There are no colours where the output is no terminal, or where
NO_COLOR is set (https://no-color.org).
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import click

from gguf_run.formats.errors import GgufRunError, plain
from gguf_run.formats.gguf.mapped import read_bytes

MAX_TEXT_BYTES = 1 << 30
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# Tags that begin and end a block of reasoning: of DeepSeek-R1, Qwen3 and most others; of Magistral; of Seed-OSS.
TAGS = {"<think>": "</think>", "[THINK]": "[/THINK]", "<seed:think>": "</seed:think>"}


def one_line(text: str) -> str:
    """Return text on one line that is safe to show: names from a file may hold escape codes or line breaks."""
    return plain(" ".join(text.split()))


def without_controls(text: str) -> str:
    """Return text of several lines without what a terminal obeys: a model may write escape codes. The rest stays."""
    return re.sub(r"[^\n\t\r\x20-\x7e\xa0-\U0010ffff]", lambda match: repr(match[0])[1:-1], text)


def json_text(value: Any) -> str:
    """Return JSON that is safe to show: characters that steer a terminal or turn the direction of text are escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def message(text: str) -> None:
    """Print one line on stderr. On a terminal, words wrap whole."""
    line = one_line(text)
    if sys.stderr is not None and sys.stderr.isatty():
        from gguf_run.runtime.terminal.wrap import wrapped

        line = "".join(wrapped([line], lambda: n_columns(sys.stderr)))
    click.echo(line, err=True)


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """Read a UTF-8 text file of at most `limit` bytes. Errors name the file and the place of the first invalid byte."""
    return decode_text(read_bytes(path, limit), str(path))


def read_stdin(limit: int = MAX_TEXT_BYTES) -> str:
    """Read all text of stdin, at most `limit` bytes. GgufRunError for more, if it is closed, or if it is not UTF-8."""
    if sys.stdin is None:
        raise GgufRunError("stdin is closed: name a file, or write the text on the command line")
    data = sys.stdin.buffer.read(limit + 1)
    if len(data) > limit:
        raise GgufRunError(f"stdin is larger than {limit} bytes, the most that is read of a text")
    return decode_text(data, "stdin")


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


def size_text(nbytes: float, digits: int = 2) -> str:
    """Return bytes for people: "1.23 GB". digits: their number after the point."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.{digits}f} {unit}"
    return f"{nbytes:.0f} B"


def on_terminal() -> bool:
    """Whether a user sits at stdin and stdout."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty()


def n_columns(stream: TextIO) -> int:
    """Return how many columns a stream's terminal has; sys.maxsize for a stream that is none."""
    return shutil.get_terminal_size().columns if stream.isatty() else sys.maxsize


def has_colours() -> bool:
    """Whether stdout may get escape codes."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def open_tag(prompt: str) -> str | None:
    """Return the tag that a prompt ends with: the template has begun the reasoning itself. None if there is no tag."""
    return next((tag for tag in TAGS if prompt.rstrip().endswith(tag)), None)


def dimmed(pieces: Iterable[str], inside: str | None) -> Iterator[str]:
    """Yield the text of pieces with escape codes around blocks of reasoning. inside: tag of a block that is open.

    A tag may come in several pieces: text that could be the beginning of a tag is held back.
    """
    held = ""
    if inside is not None:
        yield DIM
    try:
        for piece in pieces:
            text = held + piece
            while True:
                awaited = tuple(TAGS) if inside is None else (TAGS[inside],)
                at, tag = min(((text.find(tag), tag) for tag in awaited if tag in text), default=(-1, ""))
                if at < 0:
                    break
                before, inside = inside, tag if inside is None else None
                yield text[:at] + (DIM + tag if before is None else tag + PLAIN)
                text = text[at + len(tag) :]
            n_held = max((n for tag in awaited for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)
            shown, held = text[: len(text) - n_held], text[len(text) - n_held :]
            if shown:
                yield shown
        if held:
            yield held
        if inside is not None:
            inside = None
            yield PLAIN  # behind a word that the next one still holds back
    finally:
        if inside is not None:
            sys.stdout.write(PLAIN)
