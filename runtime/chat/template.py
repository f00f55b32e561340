"""Renders a conversation with the chat template of a model: messages in, the text of a prompt out.

A template is a program from a stranger. Jinja's sandbox keeps the template away from Python's internals, from files and
from changing its arguments, and its ranges hold 100,000 numbers at most. The length of a template (MAX_TEMPLATE) and of
the prompt (MAX_CHARS) is limited here. Time and memory are not: a template can loop without writing anything, or double
a text again and again. Such a template runs until the user stops it or the memory is full. A server must render in a
process that it can end.

Settings, filters and functions are those of Hugging Face transformers, for which templates are written.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gguf_run.formats.errors import GgufRunError

MAX_TEMPLATE = 1 << 20  # characters of a template
MAX_CHARS = 1 << 27  # characters of a prompt
MAX_REASON = 300  # characters of a template's error that are shown


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str | None,
    eos_token: str | None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Return the prompt that a template makes of messages.

    template: Jinja source, usually the model's own.
    messages: {"role": "system" | "user" | "assistant" | "tool", "content": text} each.
    bos_token, eos_token: the texts of these tokens, None if the model has none.
    add_generation_prompt: the prompt ends where the answer of the model begins.
    tools: JSON schemas of functions that the model may call.
    options: more variables for the template, such as enable_thinking; they win over the usual ones.

    Most templates write BOS themselves, so encode the result with `Tokenizer.encode_chat`, which never doubles it.
    GgufRunError: the template is damaged or too long, refuses the messages, writes too much, or tries what the
    sandbox forbids.
    """
    variables = {
        "messages": messages,
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token or "",
        "eos_token": eos_token or "",
        **(options or {}),
    }
    try:
        if len(template) > MAX_TEMPLATE:
            raise TemplateError(f"it has {len(template)} characters: {MAX_TEMPLATE} are allowed")
        return _sandbox().from_string(template).render(variables)
    except Exception as error:  # a program from a stranger: it may raise anything
        line = f" in line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        shown = " ".join(reason.split())[:MAX_REASON]
        raise GgufRunError(f"the model's chat template failed{line}: {shown}") from None


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; it changes nothing in a prompt."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # Jinja only asks what it contains

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _sandbox() -> ImmutableSandboxedEnvironment:
    """Return an environment for chat templates. Its renderings raise TemplateError where a limit is passed."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        optimized=False,  # Jinja would compute constants such as "a" * 10**9 while it compiles
    )
    environment.concat = _joined  # type: ignore[method-assign]
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": datetime.now().strftime}
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
