"""How answers look on a terminal: what a model thinks before it answers is dimmed. Nothing of it where the output is no
terminal, or where NO_COLOR is set (https://no-color.org)."""

import os
import sys
from collections.abc import Iterable, Iterator

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# What begins and ends a block of reasoning: DeepSeek-R1, Qwen3 and most others; Magistral; Seed-OSS.
TAGS = {"<think>": "</think>", "[THINK]": "[/THINK]", "<seed:think>": "</seed:think>"}


def has_colours() -> bool:
    """Whether stdout may get escape codes."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def open_tag(prompt: str) -> str | None:
    """The tag with which a prompt ends, if the template has begun the reasoning itself."""
    return next((tag for tag in TAGS if prompt.rstrip().endswith(tag)), None)


def dimmed(pieces: Iterable[str], inside: str | None) -> Iterator[str]:
    """Put the codes around reasoning blocks. inside: the tag of a block that is open already. A tag may come in parts;
    what could be the beginning of one is held back."""
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
                if inside is None:
                    yield text[:at] + DIM + tag
                    inside = tag
                else:
                    yield text[:at] + tag + PLAIN
                    inside = None
                text = text[at + len(tag) :]
            n_held = max((n for tag in awaited for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)
            shown, held = text[: len(text) - n_held], text[len(text) - n_held :]
            if shown:
                yield shown
        if held:
            yield held
    finally:
        if inside is not None:
            sys.stdout.write(PLAIN)
