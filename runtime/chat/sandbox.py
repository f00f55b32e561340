"""The sandbox in which a chat template runs: a template is a program from a stranger.

Jinja's sandbox keeps a template away from Python's internals, from files and from changing its arguments, and its
ranges hold 100,000 numbers at most. The length of a template (MAX_TEMPLATE) and of the prompt (MAX_CHARS) is limited
here. Time and memory are not: a template can loop without writing anything, or double a text again and again. Such a
template runs until the user stops it or the memory is full. A server must render in a process that it can end.

Settings, filters and functions are those of Hugging Face transformers, for which templates are written.
"""

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE = 1 << 20  # characters of a template
MAX_CHARS = 1 << 27  # characters of a prompt


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; it changes nothing in a prompt."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # Jinja only asks what it contains

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def sandbox() -> ImmutableSandboxedEnvironment:
    """Return an environment for chat templates. Its renderings raise TemplateError where a limit is passed."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        optimized=False,  # Jinja would compute constants such as "a" * 10**9 while it compiles
    )
    environment.concat = _joined  # type: ignore[method-assign]
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _joined(parts: Iterable[str]) -> str:
    """Join what a template writes; count the characters while they come, so that an endless output ends."""
    taken, n_chars = [], 0
    for part in parts:
        n_chars += len(part)
        if n_chars > MAX_CHARS:
            raise TemplateError(f"it makes more than {MAX_CHARS} characters of text")
        taken.append(part)
    return "".join(taken)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which no model has seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
