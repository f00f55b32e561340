"""Text that a person gives: a file, or stdin."""

import sys
from pathlib import Path

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.mapped import read_bytes
from gguf_run.runtime.terminal.text import decode_text

MAX_TEXT_BYTES = 1 << 30


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
