"""The interactive chat of gguf-run: Ctrl-C stops an answer, twice or Ctrl-D leaves, /help tells the commands."""

from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.cli.answer import open_reasoning, show
from gguf_run.runtime.cli.chat_commands import Chat, run_command
from gguf_run.runtime.cli.chat_input import Interrupts, inputs, line_editing, on_terminal
from gguf_run.runtime.cli.common import describe
from gguf_run.runtime.cli.session import Conversation
from gguf_run.runtime.terminal.text import message

if TYPE_CHECKING:
    from gguf_run.runtime.model import Model


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
    tag = open_reasoning(model, messages, state.options)
    return show(model, chain([first], pieces), lambda: interrupts.wanted, tag)
