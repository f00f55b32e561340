"""The interactive chat of gguf-run: Ctrl-C stops an answer, twice or Ctrl-D leaves, /help tells the commands."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

import click

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.cli.chat_commands import Chat, run_command
from gguf_run.runtime.cli.chat_input import Interrupts, inputs, line_editing, on_terminal
from gguf_run.runtime.cli.common import describe, message
from gguf_run.runtime.cli.session import Conversation
from gguf_run.runtime.terminal.colours import dimmed, has_colours, open_tag

if TYPE_CHECKING:
    from gguf_run.runtime.model import Model


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


def chat(
    model: "Model", messages: Conversation, first: str | None, options: dict[str, Any], keep_history: bool = False
) -> None:
    """Read a message or a command, answer it, add both to messages, until stdin ends or /exit."""
    model.tokenize_chat([{"role": "user", "content": "?"}])  # a model without a chat template says so now
    interrupts, state = Interrupts(), Chat(model, messages, options)
    with line_editing(keep_history), interrupts.caught():
        for text in inputs(first, interrupts):
            interrupts.wanted = state.answers = False
            if not run_command(state, text):
                messages.append({"role": "user", "content": text.strip()})
                state.answers = True
            if state.is_over:
                return
            if state.answers:
                try:
                    answer = _turn(state, interrupts)
                except GgufRunError as error:  # somebody who sits there may say it otherwise
                    if not on_terminal():
                        raise
                    message(f"error: {describe(error)}")
                    del messages[-1]
                    continue
                if answer or not interrupts.wanted:
                    messages.append({"role": "assistant", "content": answer})
                else:
                    del messages[-1]
                    message("stopped before there was an answer: the question is forgotten")


def _turn(state: Chat, interrupts: Interrupts) -> str:
    """Answer the last message; forget the oldest ones where the context is too small for all."""
    from gguf_run.runtime.engine.context import ContextError

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
            del messages[oldest : min(oldest + 2, len(messages) - 1)]  # never the question
    first = ""
    with suppress(KeyboardInterrupt), interrupts.awaiting():
        first = next(pieces, "")
    return show(model, chain([first], pieces), interrupts, open_reasoning(model, messages, state.options))


def open_reasoning(model: "Model", messages: Conversation, options: Mapping[str, Any]) -> str | None:
    """The tag of a block of reasoning that the prompt of an answer begins, if the output has colours to show it."""
    if not has_colours():
        return None
    return open_tag(model.chat_prompt(messages, options.get("tools"), options.get("template_options")))
