"""Shows an answer of a model while it comes: for gguf-run --prompt and for its chat."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from gguf_run.runtime.terminal.colours import dimmed, has_colours, open_tag
from gguf_run.runtime.terminal.text import message

if TYPE_CHECKING:
    from gguf_run.runtime.model import Model


def show(
    model: "Model", pieces: Iterable[str], is_stopped: Callable[[], bool] = lambda: False, tag: str | None = None
) -> str:
    """Write an answer to stdout as it comes; return what was written.

    is_stopped: asked after each piece; True ends the answer. tag: see open_reasoning.
    """
    answer: list[str] = []

    def taken() -> Iterator[str]:
        for piece in pieces:
            answer.append(piece)
            yield piece
            if is_stopped():
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


def open_reasoning(model: "Model", messages: Sequence[dict[str, Any]], options: Mapping[str, Any]) -> str | None:
    """Return the tag of a block of reasoning that the prompt of an answer has opened.

    None if there is none, or if the output has no colours to show it. options: arguments of Model.chat.
    """
    if not has_colours():
        return None
    return open_tag(model.chat_prompt(messages, options.get("tools"), options.get("template_options")))
