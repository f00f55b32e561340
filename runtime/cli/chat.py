"""The chat of gguf-run: Ctrl-C stops an answer, Ctrl-C twice or Ctrl-D ends the chat, /help lists the commands."""

from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.cli.chat_commands import Chat, completions, last_turns, run_command
from gguf_run.runtime.cli.chat_input import Interrupts, inputs, line_editing
from gguf_run.runtime.cli.conversation import Conversation, show
from gguf_run.runtime.cli.describe import describe
from gguf_run.runtime.terminal.reasoning import open_reasoning
from gguf_run.runtime.terminal.text import message, on_terminal

if TYPE_CHECKING:
    from gguf_run.runtime.model import Model


def chat(
    model: "Model", messages: Conversation, first: str | None, options: dict[str, Any], keep_history: bool = False
) -> None:
    """Read messages and commands until stdin ends or /exit; answer each message.

    messages: the conversation so far; questions and answers are added to it. first: a message before those of stdin.
    options: arguments of Model.chat. keep_history: keep lines for the arrow keys of the next chat.
    """
    model.tokenize_chat([{"role": "user", "content": "?"}])  # the error of a missing chat template comes now
    interrupts, state = Interrupts(), Chat(model, messages, options)
    last_turns(messages)
    with line_editing(keep_history, completions), interrupts.caught():
        for text in inputs(first, interrupts):
            interrupts.wanted = state.answers = False
            if not run_command(state, text):
                messages.append({"role": "user", "content": text.strip()})
                state.answers = True
            if state.is_over:
                return
            if state.answers:
                _turn(state, interrupts)


def banner(model: "Model") -> None:
    """Say what answers, and how to learn more."""
    message(" | ".join([model.about(), f"context {model.n_ctx} tokens", model.where]))
    message("/help lists the commands, Ctrl-D leaves")


def _turn(state: Chat, interrupts: Interrupts) -> None:
    """Answer the last message. A question without an answer is dropped from the conversation."""
    messages = state.messages
    try:
        answer = _answer(state, interrupts)
    except GgufRunError as error:
        if not on_terminal():
            raise
        message(f"error: {describe(error)}")  # the user can rephrase the question
        del messages[-1]
        return
    if answer or not interrupts.wanted:
        messages.append({"role": "assistant", "content": answer})
    else:
        del messages[-1]
        message("stopped before there was an answer: the question is forgotten")


def _answer(state: Chat, interrupts: Interrupts) -> str:
    """Show and return the answer to the last message. The oldest turns go if the context cannot hold all of them."""
    from gguf_run.runtime.engine.check import ContextError

    model, messages = state.model, state.messages
    oldest = int(messages[0]["role"] == "system")
    first, pieces = "", None
    with suppress(KeyboardInterrupt), interrupts.awaiting():
        while pieces is None:
            try:
                pieces = model.chat(messages, **state.options)
            except ContextError:
                if len(messages) == oldest + 1:
                    raise
                full = f"the conversation is longer than the context ({model.n_ctx} tokens)"
                message(f"{full}: its oldest turn is left out")
                del messages[oldest : min(oldest + 2, len(messages) - 1)]  # the question stays
        first = next(pieces, "")
    if pieces is None:
        return ""
    tag = open_reasoning(model, messages, state.options)
    return show(model, chain([first], pieces), lambda: interrupts.wanted, tag, with_markdown=True)
