"""Renders a conversation with the chat template of a model: messages in, the text of a prompt out.

A template is a program from a stranger. It runs in a process of its own (process.py, worker.py), with limits of time
and memory, in Jinja's sandbox (sandbox.py).
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.chat.messages import objects, plain, uniform
from gguf_run.runtime.chat.process import TemplateProcess

MAX_TEMPLATE = 1 << 18  # characters of a template


def render_chat(
    template: str,
    messages: str | Sequence[Mapping[str, Any]],
    *,
    bos_token: str | None,
    eos_token: str | None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
    process: TemplateProcess | None = None,
) -> str:
    """Return the prompt that a template makes of messages.

    template: Jinja source, usually the model's own.
    messages: {"role": "system" | "user" | "assistant" | "tool", "content": text} each, or what messages.py accepts.
    bos_token, eos_token: the texts of these tokens, None if the model has none.
    add_generation_prompt: the prompt ends where the answer of the model begins.
    tools: JSON schemas of functions that the model may call.
    options: more variables for the template, such as enable_thinking; they win over the usual ones.
    process: where the template runs. None: a process for this call only.

    Most templates write BOS themselves, so encode the result with `Tokenizer.encode_chat`, which never doubles it.
    Warns, once for each process, if the template has no place for a system message (it then begins the user's), for
    tools or for tool calls. GgufRunError: an argument is not as it must be; the template is damaged or too long,
    refuses the messages, passes a limit of time or memory, or tries what the sandbox forbids.
    """
    if len(template) > MAX_TEMPLATE:
        reason = f"it has {len(template)} characters: {MAX_TEMPLATE} are allowed"
        raise GgufRunError(f"the model's chat template failed: {reason}")
    variables: dict[str, Any] = {"messages": messages, "tools": tools, "documents": None}
    variables |= {"bos_token": bos_token or "", "eos_token": eos_token or ""}
    variables["add_generation_prompt"] = add_generation_prompt
    process = process or TemplateProcess()
    try:
        variables |= plain(options or {}, "template_options")
        variables["messages"] = uniform(variables["messages"])
        variables["tools"] = objects(variables["tools"] or [], "tools") or None
        reply = process.ask({"source": template, "variables": variables})
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise GgufRunError(f"messages, tools or template_options cannot be written as JSON: {error}") from None
    if "error" in reply:
        raise GgufRunError(f"the model's chat template failed{reply['error']}")
    for note in reply["notes"]:
        if note not in process.said:
            process.said.add(note)
            warnings.warn(note, stacklevel=5)
    text: str = reply["text"]
    return text
