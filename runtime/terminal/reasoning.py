"""What a model thinks before it answers: on a terminal with colours it is dimmed."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gguf_run.runtime.chat.answer_parts import TAGS, open_tag
from gguf_run.runtime.terminal.text import has_colours

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def open_reasoning(model: Any, messages: Any, options: Mapping[str, Any]) -> str | None:
    """Return the tag of a block of reasoning that the prompt of an answer has opened.

    None if there is none, or if the output has no colours to show it. model: a Model.
    messages, options: arguments of Model.chat.
    """
    if not has_colours():
        return None
    return open_tag(model.chat_prompt(messages, options.get("tools"), options.get("template_options")))


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
