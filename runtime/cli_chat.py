"""The interactive chat of gguf-run: Ctrl-C stops an answer, Ctrl-D leaves."""

import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from gguf_run.runtime.cli_common import decode_text, message
from gguf_run.runtime.cli_session import Conversation

if TYPE_CHECKING:
    from gguf_run.runtime.model import Model


class Interrupts:
    """Ctrl-C as a wish, not an exception: it can come between any two steps, and none may end the program.

    Only while input is awaited does it raise KeyboardInterrupt, since nothing else ends a wait for a key.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._awaiting = False

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        if self._awaiting:
            raise KeyboardInterrupt

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch Ctrl-C for a while."""
        before = signal.signal(signal.SIGINT, self._arrived)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def awaiting_input(self) -> Iterator[None]:
        """KeyboardInterrupt may come out of this."""
        self._awaiting = True
        try:
            yield
        finally:
            self._awaiting = False


def show(model: "Model", pieces: Iterable[str], interrupts: Interrupts | None = None) -> str:
    """Write an answer as it comes; return it, or what there is of it when Ctrl-C is pressed."""
    shown = []
    for piece in pieces:
        shown.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()
        if interrupts is not None and interrupts.wanted:
            break
    answer = "".join(shown)
    if not answer.endswith("\n"):
        click.echo()
    if model.stats.finish == "context":
        full = f"the context is full ({model.n_ctx} tokens), the answer ends here"
        message(f"{full}: choose a larger --ctx-size or --context-shift")
    return answer


def chat(model: "Model", messages: Conversation, first: str | None, options: dict[str, Any]) -> None:
    """Read a line, answer it, add both to messages, until stdin ends."""
    model.tokenize_chat([{"role": "user", "content": "?"}])  # a model without a chat template says so now
    interrupts = Interrupts()
    with interrupts.caught():
        for text in _lines(first, interrupts):
            interrupts.wanted = False
            messages.append({"role": "user", "content": text})
            answer = show(model, _turn(model, messages, options), interrupts)
            messages.append({"role": "assistant", "content": answer})


def _turn(model: "Model", messages: Conversation, options: dict[str, Any]) -> Iterator[str]:
    """Answer the last message; forget the oldest ones where the context is too small for all."""
    from gguf_run.runtime.generate import ContextError

    oldest = int(messages[0]["role"] == "system")
    while True:
        try:
            yield from model.chat(messages, **options)
            return
        except ContextError:
            if len(messages) == oldest + 1:
                raise
            message(f"the conversation is longer than the context ({model.n_ctx} tokens): its oldest turn is left out")
            del messages[oldest : oldest + 2]


def _lines(first: str | None, interrupts: Interrupts) -> Iterator[str]:
    """What the user says, line by line. On a terminal with a prompt and, where Python has it, line editing."""
    if first is not None:
        yield first
    if sys.stdin is None:
        return
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  (input() uses it)
    while True:
        try:
            with interrupts.awaiting_input():
                line = input("> ") + "\n" if on_terminal else decode_text(sys.stdin.buffer.readline(), "stdin")
        except EOFError:
            line = ""
        except KeyboardInterrupt:
            message(" (Ctrl-D leaves)")
            continue
        except UnicodeDecodeError:
            message("warning: that line is not valid UTF-8, please write it again")
            continue
        if not line:
            break
        if line.strip():
            yield line.strip()
    if on_terminal:
        click.echo()
