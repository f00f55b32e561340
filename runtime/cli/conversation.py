"""A conversation of gguf-run: the file of a session that holds it, and the answers that are shown while they come."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguf_run.runtime.terminal.text import has_colours, message, n_columns

if TYPE_CHECKING:
    from gguf_run.runtime.model import Model

Conversation = list[dict[str, Any]]


@contextmanager
def conversation(model: "Model", path: Path | None, system: str | None) -> Iterator[Conversation]:
    """Yield the conversation so far, for the block to add to; save it when the block ends without an error.

    path: the session's file, None for no session.
    system: a system message, which replaces that of the file.
    """
    messages: Conversation = []
    if path is not None and path.exists():
        start = time.perf_counter()
        messages = model.load_session(path)
        seconds = time.perf_counter() - start
        message(f"{path}: {model.decoder.n_past} tokens, {len(messages)} messages restored in {1000 * seconds:.0f} ms")
    if system is not None:
        if messages and messages[0]["role"] == "system":
            del messages[0]
        messages.insert(0, {"role": "system", "content": system})
    yield messages
    if path is not None:
        model.save_session(path, messages)


def show(
    model: "Model",
    pieces: Iterable[str],
    is_stopped: Callable[[], bool] = lambda: False,
    tag: str | None = None,
    with_markdown: bool = False,
) -> str:
    """Write an answer to stdout as it comes; return what the model has written.

    On a terminal, words wrap whole, what a model thinks is dimmed, and control characters are shown as escapes.

    is_stopped: asked after each piece; True ends the answer.
    tag: see open_reasoning.
    with_markdown: on a terminal with colours, Markdown is rendered if the package rich is there.
    """
    answer: list[str] = []

    def taken() -> Iterator[str]:
        for piece in pieces:
            answer.append(piece)
            yield piece
            if is_stopped():
                break

    texts: Iterable[str] = taken()
    if sys.stdout.isatty():
        from gguf_run.runtime.terminal.wrap import without_controls, wrapped

        texts = map(without_controls, texts)
        if has_colours():
            from gguf_run.runtime.terminal.reasoning import dimmed

            texts = dimmed(texts, tag)
        if with_markdown and has_colours() and find_spec("rich") is not None:
            from gguf_run.runtime.terminal.markdown import rendered

            texts = rendered(texts)
        else:
            texts = wrapped(texts, lambda: n_columns(sys.stdout))
    for text in texts:
        sys.stdout.write(text)
        sys.stdout.flush()
    if not "".join(answer[-2:]).endswith("\n"):  # the last piece may be empty
        click.echo()
    if model.stats.finish == "context":
        full = f"the context is full ({model.n_ctx} tokens), the answer ends here"
        message(f"{full}: choose a larger --ctx-size or --context-shift")
    return "".join(answer)


def answer_facts(model: "Model") -> list[str]:
    """Return what the last answer took: tokens, seconds and speeds of the prompt and of the answer."""
    stats = model.stats
    n_prefill = f"{stats.n_prompt - stats.n_reused}" + (f" (+ {stats.n_reused} known)" if stats.n_reused else "")
    return [
        f"prefill {n_prefill} tokens in {stats.prefill_s:.2f} s, {stats.prefill_speed:.0f}/s",
        f"decode {stats.n_decoded} in {stats.decode_s:.2f} s, {stats.decode_speed:.0f}/s",
    ]


def context_used(model: "Model") -> str:
    """Return how full the context is, as "context 72 of 4096 tokens"."""
    return f"context {model.decoder.n_past} of {model.n_ctx} tokens"
