"""The family of a model: how its answers are read, and how calls of tools are enforced."""

from collections.abc import Mapping, Sequence
from typing import Any

from gguf_run.formats.frozen import frozen
from gguf_run.runtime.chat.answer_parts import Splitter, open_tag
from gguf_run.runtime.chat.calls.form import Form, form_of
from gguf_run.runtime.chat.calls.splitter import AnswerSplitter
from gguf_run.runtime.chat.calls.tools import schemas


@frozen
class Family:
    """Models whose chat templates write calls of tools in one form."""

    form: Form

    @property
    def name(self) -> str:
        """The name of the form, as "hermes"."""
        return self.form.name

    @property
    def shows_special(self) -> bool:
        """Control tokens must be a part of the text: they tell where calls begin."""
        return self.form.has_special

    def splitter(self, prompt: str, tools: Sequence[Mapping[str, Any]] | None) -> Splitter:
        """Return a splitter for one answer.

        prompt: of the answer; its end tells whether the template has begun the reasoning.
        tools: those that the model may call, as in OpenAI's API; a call of another tool is text.
        """
        return AnswerSplitter(self.form, open_tag(prompt), schemas(tools))


def family_of(template: str | None) -> Family:
    """Return the family of a model. template: its chat template, None if it has none."""
    return Family(form_of(template))
