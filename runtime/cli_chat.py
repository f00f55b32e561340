"""The interactive chat of gguf-run: Ctrl-C stops an answer, Ctrl-D leaves, /help tells the commands."""

import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from gguf_run.runtime.cli_chat_commands import Chat, run_command
from gguf_run.runtime.cli_common import decode_text, message
from gguf_run.runtime.cli_session import Conversation
from gguf_run.runtime.cli_style import dimmed, has_colours, open_tag

if TYPE_CHECKING:
    from gguf_run.runtime.model import Model

QUOTES = '"""'


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


def show(model: "Model", pieces: Iterable[str], interrupts: Interrupts | None = None, tag: str | None = None) -> str:
    """Write an answer as it comes; return it, or what there is of it when Ctrl-C is pressed. tag: of reasoning that the
    prompt has begun."""
    answer: list[str] = []

    def taken() -> Iterator[str]:
        for piece in pieces:
            answer.append(piece)
            yield piece
            if interrupts is not None and interrupts.wanted:
                break

    for text in dimmed(taken(), tag) if has_colours() else taken():
        sys.stdout.write(text)
        sys.stdout.flush()
    if not "".join(answer[-1:]).endswith("\n"):
        click.echo()
    if model.stats.finish == "context":
        full = f"the context is full ({model.n_ctx} tokens), the answer ends here"
        message(f"{full}: choose a larger --ctx-size or --context-shift")
    return "".join(answer)


def chat(model: "Model", messages: Conversation, first: str | None, options: dict[str, Any]) -> None:
    """Read a message or a command, answer it, add both to messages, until stdin ends or /exit."""
    model.tokenize_chat([{"role": "user", "content": "?"}])  # a model without a chat template says so now
    interrupts, state = Interrupts(), Chat(model, messages, options)
    with interrupts.caught():
        for text in _messages(first, interrupts):
            interrupts.wanted = state.answers = False
            if not run_command(state, text):
                messages.append({"role": "user", "content": text.strip()})
                state.answers = True
            if state.is_over:
                return
            if state.answers:
                answer = _turn(state, interrupts)
                messages.append({"role": "assistant", "content": answer})


def _turn(state: Chat, interrupts: Interrupts) -> str:
    """Answer the last message; forget the oldest ones where the context is too small for all."""
    from gguf_run.runtime.generate import ContextError

    model, messages = state.model, state.messages
    oldest = int(messages[0]["role"] == "system")
    while True:
        try:
            pieces = model.chat(messages, **state.options)
            break
        except ContextError:
            if len(messages) == oldest + 1:
                raise
            message(f"the conversation is longer than the context ({model.n_ctx} tokens): its oldest turn is left out")
            del messages[oldest : oldest + 2]
    tag = open_tag(model.chat_prompt(messages, state.options.get("tools"))) if has_colours() else None
    return show(model, pieces, interrupts, tag)


def _messages(first: str | None, interrupts: Interrupts) -> Iterator[str]:
    """What the user says. A line that ends with a backslash goes on in the next one; lines of three double quotes
    enclose several."""
    if first is not None:
        yield first
    lines = _lines(interrupts)
    for line in lines:
        if line.strip() == QUOTES:
            line = "\n".join(iter(lambda: next(lines, QUOTES), QUOTES))
        else:
            while line.endswith("\\"):
                line = line[:-1] + "\n" + next(lines, "")
        if line.strip():
            yield line


def _lines(interrupts: Interrupts) -> Iterator[str]:
    """Lines of stdin. On a terminal with a prompt and, where Python has it, line editing and a history."""
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
        yield line.rstrip("\r\n")
    if on_terminal:
        click.echo()
