"""Renders a conversation with the chat template of a model: messages in, the text of a prompt out."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.chat.sandbox import MAX_TEMPLATE, sandbox

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
        return sandbox().from_string(template).render(variables)
    except Exception as error:  # a program from a stranger: it may raise anything
        line = f" in line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        shown = " ".join(reason.split())[:MAX_REASON]
        raise GgufRunError(f"the model's chat template failed{line}: {shown}") from None
