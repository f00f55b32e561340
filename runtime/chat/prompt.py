"""The prompt of a conversation with a loaded model."""

from collections.abc import Mapping, Sequence
from typing import Any

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.chat.process import TemplateProcess
from gguf_run.runtime.chat.template import render_chat


def prompt_of(model: Any, messages: Any, tools: Sequence[Any] | None, options: Mapping[str, Any] | None) -> str:
    """See Model.chat_prompt. model: a Model; the process that runs its template is kept there."""
    template = (model.tool_template if tools else None) or model.chat_template
    if template is None:
        raise GgufRunError(
            "the model has no chat template: it continues texts (generate, or --raw); to chat, name one: "
            "--chat-template"
        )
    bos, eos = (
        None if id is None else model.tokenizer.token_text(id) for id in (model.tokenizer.bos, model.tokenizer.eos)
    )
    process = model.templates = model.templates or TemplateProcess()
    return render_chat(template, messages, bos_token=bos, eos_token=eos, tools=tools, options=options, process=process)
