"""The input of a chat: lines from a terminal or a pipe, their history, and Ctrl-C."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import click

from gguf_run.formats.compiler.cachedir import user_cache_dir
from gguf_run.runtime.terminal.text import decode_text, message, on_terminal

QUOTES = '"""'
MAX_HISTORY = 1000  # lines

ReadLine = Callable[[str], str]  # prompt -> a line without its line end; EOFError at the end of the input


class Interrupts:
    """Notes Ctrl-C instead of raising KeyboardInterrupt, which could end the program between any two steps.

    Only `awaiting` raises KeyboardInterrupt: while the program waits for input, or for the first token of an answer.
    """

    def __init__(self) -> None:
        self.wanted = False  # Ctrl-C has come
        self._awaiting = False

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        if self._awaiting:
            self._awaiting = False  # a second Ctrl-C must not interrupt the handling of the first
            raise KeyboardInterrupt

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Note Ctrl-C inside this block."""
        before = signal.signal(signal.SIGINT, self._arrived)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def awaiting(self) -> Iterator[None]:
        """Let Ctrl-C raise KeyboardInterrupt inside this block."""
        self._awaiting = True
        try:
            yield
        finally:
            self._awaiting = False


def inputs(first: str | None, interrupts: Interrupts) -> Iterator[str]:
    """Yield messages and commands until stdin ends or Ctrl-C comes twice. first: comes before them.

    A line that ends with a backslash goes on in the next one. Lines of three double quotes enclose a text of several
    lines. Ctrl-C drops a text that was begun.
    """
    if first is not None:
        yield first
    was_interrupted = False
    while sys.stdin is not None:
        try:
            with interrupts.awaiting():
                text = _text(input if on_terminal() else _from_pipe)
        except EOFError:
            break
        except KeyboardInterrupt:
            if was_interrupted:
                break
            was_interrupted = True
            click.echo(err=True)
            message("(Ctrl-C once more or Ctrl-D ends the chat)")
            continue
        except UnicodeDecodeError:
            message("warning: that line is not valid UTF-8, please write it again")
            continue
        was_interrupted = False
        if text.strip():
            yield text
    if on_terminal():
        click.echo()


def _text(read: ReadLine) -> str:
    """Read a text of one or more lines. The end of the input ends the text; EOFError if it comes first."""
    text = read("> ")
    if text.strip() == QUOTES:
        lines: list[str] = []
        with suppress(EOFError):
            while (line := read(". ")) != QUOTES:
                lines.append(line)
        return "\n".join(lines)
    with suppress(EOFError):
        while text.endswith("\\"):
            text = text[:-1] + "\n"
            text += read(". ")
    return text


def _from_pipe(prompt: str) -> str:
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return decode_text(line, "stdin").rstrip("\r\n")


@contextmanager
def line_editing(keep_history: bool, completions: Callable[[str], list[str]] = lambda line: []) -> Iterator[None]:
    """Let the user edit lines and recall earlier ones with the arrow keys. This needs a terminal and Python's readline.

    keep_history: lines of earlier chats come back too, from a file that only the user may read.
    completions: return what the last word of a line can become; Tab asks for it.
    """
    readline: Any = None
    with suppress(ImportError):
        if on_terminal():
            import readline
    if readline is None:
        yield
        return
    # Editline, macOS's readline, has commands of its own.
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    readline.set_completer_delims(" ")
    readline.set_completer(lambda _, state: dict(enumerate(completions(_typed(readline)))).get(state))
    if os.environ.get("TERM") != "dumb":
        readline.parse_and_bind("set enable-bracketed-paste on")
    path = user_cache_dir() / "chat-history"
    readline.set_history_length(MAX_HISTORY)
    if keep_history:
        with suppress(OSError):  # there is none yet
            readline.read_history_file(path)
    n_before = readline.get_current_history_length()
    try:
        yield
    finally:
        readline.set_completer(None)
        n_new = readline.get_current_history_length() - n_before
        if keep_history and n_new > 0:
            with suppress(OSError):  # a lost history is not worth an error
                path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
                readline.append_history_file(n_new, path)


def _typed(readline: Any) -> str:
    """The line up to the end of the word at the cursor."""
    line: str = readline.get_line_buffer()
    return line[: readline.get_endidx()]
